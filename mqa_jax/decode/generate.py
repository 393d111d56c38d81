"""From prompts to tokens, with the project's own models.

Array letters: B batch   P prompt length   L max_new_tokens
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mqa_jax.decode.search import Decoded
from mqa_jax.model.transformer import DecoderOnly, EncoderDecoder

Model = EncoderDecoder | DecoderOnly
Search = Callable[..., Decoded]

# Prompts are padded to a multiple of this, so that a corpus needs a handful of compilations.
BUCKET = 16


def generate(
    model: Model,
    prompt_BP: Array,
    lengths_B: Array,
    *,
    search: Search,
    max_new_tokens: int,
    bos_id: int,
    **search_options,
) -> Decoded:
    """Decodes behind a batch of prompts; to be called inside `jax.jit`.

    Args:
      model: an `EncoderDecoder` translates its prompts, a `DecoderOnly` continues them.
      prompt_BP: `[B, P]` ids padded on the right; a language model's begin with `bos_id`.
      lengths_B: `[B]`, how many of the `P` are real.
      search: `greedy`, `sample` or `beam_search`, or a function with the same first arguments.
      max_new_tokens: `L`.
      bos_id: the id that a target sentence begins with.
      search_options: passed on to `search`.

    Raises:
      ValueError: prompt and answer do not fit into the positions that the model knows.
    """
    batch, prompt_length = prompt_BP.shape
    if isinstance(model, EncoderDecoder):
        cross = model.init_cross_cache(prompt_BP, lengths_B)
        cache = model.init_cache(batch, max_new_tokens)
        last_B = jnp.full(batch, bos_id, jnp.int32)
        step_fn = functools.partial(_translate_step, model, cross)
    else:
        # The last token of a prompt is the first one that the search feeds to the model.
        cache = model.init_cache(batch, prompt_length + max_new_tokens)
        _, cache = model.prefill(prompt_BP, cache, lengths_B - 1)
        last_B = jnp.take_along_axis(prompt_BP, lengths_B[:, None] - 1, axis=1)[:, 0]
        step_fn = model.decode
    return search(step_fn, cache, last_B, max_new_tokens=max_new_tokens, **search_options)


def _translate_step(model: EncoderDecoder, cross, tokens_R: Array, cache):
    return model.decode(tokens_R, cache, cross)


@dataclasses.dataclass
class DecodeStats:
    """What a `Generator` has done so far.

    Attributes:
      compile_seconds: spent on compiling, once a shape.
      decode_seconds: spent on all else: encoding or prefill, and the steps.
      steps: decode steps, each for a whole batch.
      rows: real prompts in the batch of each step, summed up over the steps.
      tokens: decoded for real prompts (of the best hypothesis), end-of-sentence included.
    """

    compile_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    tokens: int = 0


class Generator:
    """Decodes prompts of any lengths in batches of like length; one compiled program a bucket.

    Args:
      model: what to decode with, of which only the structure is used: weights are handed to each
        call, so that a training run can evaluate again and again without compiling again.
      search: `greedy`, `sample` or `beam_search`, with all its options but `max_new_tokens` and
        `key` bound to it by `functools.partial`.
      batch_size: rows a batch; the last one is filled up.
      bos_id: the id that a target sentence begins with.
      max_new_tokens: by default 50 more than the prompt's length (as in the paper's code base),
        and never more than the model has positions for.

    Attributes:
      stats: what has been decoded, and how long it took.
    """

    def __init__(
        self,
        model: Model,
        *,
        search: Search,
        batch_size: int,
        bos_id: int,
        max_new_tokens: int | None = None,
    ):
        self._is_translation = isinstance(model, EncoderDecoder)
        self._max_length = model.config.max_length
        self._batch_size = batch_size
        self._bos_id = bos_id
        self._max_new_tokens = max_new_tokens
        graphdef = nnx.graphdef(model)
        dtype = jnp.dtype(model.config.dtype)

        @functools.partial(jax.jit, static_argnames="limit")
        def run(params, prompt_BP: Array, lengths_B: Array, keys_B: Array | None, limit: int):
            # Once, before the loop: else every step would read the weights in the wider dtype.
            params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
            options = {} if keys_B is None else {"key": keys_B}
            model = nnx.merge(graphdef, params)
            decoded = generate(
                model,
                prompt_BP,
                lengths_B,
                search=search,
                max_new_tokens=limit,
                bos_id=bos_id,
                **options,
            )
            return dataclasses.replace(decoded, cache=None)

        self._run = run
        self._compiled = {}
        self.stats = DecodeStats()

    @property
    def room(self) -> int:
        """Tokens of the longest prompt that can be decoded behind."""
        return self._max_length - (0 if self._is_translation else self._max_new_tokens or 1)

    def __call__(
        self,
        params: nnx.State,
        prompts: Sequence[Sequence[int]],
        keys: Array | None = None,
        *,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> Iterator[tuple[int, Decoded]]:
        """Decodes behind `prompts`; none is cut short.

        Args:
          params: the model's weights, `nnx.state(model)`.
          prompts: ids of what to translate, or to continue; a language model's begin with `bos_id`.
          keys: for `sample`: `[len(prompts)]` PRNG keys; what a prompt draws depends on its own
            alone.
          name: what errors call a prompt, from its number, which counts from 1.

        Yields:
          the index of a prompt, and what was decoded for it, without the batch axis; not in order.

        Raises:
          ValueError: a prompt without tokens, or of more than the model has positions for; nothing
            has been decoded then.
        """
        for number, prompt in enumerate(prompts, start=1):
            self._check(name(number), prompt)
        # Only prompts of one shape share a batch: what is decoded for one depends on no other then.
        by_shape = {}
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            by_shape.setdefault(self._shape(len(prompts[i])), []).append(i)
        batches = [
            (shape, indices[start : start + self._batch_size])
            for shape, indices in by_shape.items()
            for start in range(0, len(indices), self._batch_size)
        ]
        for (width, limit), batch in batches:
            rows = batch + batch[-1:] * (self._batch_size - len(batch))
            lengths_B = np.array([len(prompts[i]) for i in rows], np.int32)
            prompt_BP = np.zeros((self._batch_size, width), np.int32)
            for row, i in enumerate(rows):
                prompt_BP[row, : lengths_B[row]] = prompts[i]
            keys_B = None if keys is None else keys[np.array(rows)]
            decoded = self._decode(params, prompt_BP, lengths_B, keys_B, limit)
            self.stats.rows += int(decoded.steps) * len(batch)
            for row, i in enumerate(batch):
                own = jax.tree.map(
                    lambda x, row=row: x[row], dataclasses.replace(decoded, steps=None)
                )
                self.stats.tokens += int(own.length.flat[0])
                yield i, dataclasses.replace(own, steps=decoded.steps)

    def tokens(
        self, params: nnx.State, prompts: Sequence[Sequence[int]], keys: Array | None = None
    ) -> list[list[int]]:
        """As a call, but only the ids of the best hypothesis, those of prompt `i` at index `i`."""
        best = [[]] * len(prompts)
        for i, decoded in self(params, prompts, keys):
            ids = decoded.tokens.reshape(-1, decoded.tokens.shape[-1])[0]
            best[i] = ids[: int(decoded.length.flat[0])].tolist()
        return best

    def _decode(self, params, prompt_BP, lengths_B, keys_B, limit: int) -> Decoded:
        """One batch, on the host; compiled apart, so that the clock of decoding excludes it."""
        shape = (prompt_BP.shape, limit)
        start = time.perf_counter()
        if shape not in self._compiled:
            lowered = self._run.lower(params, prompt_BP, lengths_B, keys_B, limit)
            self._compiled[shape] = lowered.compile()
        compiled = time.perf_counter()
        decoded = jax.device_get(self._compiled[shape](params, prompt_BP, lengths_B, keys_B))
        self.stats.compile_seconds += compiled - start
        self.stats.decode_seconds += time.perf_counter() - compiled
        self.stats.steps += int(decoded.steps)
        return decoded

    def _check(self, name: str, prompt: Sequence[int]) -> None:
        """A prompt must have a token, and leave room for at least one more."""
        if not len(prompt):
            raise ValueError(f"{name} has no tokens: give one at least")
        if len(prompt) > self.room:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, but there is room for {self.room} (the model "
                f"knows {self._max_length} positions): split it, or train a model with a larger "
                "max_length"
            )

    def _shape(self, length: int) -> tuple[int, int]:
        """Prompt width and new tokens of the batch that a prompt of `length` tokens goes into."""
        width = -(-length // BUCKET) * BUCKET
        limit = self._max_new_tokens or width + 50
        if self._is_translation:
            return min(width, self._max_length), min(limit, self._max_length)
        width = min(width, self.room)
        return width, min(limit, self._max_length - width)
