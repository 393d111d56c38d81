"""A corpus of prompts to answers, in batches of like length.

Array letters: B batch   T answer length   L max_new_tokens
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
from jax.sharding import NamedSharding

from mqa_jax.core.checks import check_integer
from mqa_jax.core.devices import loop_options
from mqa_jax.core.quantized import LARGEST, narrowed
from mqa_jax.core.sharding import by_rows
from mqa_jax.decode.arguments import check_token, keys_of
from mqa_jax.decode.batches import Batch, Batcher, Prompt
from mqa_jax.decode.prompts import Search, generate, score
from mqa_jax.decode.search import Decoded
from mqa_jax.decode.stream import Parts, Piece, Report, Stop, check_parts, is_in_parts, kinds
from mqa_jax.model.transformer import EncoderDecoder, Model

# Steps between two looks at the text of answers, for strings that end them.
STOP_STEPS = 8


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
        `key` bound to it by `functools.partial`: rules and `token_scores` too.
      batch_size: rows a batch, at least 1; the last one is filled up.
      bos_id: the id that a target sentence begins with.
      max_new_tokens: at least 1; None: 50 more than the prompt's length (as in the paper's code
        base). Never more than the model has positions for.
      stop: strings that end an answer as its end-of-sentence does. Its tokens go up to the one that
        completes the string; what `Decoded` holds behind `length` is of no meaning then. Greedy
        decoding and sampling are over when all rows are, beam search is cut short behind its end.
      rows: how the rows of a batch are split over devices, on all of which the weights must be; for
        whole answers, not for streams and `stop`. As jax places them when None.

    Attributes:
      stats: what has been decoded, and how long it took.

    Raises:
      ValueError: a number out of range, `bos_id` outside the vocabulary, a language model with no
        position left for a prompt, a `search` that is none, or has an argument bound to it that the
        generator gives, or a number for each row; or what is no `model` or no `stop`.
    """

    def __init__(
        self,
        model: Model,
        *,
        search: Search,
        batch_size: int,
        bos_id: int,
        max_new_tokens: int | None = None,
        stop: Stop | None = None,
        rows: NamedSharding | None = None,
    ):
        if not isinstance(model, nnx.Module):
            raise ValueError(
                "model must be an EncoderDecoder or a DecoderOnly, such as hub.load(...).model, "
                f"not a {type(model).__name__}"
            )
        if stop is not None and not isinstance(stop, Stop):
            raise ValueError(f"stop must be Stop(strings, tokenizer.decode), not {stop!r}")
        if rows is not None and stop is not None:
            raise ValueError(
                "strings that end an answer are for rows on one device: leave out rows"
            )
        self._rows = rows
        self._takes_keys, self._needs_keys = keys_of(search)
        check_token("bos_id", bos_id, model.config.vocab_size)
        self._batcher = Batcher(
            isinstance(model, EncoderDecoder),
            model.config.max_length,
            model.config.vocab_size,
            batch_size,
            max_new_tokens,
        )
        self._bos_id, self._search, self._stop = bos_id, search, stop
        graphdef, params = nnx.split(model)
        self._graphdef = graphdef
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        dtype = jnp.dtype(model.config.dtype)

        def cast(params: nnx.State) -> nnx.State:
            # Once, before the loop: else every step would read the weights in the wider dtype.
            return narrowed(params, dtype)

        @functools.partial(jax.jit, static_argnames="limit")
        def run(
            params: nnx.State, given: dict[str, Any], keys_B: Array | None, limit: int
        ) -> Decoded:
            def decode(params: nnx.State, given: dict[str, Any], keys_B: Array | None) -> Decoded:
                options: dict[str, Any] = {} if keys_B is None else {"key": keys_B}
                decoded = generate(
                    nnx.merge(graphdef, cast(params)),
                    **given,
                    search=search,
                    max_new_tokens=limit,
                    bos_id=bos_id,
                    **options,
                )
                # The steps as an array, since parts of a batch end by themselves.
                return dataclasses.replace(decoded, cache=None, steps=decoded.steps[None])

            decoded = by_rows(decode, rows)(params, given, keys_B)
            return dataclasses.replace(decoded, steps=decoded.steps.max())

        @jax.jit
        def run_score(params: nnx.State, given: dict[str, Any]) -> Array:
            def score_rows(params: nnx.State, given: dict[str, Any], _: None) -> Array:
                return score(nnx.merge(graphdef, cast(params)), **given, bos_id=bos_id)

            return by_rows(score_rows, rows)(params, given, None)

        self._run, self._run_score, self._cast = run, run_score, jax.jit(cast)
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._parts: dict[int, Parts] = {}
        self.stats = DecodeStats()

    @property
    def room(self) -> int:
        """Tokens of the longest prompt that can be decoded behind."""
        return self._batcher.room

    def __call__(
        self,
        params: nnx.State,
        prompts: Sequence[Prompt],
        keys: Array | None = None,
        *,
        prefixes: Sequence[Prompt] | None = None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> Iterator[tuple[int, Decoded]]:
        """Decodes behind `prompts`; none is cut short.

        Args:
          params: the model's weights, `nnx.state(model)`.
          prompts: ids of what to translate, or to continue; a language model's begin with `bos_id`.
          keys: for `sample`: `[len(prompts)]` PRNG keys; what a prompt draws depends on its own
            alone.
          prefixes: for translations, the ids that each answer begins with, none perhaps, without an
            end; what is decoded is what follows them.
          name: what errors call a prompt, from its number, which counts from 1.

        Yields:
          the index of a prompt, and what was decoded for it, without the batch axis; not in order.

        Raises:
          ValueError: a prompt without tokens, of more than the model has positions for, or with an
            id outside the vocabulary, a prefix likewise; as many keys or prefixes as there are not
            prompts; a search that draws without keys, or one that does not with some. Nothing has
            been decoded then. While decoding: weights of another model; or the model gave logits
            that are no numbers for a prompt, whose answer is not given then.
        """
        self._check_keys(keys)
        batches = self._batcher.to_decode(prompts, keys, prefixes, name)
        return self._answers(params, batches, name)

    def _answers(
        self, params: nnx.State, batches: Sequence[Batch], name: Callable[[int], str]
    ) -> Iterator[tuple[int, Decoded]]:
        for batch in batches:
            if self._stop is not None and is_in_parts(self._search):
                decoded = self._decode_until_stop(params, batch)
            else:
                decoded = self._decode(params, batch)
            self.stats.rows += int(decoded.steps) * len(batch.indices)
            for row, i in enumerate(batch.indices):
                # All but the steps, which are one number.
                own = jax.tree.map(lambda x, row=row: x[row] if np.ndim(x) else x, decoded)
                # A search of one's own may not know. Of a beam search all hypotheses may have died.
                is_failed = own.is_finite is not None and not own.is_finite
                if is_failed or (own.score is not None and np.max(own.score) == -np.inf):
                    raise _no_answer(name(i + 1), own.length.max())
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

    def stream(
        self,
        params: nnx.State,
        prompts: Sequence[Prompt],
        keys: Array | None = None,
        *,
        every: int = 8,
        prefixes: Sequence[Prompt] | None = None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> Iterator[Piece]:
        """As a call, but with the tokens as they come; for greedy decoding and sampling.

        Args:
          every: how many steps the device makes before it tells of them, at least 1.
          Others: as for a call.

        Yields:
          the pieces of each answer in their order, those of a batch between each other.

        Raises:
          ValueError: another search, `every` below 1, and as a call.
        """
        check_parts(self._search)
        every = check_integer("every", every, most=2**31 - 1)
        self._check_keys(keys)
        batches = self._batcher.to_decode(prompts, keys, prefixes, name)
        return self._pieces(params, batches, every, name)

    def _pieces(
        self,
        params: nnx.State,
        batches: Sequence[Batch],
        every: int,
        name: Callable[[int], str],
    ) -> Iterator[Piece]:
        for batch in batches:
            before, is_done_B = 0, np.zeros(self._batcher.batch_size, bool)
            for report, length_B, is_over_B in self._reports(params, batch, every):
                self.stats.rows += (int(report.steps) - before) * len(batch.indices)
                for row, i in enumerate(batch.indices):
                    if is_done_B[row]:
                        continue
                    if not report.is_finite[row]:
                        raise _no_answer(name(i + 1), length_B[row])
                    ids = report.tokens[row, : length_B[row] - before].tolist()
                    self.stats.tokens += len(ids)
                    if ids or is_over_B[row]:
                        yield Piece(i, ids, bool(is_over_B[row]))
                before, is_done_B = int(report.steps), is_over_B

    def _decode_until_stop(self, params: nnx.State, batch: Batch) -> Decoded:
        """One batch, on the host."""
        told = list(self._reports(params, batch, STOP_STEPS))
        reports, last = [report for report, _, _ in told], told[-1][0]
        length_B: Any = told[-1][1]

        def joined(parts: Sequence[Any]) -> Any:
            parts_BL = np.concatenate(parts, axis=1)[:, : batch.limit]
            return np.pad(parts_BL, ((0, 0), (0, batch.limit - parts_BL.shape[1])))

        scores_BL = None
        if last.token_scores is not None:
            scores_BL = joined([report.token_scores for report in reports])
        return Decoded(
            joined([report.tokens for report in reports]),
            length_B,
            last.steps,
            is_finite=last.is_finite,
            token_scores=scores_BL,
        )

    def _reports(
        self, params: nnx.State, batch: Batch, every: int
    ) -> Iterator[tuple[Report, np.ndarray, np.ndarray]]:
        """Of each part: what the device tells, and `[B]` each, lengths so far, and which are over.

        Rows end at strings, too, and those that only fill up the batch at once.
        """
        self._check_params(params)
        if self._rows is not None:
            raise ValueError("streams are for rows on one device: leave out rows")
        if every not in self._parts:
            self._parts[every] = Parts(self._graphdef, self._search, self._bos_id, every)
        parts, start = self._parts[every], time.perf_counter()
        params = jax.tree.map(jnp.asarray, params)  # Once: a part is no time to send weights in.
        wanted = jax.tree.leaves(jax.eval_shape(self._cast, params))
        if any(x.dtype != y.dtype for x, y in zip(jax.tree.leaves(params), wanted, strict=True)):
            params = self._cast(params)
        parts.compile(params, batch)
        now = time.perf_counter()
        self.stats.compile_seconds += now - start
        most_B = np.zeros(self._batcher.batch_size, np.int32)
        most_B[: len(batch.indices)] = batch.limit
        tokens_BL, before = np.zeros((self._batcher.batch_size, 0), np.int32), 0
        for report, is_last in parts(params, batch, most_B):
            self.stats.decode_seconds += time.perf_counter() - now
            self.stats.steps += int(report.steps) - before
            if self._stop is not None:
                tokens_BL = np.concatenate([tokens_BL, report.tokens], axis=1)
                for row in range(len(batch.indices)):
                    ids = tokens_BL[row, : min(report.length[row], most_B[row])].tolist()
                    length = self._stop.length(ids, before) if len(ids) > before else None
                    if length is not None:
                        most_B[row] = length
            is_over_B = (np.minimum(report.length, most_B) < report.steps) | is_last
            # One that is complete with the last token of the part.
            is_stopped_B = (most_B < batch.limit) & (report.length >= most_B)
            is_over_B |= is_stopped_B
            # What the model made of its own text behind a string that ends it, nobody sees.
            report = report._replace(is_finite=report.is_finite | is_stopped_B)
            yield report, np.minimum(report.length, most_B), is_over_B
            if is_over_B.all():
                return
            before, now = int(report.steps), time.perf_counter()

    def score(
        self,
        params: nnx.State,
        prompts: Sequence[Prompt],
        answers: Sequence[Prompt],
        *,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What the model makes of given answers.

        Args:
          params: the model's weights, `nnx.state(model)`.
          prompts: as for a call.
          answers: the ids of an answer to each, with its end if that is to be scored too.
          name: as for a call.

        Yields:
          the index of a prompt, and the log-probability of every id of its answer, float32; not
          in order.

        Raises:
          ValueError: as a call, of prompts or of answers; a language model that has no room for
            both; logits that are no numbers.
        """
        batches = self._batcher.to_score(prompts, answers, name)
        return self._scores(params, batches, name)

    def _scores(
        self, params: nnx.State, batches: Sequence[Batch], name: Callable[[int], str]
    ) -> Iterator[tuple[int, np.ndarray]]:
        for batch in batches:
            score_BT = self._call(self._run_score, params, batch)
            for row, i in enumerate(batch.indices):
                own = score_BT[row, : batch.given["answer_lengths_B"][row]]
                if np.isnan(own).any():
                    raise _no_answer(name(i + 1), int(np.isnan(own).argmax()))
                yield i, own

    def _decode(self, params: nnx.State, batch: Batch) -> Decoded:
        """One batch, on the host."""
        options = dict(keys_B=batch.keys, limit=batch.limit)
        decoded = self._call(self._run, params, batch, **options)
        self.stats.steps += int(decoded.steps)
        if self._stop is None:
            return decoded
        tokens = decoded.tokens.reshape(-1, batch.limit)
        lengths = [
            self._stop.length(ids[:length].tolist()) or length
            for ids, length in zip(tokens, decoded.length.reshape(-1), strict=True)
        ]
        return dataclasses.replace(
            decoded, length=np.array(lengths, np.int32).reshape(decoded.length.shape)
        )

    def _call(self, run: Any, params: nnx.State, batch: Batch, **options: Any) -> Any:
        """What a program gives, on the host; compiled apart, so that its time is told apart."""
        self._check_params(params)
        key = (run, batch.shape, kinds(params, batch.keys))
        start = time.perf_counter()
        given = batch.given if self._rows is None else jax.device_put(batch.given, self._rows)
        if key not in self._compiled:
            lowered = run.lower(params, given, **options)
            self._compiled[key] = lowered.compile(loop_options(params, batch.rows))
        options.pop("limit", None)
        compiled = time.perf_counter()
        result = jax.device_get(self._compiled[key](params, given, **options))
        self.stats.compile_seconds += compiled - start
        self.stats.decode_seconds += time.perf_counter() - compiled
        return result

    def _check_keys(self, keys: Array | None) -> None:
        if keys is None and self._needs_keys:
            raise ValueError(
                "this search draws, and needs keys, one for each prompt: "
                "jax.random.split(jax.random.key(0), len(prompts))"
            )
        if keys is not None and not self._takes_keys:
            raise ValueError("keys are for a search that draws, such as sample: leave them out")

    def _check_params(self, params: nnx.State) -> None:
        """They are the model's: as many, of the same shapes, floats or of eight bits as there."""
        if isinstance(params, nnx.Module):
            raise ValueError(
                f"params are the weights, nnx.state(model), not a {type(params).__name__}"
            )
        given, own_params = jax.tree.leaves(params), jax.tree.leaves_with_path(self._params)
        if len(given) != len(own_params):
            raise ValueError(
                f"params are {len(given)} arrays, but the model has {len(own_params)} weights: "
                "give nnx.state(model)"
            )
        for (path, own), x in zip(own_params, given, strict=True):
            is_of_eight_bits = own.dtype in LARGEST
            is_fit = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype not in LARGEST
            if x.shape != own.shape or (x.dtype != own.dtype if is_of_eight_bits else not is_fit):
                kind = own.dtype if is_of_eight_bits else "floats"
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} must be {kind} {list(own.shape)}, as in "
                    f"the model, not {x.dtype} {list(x.shape)}"
                )


def _no_answer(name: str, length: int) -> ValueError:
    return ValueError(
        f"{name}: the model's logits were NaN or infinite behind {length} new tokens, or no token "
        "was left by the rules, so nothing can be decoded: check that its weights are finite, that "
        "they are of this model, and what is forbidden"
    )
