"""From lines of text to lines of text."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax import Array

from mqa_jax.decode.generate import DecodeStats, Generator
from mqa_jax.decode.search import Decoded
from mqa_jax.decode.stream import Stop
from mqa_jax.model.transformer import Model

# What may be done about a line that the model has no room for.
ON_LONG = ("error", "skip", "cut", "split")

# Lines are decoded so many batches at a time: enough that batches of lines of like length are full,
# and so few that outputs come early and are not held in memory.
WINDOW = 64

# Where a line may be split, the best first: between sentences, between words.
BOUNDARIES = (
    re.compile(r"(?<=[.!?…])\s+(?=\S)|(?<=[。！？])\s*(?=\S)"),
    re.compile(r"(?<=\S)\s+(?=\S)"),
)


class Tokenizer(Protocol):
    """What this file asks of a tokenizer; `mqa_jax.data.tokenizer.Tokenizer` is one, and those of
    `mqa_jax.hub.tokenizer` are.

    The ids of a text begin with `begin_ids` and end with `end_ids`, which `decode` leaves out.
    `encode_target` is of the texts that a translation gives, which may be in another language.
    """

    @property
    def begin_ids(self) -> tuple[int, ...]: ...

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_target(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass
class LineStats(DecodeStats):
    """What a `LineDecoder` has done so far; lines are counted from 1.

    Attributes:
      blank: lines that were blank.
      too_long: lines that there was no room for.
      unended: lines whose output, or a part of it, reached the limit of tokens before its end.
    """

    blank: set[int] = dataclasses.field(default_factory=set)
    too_long: set[int] = dataclasses.field(default_factory=set)
    unended: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is decoded in one go: a line, or a part of one.

    Attributes:
      place: number of the line, from 1, and of the part in it, from 0.
      glue: what joins its output to that of the part before.
      ids: the prompt.
    """

    place: tuple[int, int]
    glue: str
    ids: np.ndarray


