"""From prompts to tokens, with the project's own models.

Array letters: B batch   P prompt length   L max_new_tokens
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mqa_jax.attention.cache import CrossCache
from mqa_jax.attention.module import SelfCache
from mqa_jax.core.arrays import as_int32
from mqa_jax.core.checks import check_integer
from mqa_jax.decode.arguments import check_token, known_values, typed_keys
from mqa_jax.decode.search import Decoded, StepFn
from mqa_jax.model.transformer import EncoderDecoder, Model

Search = Callable[..., Decoded]
Prompt = Sequence[int] | np.ndarray

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
    **search_options: Any,
) -> Decoded:
    """Decodes behind a batch of prompts; to be called inside `jax.jit`.

    Args:
      model: an `EncoderDecoder` translates its prompts, a `DecoderOnly` continues them.
      prompt_BP: `[B, P]` ids padded on the right; a language model's begin with `bos_id`.
      lengths_B: `[B]`, how many of the `P` are real, at least 1.
      search: `greedy`, `sample` or `beam_search`, or a function with the same first arguments.
      max_new_tokens: `L`.
      bos_id: the id that a target sentence begins with.
      search_options: passed on to `search`.

    Raises:
      ValueError: prompt and answer do not fit into the positions that the model knows; shapes that
        do not fit; a length that is not from 1 to `P`, an id outside the vocabulary. Lengths that
        are traced cannot be checked: `Decoded.is_finite` is False for a row with a wrong one.
    """
    vocab_size = model.config.vocab_size
    prompt_BP, lengths_B = (
        x if isinstance(x, Array) else np.asarray(x) for x in (prompt_BP, lengths_B)
    )
    _check_prompts(prompt_BP, lengths_B, vocab_size)
    check_token("bos_id", bos_id, vocab_size)
    prompt_BP, lengths_B = as_int32(prompt_BP), as_int32(lengths_B)
    batch, prompt_length = prompt_BP.shape
    step_fn: StepFn[tuple[SelfCache, ...]]
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
    # An id that the model does not have, so that nothing plausible is decoded.
    is_length_B = (lengths_B >= 1) & (lengths_B <= prompt_length)
    last_B = jnp.where(is_length_B, last_B, vocab_size)
    return search(step_fn, cache, last_B, max_new_tokens=max_new_tokens, **search_options)


def _check_prompts(prompt_BP: Array, lengths_B: Array, vocab_size: int) -> None:
    shape = np.shape(prompt_BP)
    if len(shape) != 2 or not all(shape) or np.shape(lengths_B) != shape[:1]:
        raise ValueError(
            "prompt_BP must be [B, P] and lengths_B [B], with a token at least, not "
            f"{list(shape)} and {list(np.shape(lengths_B))}"
        )
    for name, array in (("prompt_BP", prompt_BP), ("lengths_B", lengths_B)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise ValueError(f"{name} must be integers, not {jnp.result_type(array)}")
    ids = known_values(prompt_BP)
    for row, length in enumerate(known_values(lengths_B)):
        check_integer(f"lengths_B[{row}]", length, most=shape[1])
        # What is behind a prompt is of no concern.
        for at, id in enumerate(ids[row * shape[1] :][:length]):
            check_token(f"prompt_BP[{row}, {at}]", id, vocab_size)


def _translate_step(
    model: EncoderDecoder,
    cross: tuple[CrossCache, ...],
    tokens_R: Array,
    cache: tuple[SelfCache, ...],
) -> tuple[Array, tuple[SelfCache, ...]]:
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
      batch_size: rows a batch, at least 1; the last one is filled up.
      bos_id: the id that a target sentence begins with.
      max_new_tokens: at least 1; None: 50 more than the prompt's length (as in the paper's code
        base). Never more than the model has positions for.

    Attributes:
      stats: what has been decoded, and how long it took.

    Raises:
      ValueError: a number out of range, `bos_id` outside the vocabulary, or a language model with
        no position left for a prompt.
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
        self._vocab_size = model.config.vocab_size
        check_token("bos_id", bos_id, self._vocab_size)
        self._batch_size = check_integer("batch_size", batch_size)
        self._bos_id = bos_id
        if max_new_tokens is not None:
            max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
        self._max_new_tokens = max_new_tokens
        if self.room < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model knows "
                f"{self._max_length} positions"
            )
        graphdef, params = nnx.split(model)
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        dtype = jnp.dtype(model.config.dtype)

        @functools.partial(jax.jit, static_argnames="limit")
        def run(
            params: nnx.State,
            prompt_BP: Array,
            lengths_B: Array,
            keys_B: Array | None,
            limit: int,
        ) -> Decoded:
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
        self._compiled: dict[tuple[tuple[int, ...], int], jax.stages.Compiled] = {}
        self.stats = DecodeStats()

    @property
    def room(self) -> int:
        """Tokens of the longest prompt that can be decoded behind."""
        if self._is_translation:
            return self._max_length
        return self._max_length - (1 if self._max_new_tokens is None else self._max_new_tokens)

    def __call__(
        self,
        params: nnx.State,
        prompts: Sequence[Prompt],
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
          ValueError: a prompt without tokens, of more than the model has positions for, or with an
            id outside the vocabulary; as many keys as there are not prompts. Nothing has been
            decoded then. While decoding: weights of another model; or the model gave logits that
            are no numbers for a prompt, whose answer is not given then.
        """
        for number, prompt in enumerate(prompts, start=1):
            self._check(name(number), prompt)
        return self._answers(params, prompts, self._keys(keys, len(prompts)), name)

    def _answers(
        self,
        params: nnx.State,
        prompts: Sequence[Prompt],
        keys: Array | None,
        name: Callable[[int], str],
    ) -> Iterator[tuple[int, Decoded]]:
        # Only prompts of one shape share a batch: what is decoded for one depends on no other then.
        by_shape: dict[tuple[int, int], list[int]] = {}
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
                # All but the steps, which are one number.
                own = jax.tree.map(lambda x, row=row: x[row] if np.ndim(x) else x, decoded)
                # A search of one's own may not know.
                if own.is_finite is not None and not own.is_finite:
                    raise ValueError(
                        f"{name(i + 1)}: the model's logits were NaN or infinite behind "
                        f"{own.length.max()} new tokens, so nothing can be decoded: check that its "
                        "weights are finite, and that they are of this model"
                    )
                self.stats.tokens += int(own.length.reshape(-1)[0])
                yield i, own

    def tokens(
        self, params: nnx.State, prompts: Sequence[Prompt], keys: Array | None = None
    ) -> list[list[int]]:
        """As a call, but only the ids of the best hypothesis, those of prompt `i` at index `i`."""
        best: list[list[int]] = [[]] * len(prompts)
        for i, decoded in self(params, prompts, keys):
            ids = decoded.tokens.reshape(-1, decoded.tokens.shape[-1])[0]
            best[i] = ids[: int(decoded.length.reshape(-1)[0])].tolist()
        return best

    def _decode(
        self,
        params: nnx.State,
        prompt_BP: np.ndarray,
        lengths_B: np.ndarray,
        keys_B: Array | None,
        limit: int,
    ) -> Decoded:
        """One batch, on the host; compiled apart, so that the clock of decoding excludes it."""
        self._check_params(params)
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

    def _check_params(self, params: nnx.State) -> None:
        """They are the model's: as many, of the same shapes, and floats."""
        given, own_params = jax.tree.leaves(params), jax.tree.leaves_with_path(self._params)
        if len(given) != len(own_params):
            raise ValueError(
                f"params are {len(given)} arrays, but the model has {len(own_params)} weights: "
                "give nnx.state(model)"
            )
        for (path, own), x in zip(own_params, given, strict=True):
            if x.shape != own.shape or not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} must be floats {list(own.shape)}, as in "
                    f"the model, not {x.dtype} {list(x.shape)}"
                )

    def _check(self, name: str, prompt: Prompt) -> None:
        """A prompt is of ids, has at least one, and leaves room for at least one more."""
        try:
            ids = np.asarray(prompt)
        except ValueError:  # Lists within a list.
            ids = np.asarray(None)
        if not ids.size and ids.ndim == 1:
            raise ValueError(f"{name} has no tokens: give one at least")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{name} must be a sequence of integers, the ids, not {prompt!r}")
        if ids.size > self.room:
            raise ValueError(
                f"{name} has {ids.size} tokens, but there is room for {self.room} (the model "
                f"knows {self._max_length} positions): split it, or train a model with a larger "
                "max_length"
            )
        if (wrong := np.flatnonzero((ids < 0) | (ids >= self._vocab_size))).size:
            raise ValueError(
                f"{name} has the id {ids[wrong[0]]} at index {wrong[0]}, but the vocabulary has "
                f"{self._vocab_size} tokens: was it made by another tokenizer?"
            )

    def _keys(self, keys: Array | None, count: int) -> Array | None:
        """A key for each of `count` prompts."""
        if keys is None:
            return None
        keys = typed_keys(keys)
        if keys.shape != (count,):
            raise ValueError(
                f"keys must be one PRNG key a prompt, [{count}], not {list(keys.shape)}: "
                f"jax.random.split(key, {count})"
            )
        return keys

    def _shape(self, length: int) -> tuple[int, int]:
        """Prompt width and new tokens of the batch that a prompt of `length` tokens goes into."""
        width = -(-length // BUCKET) * BUCKET
        limit = width + 50 if self._max_new_tokens is None else self._max_new_tokens
        if self._is_translation:
            return min(width, self._max_length), min(limit, self._max_length)
        width = min(width, self.room)
        return width, min(limit, self._max_length - width)
