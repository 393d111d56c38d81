"""Which prompts are decoded together, and what they must be for that.

Array letters: B batch   P prompt length   F prefix length   T answer length   L max_new_tokens
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mqa_jax.core.checks import check_integer
from mqa_jax.decode.arguments import typed_keys

Prompt = Sequence[int] | np.ndarray

# Prompts are padded to a multiple of this, so that a corpus needs a handful of compilations.
BUCKET = 16


class Batch(NamedTuple):
    """Prompts that are decoded together.

    Attributes:
      indices: of the prompts, at most as many as a batch has rows.
      given: arguments of `generate`, or of `score`: the prompts and what belongs to them, of the
        batch's rows; the last one is repeated in those that are left.
      keys: `[B]`, or None.
      limit: `L`.
    """

    indices: list[int]
    given: dict[str, Any]
    keys: Array | None
    limit: int

    @property
    def shape(self) -> Hashable:
        """What tells its compiled program from others."""
        return tuple(np.shape(x) for x in jax.tree.leaves(self.given)), *self.given, self.limit

    @property
    def rows(self) -> int:
        return np.shape(jax.tree.leaves(self.given)[0])[0]


@dataclasses.dataclass(frozen=True)
class Batcher:
    """Makes batches of prompts of like length, and checks what they are made of.

    Attributes:
      is_translation: whether an answer has positions of its own, or those behind the prompt.
      max_length: positions that the model knows.
      vocab_size: of the model.
      batch_size: rows a batch.
      max_new_tokens: of an answer; None: 50 more than the prompt has.

    Raises:
      ValueError: a number out of range, or a language model with no position left for a prompt.
    """

    is_translation: bool
    max_length: int
    vocab_size: int
    batch_size: int
    max_new_tokens: int | None

    def __post_init__(self) -> None:
        # As plain integers: shapes are told apart by them.
        for name in ("batch_size", "max_new_tokens"):
            if name == "batch_size" or self.max_new_tokens is not None:
                object.__setattr__(self, name, check_integer(name, getattr(self, name)))
        if self.room < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt: the model "
                f"knows {self.max_length} positions"
            )

    @property
    def room(self) -> int:
        """Tokens of the longest prompt that can be decoded behind."""
        if self.is_translation:
            return self.max_length
        return self.max_length - (1 if self.max_new_tokens is None else self.max_new_tokens)

    def to_decode(
        self,
        prompts: Sequence[Prompt],
        keys: Array | None,
        prefixes: Sequence[Prompt] | None,
        name: Callable[[int], str],
    ) -> list[Batch]:
        """Batches to decode behind; arguments and errors as for a call of `Generator`."""
        for number, prompt in enumerate(prompts, start=1):
            self.check(name(number), prompt)
        keys = self.keys(keys, len(prompts))
        if prefixes is not None:
            self._check_prefixes(prompts, prefixes, name)

        def shape(i: int) -> tuple[int, int, int]:
            width, limit = self._shape(len(prompts[i]))
            longest = 0 if prefixes is None else len(prefixes[i])
            beside = _bucket(longest)
            if beside + limit > self.max_length:
                beside = longest  # As in `_shape`.
            return width, min(limit, self.max_length - beside), beside

        batches = []
        for (width, limit, beside), indices in self._grouped(prompts, shape):
            rows = self._filled(indices)
            prompt_BP, lengths_B = _padded([prompts[i] for i in rows], width)
            given: dict[str, Any] = dict(prompt_BP=prompt_BP, lengths_B=lengths_B)
            if beside and prefixes is not None:
                given["prefix"] = _padded([prefixes[i] for i in rows], beside)
            keys_B = None if keys is None else keys[np.array(rows)]
            batches.append(Batch(indices, given, keys_B, limit))
        return batches

    def to_score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Prompt],
        name: Callable[[int], str],
    ) -> list[Batch]:
        """Batches to score answers in; arguments and errors as for `Generator.score`."""
        _check_count("answers", answers, prompts)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
            self.check(name(number), prompt, self.max_length)
            self.check(f"the answer to {name(number)}", answer, self.max_length)
            if not self.is_translation and len(prompt) + len(answer) > self.max_length:
                raise ValueError(
                    f"{name(number)} has {len(prompt)} tokens and its answer {len(answer)}, but "
                    f"the model knows {self.max_length} positions: split it, or train a model "
                    "with a larger max_length"
                )

        def shape(i: int) -> tuple[int, int]:
            width, length = len(prompts[i]), len(answers[i])
            padded = [min(_bucket(x), self.max_length) for x in (width, length)]
            if not self.is_translation and sum(padded) > self.max_length:
                # Near the end of the positions there is no room for padding.
                padded = [width, self.max_length - width]
            return padded[0], padded[1]

        batches = []
        for (width, length), indices in self._grouped(prompts, shape):
            rows = self._filled(indices)
            prompt_BP, lengths_B = _padded([prompts[i] for i in rows], width)
            answer_BT, answer_lengths_B = _padded([answers[i] for i in rows], length)
            given = dict(
                prompt_BP=prompt_BP,
                lengths_B=lengths_B,
                answer_BT=answer_BT,
                answer_lengths_B=answer_lengths_B,
            )
            batches.append(Batch(indices, given, None, length))
        return batches

    def check(self, name: str, prompt: Prompt, room: int | None = None) -> None:
        """Raises ValueError unless a prompt is of ids, has one at least, and there is room."""
        ids = self._checked_ids(name, prompt)
        if not ids.size:
            raise ValueError(f"{name} has no tokens: give one at least")
        room = self.room if room is None else room
        if ids.size > room:
            raise ValueError(
                f"{name} has {ids.size} tokens, but there is room for {room} (the model "
                f"knows {self.max_length} positions): split it, or train a model with a larger "
                "max_length"
            )

    def keys(self, keys: Array | None, count: int) -> Array | None:
        """A key for each of `count` prompts; raises ValueError for as many as there are not."""
        if keys is None:
            return None
        keys = typed_keys(keys)
        if keys.shape != (count,):
            raise ValueError(
                f"keys must be one PRNG key a prompt, [{count}], not {list(keys.shape)}: "
                f"jax.random.split(key, {count})"
            )
        return keys

    def _checked_ids(self, name: str, prompt: Prompt) -> np.ndarray:
        try:
            ids = np.asarray(prompt)
        except ValueError:  # Lists within a list.
            ids = np.asarray(None)
        is_empty = ids.ndim == 1 and not ids.size
        if ids.ndim != 1 or not (is_empty or np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"{name} must be a sequence of integers, the ids, not {prompt!r}")
        if (wrong := np.flatnonzero((ids < 0) | (ids >= self.vocab_size))).size:
            raise ValueError(
                f"{name} has the id {ids[wrong[0]]} at index {wrong[0]}, but the vocabulary has "
                f"{self.vocab_size} tokens: was it made by another tokenizer?"
            )
        return ids

    def _check_prefixes(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Prompt], name: Callable[[int], str]
    ) -> None:
        if not self.is_translation:
            raise ValueError("prefixes are for translations: a language model continues its prompt")
        _check_count("prefixes", prefixes, prompts)
        for number, prefix in enumerate(prefixes, start=1):
            ids = self._checked_ids(f"the prefix of {name(number)}", prefix)
            if ids.size >= self.max_length:
                raise ValueError(
                    f"the prefix of {name(number)} has {ids.size} tokens, but the model knows "
                    f"{self.max_length} positions, one of which is for what follows"
                )

    def _shape(self, length: int) -> tuple[int, int]:
        """Prompt width and new tokens of the batch that a prompt of `length` tokens goes into."""
        width = _bucket(length)
        limit = width + 50 if self.max_new_tokens is None else self.max_new_tokens
        if self.is_translation:
            return min(width, self.max_length), min(limit, self.max_length)
        if self.max_new_tokens is None and width + limit > self.max_length:
            width = length  # Near the last position padding would be at the cost of the answer.
        width = min(width, self.room)
        return width, min(limit, self.max_length - width)

    def _grouped[Shape: Hashable](
        self, prompts: Sequence[Prompt], shape: Callable[[int], Shape]
    ) -> Iterator[tuple[Shape, list[int]]]:
        """Indices of prompts, a batch of them at a time."""
        # Only prompts of one shape share a batch: what is decoded for one depends on no other then.
        by_shape: dict[Shape, list[int]] = {}
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            by_shape.setdefault(shape(i), []).append(i)
        for own, indices in by_shape.items():
            for start in range(0, len(indices), self.batch_size):
                yield own, indices[start : start + self.batch_size]

    def _filled(self, indices: list[int]) -> list[int]:
        return indices + indices[-1:] * (self.batch_size - len(indices))


def _bucket(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _padded(rows: Sequence[Prompt], width: int) -> tuple[np.ndarray, np.ndarray]:
    """`[B, width]` int32, and how many of each row are real."""
    lengths_B = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : lengths_B[i]] = row
    return tokens, lengths_B


def _check_count(name: str, given: Sequence[Any], prompts: Sequence[Prompt]) -> None:
    if len(given) != len(prompts):
        raise ValueError(f"{name} must be one a prompt, {len(prompts)}, not {len(given)}")