class LineDecoder(Generator):
    """A `Generator` from lines of text; `tokenizer` turns them into ids, all else is the same.

    Args:
      stop: strings that end an output, which they are not part of.
      has_bos: whether a language model's prompts begin with `bos_id`, in front of what the
        tokenizer puts there.
      eos_ids: what ends an output, as the search was told; the tokenizer's `end_ids` when None.

    Attributes:
      stats: a `LineStats`.
    """

    stats: LineStats

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        has_bos: bool = True,
        eos_ids: Sequence[int] | None = None,
        **options: Any,
    ):
        stops = Stop(stop, tokenizer.decode) if stop else None
        super().__init__(model, stop=stops, **options)
        self._tokenizer = tokenizer
        self._begin = [self._bos_id] * (has_bos and not self._batcher.is_translation)
        self._eos_ids = tuple(tokenizer.end_ids if eos_ids is None else eos_ids)
        self.stats = LineStats()

    def __call__(  # type: ignore[override]  # Its prompts are lines: for that it is here.
        self,
        params: nnx.State,
        lines: Sequence[str],
        keys: Array | None = None,
        *,
        name: Callable[[int], str] = "line {}".format,
    ) -> Iterator[tuple[int, Decoded]]:
        """As `Generator`, of lines, a blank one too; an error counts them from 1."""
        return super().__call__(params, [self._prompt(line) for line in lines], keys, name=name)

    def score(  # type: ignore[override]  # As above.
        self,
        params: nnx.State,
        lines: Sequence[str],
        answers: Sequence[str],
        *,
        name: Callable[[int], str] = "line {}".format,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As `Generator`, of lines and the texts that answer them, each with its end."""
        prompts = [self._prompt(line) for line in lines]
        ids = [self._tokenizer.encode_target(answer) for answer in answers]
        if not self._batcher.is_translation and len(answers) == len(lines):
            for i, (line, answer) in enumerate(zip(lines, answers, strict=True)):
                # By itself it would be encoded as what begins a text.
                whole = [*self._begin, *self._tokenizer.encode(line + answer)]
                if whole[: len(prompts[i])] == prompts[i]:
                    ids[i] = whole[len(prompts[i]) :]
                else:
                    ids[i] = ids[i][len(self._tokenizer.begin_ids) :]
        if not self._ends:
            # Of a tokenizer that ends no text: the end is the model's alone.
            ids = [[*answer, *self._eos_ids[:1]] for answer in ids]
        return super().score(params, prompts, ids, name=name)

    def texts(
        self,
        params: nnx.State,
        lines: Sequence[str],
        keys: Array | None = None,
        *,
        on_long: str = "error",
    ) -> Iterator[str]:
        """What is decoded for each line, as one line of text, in their order.

        An output comes as soon as it and those before it are done. Where the model spells a line
        break, of whatever kind, it has a space. A blank line has a blank output. The output of a
        language model is what follows the line, a space in front included.

        Args:
          params: the model's weights, `nnx.state(model)`.
          lines: of text.
          keys: as for `Generator`.
          on_long: what to do about a line without room: "error"; "skip", its output is blank;
            "cut" it to what there is room for, a translation's beginning, a language model's end;
            "split" it, translations only, at sentences, or words, and join the outputs.

        Raises:
          ValueError: a line has no room and `on_long` is "error"; as many keys as there are not
            lines. Nothing has been decoded then. And as a call does while decoding.
        """
        if on_long not in ON_LONG:
            raise ValueError(f"on_long {on_long!r} is not one of {', '.join(ON_LONG)}")
        if on_long == "split" and not self._batcher.is_translation:
            raise ValueError(
                "--on_long=split is for translations: a language model continues one text, not "
                "parts of it; --on_long=cut keeps its end"
            )
        parts = [self._line_parts(i, line, on_long) for i, line in enumerate(lines, start=1)]
        outputs = self._outputs(params, parts, self._batcher.keys(keys, len(lines)), 1)
        return (
            "".join(part.glue * bool(best) + best for part, ((best, _), *_) in answered)
            for answered in outputs
        )

    def n_best(
        self, params: nnx.State, lines: Sequence[str], *, on_long: str = "error"
    ) -> Iterator[list[tuple[str, float]]]:
        """All hypotheses of a beam search for each line, best first, and their scores.

        Arguments and errors are those of `texts`; lines are not split, since parts have n-best
        outputs of their own. A blank line has none, and each has as many as there are.
        """
        if on_long not in ON_LONG or on_long == "split":
            raise ValueError(f"on_long {on_long!r} is not one of error, skip, cut")
        parts = [self._line_parts(i, line, on_long) for i, line in enumerate(lines, start=1)]
        return (
            [output for _, outputs in answered for output in outputs]
            for answered in self._outputs(params, parts, None, None)
        )

    def _outputs(
        self,
        params: nnx.State,
        lines: Sequence[Sequence[_Part]],
        keys: Array | None,
        count: int | None,
    ) -> Iterator[list[tuple[_Part, list[tuple[str, float]]]]]:
        """For each line its parts, and what `_decoded` has for each of them."""
        start = 0
        while start < len(lines):
            window, stop = list[_Part](), start
            while stop < len(lines) and len(window) < WINDOW * self._batcher.batch_size:
                window += lines[stop]
                stop += 1
            results, done = self._decoded(params, window, keys, count), dict[tuple[int, int], Any]()
            for parts in lines[start:stop]:
                while not all(part.place in done for part in parts):
                    part, outputs = next(results)
                    done[part.place] = outputs
                yield [(part, done.pop(part.place)) for part in parts]
            start = stop

    def _decoded(
        self,
        params: nnx.State,
        parts: Sequence[_Part],
        keys: Array | None,
        count: int | None,
    ) -> Iterator[tuple[_Part, list[tuple[str, float]]]]:
        """Parts and their outputs with scores, the `count` best or all, in the order in which they
        are done."""
        if keys is not None and parts:
            lines, numbers = np.array([part.place for part in parts]).T
            keys = keys[lines - 1]
            if (others := np.flatnonzero(numbers)).size:
                own = jax.vmap(jax.random.fold_in)(keys[others], numbers[others])
                keys = keys.at[others].set(own)
        results = super().__call__(
            params,
            [part.ids for part in parts],
            keys,
            name=lambda number: f"line {parts[number - 1].place[0]}",
        )
        for i, decoded in results:
            part = parts[i]
            tokens_bL = decoded.tokens.reshape(-1, decoded.tokens.shape[-1])[:count]
            lengths_b = decoded.length.reshape(-1)[:count]
            scores_b: Any = (
                np.zeros(len(lengths_b)) if decoded.score is None else decoded.score[:count]
            )
            outputs = list[tuple[str, float]]()
            for ids_L, length, score in zip(tokens_bL, lengths_b, scores_b, strict=True):
                # The best is an answer all the same; others there may be fewer of than of beams.
                if not outputs or score > -np.inf:
                    ids = ids_L[: int(length)].tolist()
                    outputs.append((self._output(part, ids, not outputs), float(score)))
            yield part, outputs

    def _output(self, part: _Part, ids: list[int], is_best: bool) -> str:
        """As one line."""
        # Not all tokenizers leave it out.
        ended = next((i for i, id in enumerate(ids) if id in self._eos_ids), len(ids))
        text = self._text(part, ids[:ended])
        is_stopped = False
        if self._stop is not None:
            is_stopped = self._stop.length(ids) is not None
            text = self._stop.cut(text)
        if is_best and ended == len(ids) and not is_stopped:
            self.stats.unended.add(part.place[0])
        return " ".join(text.splitlines())

    def _text(self, part: _Part, ids: list[int]) -> str:
        if self._batcher.is_translation:
            return self._tokenizer.decode(ids)
        # Decoded by themselves, they would lose the space in front.
        prompt = part.ids.tolist()
        return self._tokenizer.decode(prompt + ids)[len(self._tokenizer.decode(prompt)) :]

    def _prompt(self, line: str) -> list[int]:
        ids = [*self._begin, *self._tokenizer.encode(line)]
        # A sentence to be continued begins, and does not end.
        return ids if self._batcher.is_translation else ids[: len(ids) - self._ends]

    @property
    def _ends(self) -> int:
        return len(self._tokenizer.end_ids)

    def _line_parts(self, number: int, line: str, on_long: str) -> list[_Part]:
        """What to decode for a line, nothing perhaps."""
        if not line.strip():
            self.stats.blank.add(number)
            return []
        ids = self._prompt(line)
        if len(ids) <= self.room:
            pieces = [("", ids)]
        else:
            self.stats.too_long.add(number)
            if on_long == "skip":
                return []
            if on_long == "error" or self.room < 1:
                raise ValueError(
                    f"line {number} has {len(ids)} tokens, but there is room for {self.room} (the "
                    f"model knows {self._batcher.max_length} positions): shorten it, choose "
                    "--on_long=skip, cut or split, or train a model with a larger max_length"
                )
            split = on_long == "split"
            pieces = self._split(number, line.strip()) if split else [("", self._cut(ids))]
        for _, ids in pieces:
            self._batcher.check(f"line {number}", ids)
        return [
            _Part((number, i), glue, np.array(ids, np.int32))
            for i, (glue, ids) in enumerate(pieces)
        ]

    def _cut(self, ids: list[int]) -> list[int]:
        if self._batcher.is_translation:
            return [*ids[: self.room - self._ends], *ids[len(ids) - self._ends :]]
        begins = len(self._begin) + len(self._tokenizer.begin_ids)
        return [*ids[:begins], *ids[len(ids) - self.room + begins :]]

    def _split(self, number: int, text: str) -> list[tuple[str, list[int]]]:
        """Ids of parts of a text that there is room for, each behind what joins it to the last."""
        ids = self._prompt(text)
        if len(ids) <= self.room:
            return [("", ids)]
        if len(text) == 1:
            raise ValueError(
                f"line {number} holds {text!r}, which takes {len(ids)} tokens, but there is room "
                f"for {self.room}"
            )
        end = start = len(text) // 2
        for boundary in BOUNDARIES:
            # As near to the middle as can be.
            places = (match.span() for match in boundary.finditer(text))
            if place := min(places, key=lambda span: abs(sum(span) - len(text)), default=None):
                end, start = place
                break
        left, right = self._split(number, text[:end]), self._split(number, text[start:])
        return [*left, (" " * (start > end), right[0][1]), *right[1:]]
