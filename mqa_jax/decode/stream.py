"""A decode in parts: tokens as they come, and the end of a row that only the host can see.

Array letters: B batch   V vocabulary   L max_new_tokens   n steps of a part
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from mqa_jax.core.devices import loop_options
from mqa_jax.decode.batches import Batch
from mqa_jax.decode.prompts import Search, Start, begin, step_of, told
from mqa_jax.decode.search import Decoded


def kinds(*arrays: Any) -> Hashable:
    """What a compiled program hangs on beside the shapes of its arrays: where they are, and of
    what dtype."""
    # Where arrays of the host go.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return tuple((x.dtype, getattr(x, "sharding", here)) for x in jax.tree.leaves(arrays))


class Piece(NamedTuple):
    """Some tokens of an answer.

    Attributes:
      prompt: its index.
      ids: those that follow the pieces before; none perhaps in the last piece.
      is_last: whether it is the last one.
    """

    prompt: int
    ids: list[int]
    is_last: bool


@dataclasses.dataclass(frozen=True)
class Stop:
    """Strings at which an answer ends.

    Attributes:
      strings: any of them, none of which is empty.
      text: from the ids of an answer to its text, such as `Tokenizer.decode`.
    """

    strings: Sequence[str]
    text: Callable[[list[int]], str]

    def __post_init__(self) -> None:
        is_text = isinstance(self.strings, str)
        if is_text or not all(isinstance(x, str) and x for x in self.strings) or not self.strings:
            raise ValueError(f"stop must be strings that are not empty, not {self.strings!r}")

    def length(self, ids: Sequence[int], checked: int = 0) -> int | None:
        """How many ids it takes to complete one of the strings; None: they do not.

        Args:
          checked: so many of the ids are known not to.
        """
        if not self._is_in(ids):
            return None
        counts = range(checked + 1, len(ids) + 1)
        return next((n for n in counts if self._is_in(ids[:n])), len(ids))

    def cut(self, text: str) -> str:
        """What is in front of the first of the strings."""
        return text[: min([text.find(x) for x in self.strings if x in text], default=len(text))]

    def _is_in(self, ids: Sequence[int]) -> bool:
        text = self.text(list(ids))
        return any(x in text for x in self.strings)


class Report(NamedTuple):
    """What the host is told of a part.

    Attributes:
      tokens: `[B, n]` int32, of which the last may lie behind a row's end.
      length: `[B]` int32, all tokens so far.
      is_finite: `[B]` bool.
      steps: `[]` int32, so far.
      token_scores: `[B, n]` float32, where the search was asked for them.
    """

    tokens: Array
    length: Array
    is_finite: Array
    steps: Array
    token_scores: Array | None


def check_parts(search: Search) -> None:
    """Raises ValueError for a search that cannot be taken in parts."""
    if not is_in_parts(search):
        raise ValueError(
            "only greedy and sample, or a search with their arguments begun and steps, can be "
            "streamed: the best hypothesis of a beam search is not known before its end"
        )


def is_in_parts(search: Search) -> bool:
    """Whether a search can be taken in parts."""
    return {"begun", "steps"} <= set(inspect.signature(search).parameters)


class Parts:
    """The programs of a decode in parts of `steps`: the first, and those that go on.

    Args:
      graphdef: of the model.
      search: with all its options but those that differ from batch to batch.
      bos_id: the id that a target sentence begins with.
      steps: `n`.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        search: Search,
        bos_id: int,
        steps: int,
    ):
        def report(decoded: Decoded, before: Array | int) -> Report:
            # The cache, the tokens and all else go on; these are for the host to keep.
            width = decoded.tokens.shape[1]
            pad = ((0, 0), (0, -width % steps))

            def part(x_BL: Array) -> Array:
                return lax.dynamic_slice_in_dim(jnp.pad(x_BL, pad), before, steps, axis=1)

            scores = decoded.token_scores
            return Report(
                part(decoded.tokens),
                decoded.length,
                jnp.asarray(decoded.is_finite),
                decoded.steps,
                None if scores is None else part(scores),
            )

        def go_on(
            params: nnx.State, start: Start, keys_B: Array | None, limit: int, **options: Any
        ) -> Decoded:
            model = nnx.merge(graphdef, params)
            if keys_B is not None:
                options["key"] = keys_B
            return search(
                step_of(model, start),
                start.cache,
                start.last,
                max_new_tokens=limit,
                steps=steps,
                **told(search, start),
                **options,
            )

        @functools.partial(jax.jit, static_argnames="limit")
        def first(
            params: nnx.State, given: dict[str, Any], keys_B: Array | None, *, limit: int
        ) -> tuple[Start, Decoded, Report]:
            start = begin(nnx.merge(graphdef, params), max_new_tokens=limit, bos_id=bos_id, **given)
            decoded = go_on(params, start, keys_B, limit)
            start = dataclasses.replace(start, cache=())
            return start, decoded, report(decoded, 0)

        @functools.partial(jax.jit, donate_argnames="decoded")
        def more(
            params: nnx.State,
            start: Start,
            keys_B: Array | None,
            most_B: np.ndarray,
            decoded: Decoded,
        ) -> tuple[Decoded, Report]:
            before = decoded.steps
            start = dataclasses.replace(start, cache=decoded.cache)
            begun = dataclasses.replace(
                decoded, length=jnp.minimum(decoded.length, most_B), cache=None
            )
            decoded = go_on(params, start, keys_B, decoded.tokens.shape[1], begun=begun)
            return decoded, report(decoded, before)

        self._first, self._more = first, more
        self._steps = steps
        self._compiled: dict[Hashable, tuple[jax.stages.Compiled, jax.stages.Compiled]] = {}

    def compile(self, params: nnx.State, batch: Batch) -> None:
        """Compiles both programs, unless that has been done for these shapes."""
        if (key := (batch.shape, kinds(params, batch.keys))) in self._compiled:
            return
        params = nnx.as_pure(params)
        first = self._first.lower(params, batch.given, batch.keys, limit=batch.limit)
        options = loop_options(params, batch.rows)
        compiled = first.compile(options)
        start, decoded, _ = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            first.out_info,
            compiled.output_shardings,
        )
        most_B = jax.ShapeDtypeStruct(decoded.length.shape, jnp.int32)
        more = self._more.lower(params, start, batch.keys, most_B, decoded)
        self._compiled[key] = compiled, more.compile(options)

    def __call__(
        self, params: nnx.State, batch: Batch, most_B: np.ndarray
    ) -> Iterator[tuple[Report, bool]]:
        """Reports of the parts, on the host, each while the next is being decoded; and whether it
        is the last.

        Args:
          most_B: `[B]` int32, the greatest length that each row may have; the caller lowers one
            where it knows of an end, and the part behind the next is without that row.
        """
        first, more = self._compiled[batch.shape, kinds(params, batch.keys)]
        # Variables are taken apart in Python at every call, which would cost a millisecond.
        params = nnx.as_pure(params)
        start, decoded, report = first(params, batch.given, batch.keys)
        steps, is_over = 0, False
        while not is_over:
            # A copy: the host may lower a number while the device still reads it.
            decoded, coming = more(params, start, batch.keys, most_B.copy(), decoded)
            known: Report = jax.device_get(report)
            # Fewer steps than it might have made: all rows have ended.
            is_over = int(known.steps) < steps + self._steps or int(known.steps) == batch.limit
            steps, report = int(known.steps), coming
            yield known, is_over
