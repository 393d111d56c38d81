"""Rules on logits for all searches: what may not be repeated, must not or has to be said.

    greedy(..., rules=[RepetitionPenalty(1.3), NoRepeatNgram(3), MinNewTokens(5, eos_id=2)])

They are asked in their order, each on what the one before it left. Numbers may be traced by
`jax.jit`, and where a rule says so one for all or `[B]`, one a row. What each of them computes is
what the rule of that name in Hugging Face's transformers does, whose order is: penalties, what is
forbidden, `MinNewTokens`, what is forced, `Temperature`, `TopK`, `TopP`, `MinP`, `Normalize`.
`sample` has its own arguments for the four last but one, and puts them behind all rules.

Array letters: B batch   V vocabulary   R rows, B or B times beam   H history   n length of a phrase
F phrases
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mqa_jax.core.checks import check_integer
from mqa_jax.decode.arguments import EndIds, check_token, end_ids, known_values, per_row
from mqa_jax.decode.history import History
from mqa_jax.decode.logits import keep_above, keep_probable

# What float32 can divide by.
_SMALLEST = 1e-37

_rule = jax.tree_util.register_dataclass


@_rule
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens of the history, prompt included, are less likely (Keskar et al. 2019, section 4.1).

    Attributes:
      penalty: a logit above 0 is divided by it, another is multiplied with it: above 1 for less
        repetition, below 1 for more. One for all or `[B]`.
    """

    penalty: ArrayLike

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless the penalty is above 0."""
        per_row("RepetitionPenalty", self.penalty, (batch,), above=0)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        penalty = _column(self.penalty, logits_RV, above=0)
        is_said_RV = _occurs(history.tokens, history.is_token, logits_RV)
        penalized_RV = jnp.where(logits_RV < 0, logits_RV * penalty, logits_RV / penalty)
        return jnp.where(is_said_RV, penalized_RV, logits_RV)


@_rule
@dataclasses.dataclass(frozen=True)
class PresencePenalty:
    """Tokens that were decoded, not those of the prompt, have their logits lowered.

    Attributes:
      penalty: by how much, once for every such token; below 0 for more repetition. One for all or
        `[B]`.
    """

    penalty: ArrayLike

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless the penalty is a number."""
        per_row("PresencePenalty", self.penalty, (batch,))

    def __call__(self, logits_RV: Array, history: History) -> Array:
        penalty = _column(self.penalty, logits_RV)
        is_said_RV = _occurs(history.tokens, history.is_new, logits_RV)
        return jnp.where(is_said_RV, logits_RV - penalty, logits_RV)


@_rule
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
    """No `size` tokens in a row that the history, prompt included, has already.

    Attributes:
      size: at least 1, which is: no token twice.
    """

    size: int = dataclasses.field(metadata=dict(static=True))

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless the size is an integer, at least 1."""
        check_integer("NoRepeatNgram", self.size)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        size, width = int(self.size), history.tokens.shape[1]
        if width < size:
            return logits_RV
        last_Rn = history.last(size - 1)
        starts = width - size + 1
        # For every phrase of the history, whether it began like the one to come.
        repeats_RH = history.is_token[:, :starts] & history.is_token[:, size - 1 :]
        for i in range(size - 1):
            repeats_RH &= history.tokens[:, i : i + starts] == last_Rn[:, i : i + 1]
        return _forbid(_occurs(history.tokens[:, size - 1 :], repeats_RH, logits_RV), logits_RV)


@_rule
@dataclasses.dataclass(frozen=True)
class Forbid:
    """Tokens that are never chosen, and phrases that are never completed.

    Attributes:
      phrases: ids, each of them or a sequence of them: `Forbid([3, (7, 8)])` forbids 3, and 8
        where the token before it is 7, in the prompt perhaps.
    """

    phrases: Sequence[int | Sequence[int]] = dataclasses.field(metadata=dict(static=True))

    def __post_init__(self) -> None:
        # What `jax.jit` compares programs by must be hashable. What is no id is told by `check`.
        phrases: Any = self.phrases
        if isinstance(phrases, Sequence | np.ndarray) and not isinstance(phrases, str):
            own = tuple(
                tuple(x) if isinstance(x, list | np.ndarray) and np.ndim(x) else x for x in phrases
            )
            object.__setattr__(self, "phrases", own)

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError for no phrases, one without tokens, or ids of no token."""
        if not isinstance(self.phrases, tuple) or not self.phrases:
            raise ValueError(f"Forbid needs ids, or sequences of them, not {self.phrases!r}")
        for phrase in self.phrases:
            ids = phrase if isinstance(phrase, tuple) else (phrase,)
            if not ids:
                raise ValueError("Forbid: a phrase has a token at least, not ()")
            for id in ids:
                check_token("Forbid", id, vocab_size)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        phrases = [[*p] if isinstance(p, tuple) else [p] for p in self.phrases]
        before = max(map(len, phrases)) - 1
        # -1: any token, or none, will do.
        starts_Fn = np.array([[-1] * (before + 1 - len(p)) + p[:-1] for p in phrases], np.int32)
        lasts_F = np.array([p[-1] for p in phrases], np.int32)
        last_R1n = history.last(before)[:, None]
        starts_1Fn = starts_Fn.reshape(1, len(phrases), before)
        begun_RF = jnp.all((last_R1n == starts_1Fn) | (starts_1Fn == -1), axis=-1)
        lasts_RF = jnp.broadcast_to(lasts_F[None], begun_RF.shape)
        return _forbid(_occurs(lasts_RF, begun_RF, logits_RV), logits_RV)


def only_text(tokens: int, vocab_size: int, ends: Iterable[int] = ()) -> tuple[Forbid, ...]:
    """What forbids the ids that a tokenizer of so many tokens has no text for: a model's tables may
    be larger. Nothing where they are not, nor ids that end a text, which need none."""
    forbidden = set(range(tokens, vocab_size)) - set(ends)
    return (Forbid(sorted(forbidden)),) if forbidden else ()


@_rule
@dataclasses.dataclass(frozen=True)
class MinNewTokens:
    """A row does not end before it has so many new tokens, its end not counted.

    Attributes:
      count: at least 0; one for all or `[B]`.
      eos_id: what ends a row, as the search is told.
    """

    count: ArrayLike
    eos_id: EndIds

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError for a count that is no integer, or ids of no token."""
        if np.shape(self.count) not in ((), (batch,)):
            raise ValueError(
                f"MinNewTokens must be one number, or one a row, [{batch}]: not "
                f"{list(np.shape(self.count))} of them"
            )
        for count in known_values(self.count):
            check_integer("MinNewTokens", count, least=0, most=2**31 - 1)
        end_ids(self.eos_id, vocab_size)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        count = _rows(jnp.asarray(self.count), logits_RV)
        is_end_V = _is_one_of(end_ids(self.eos_id, logits_RV.shape[1]), logits_RV)
        return _forbid(is_end_V & (history.step < count), logits_RV)


@_rule
@dataclasses.dataclass(frozen=True)
class ForceFirst:
    """The first token of a translation is given: the language of some multilingual models.

    It is forced where the history is one token, that which a target begins with, and so neither
    behind a prompt nor behind a prefix. Its log-probability is 0.

    Attributes:
      token: its id.
    """

    token: int | Array

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless it is an id of the vocabulary."""
        check_token("ForceFirst", self.token, vocab_size)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        is_first_R1 = (history.end - history.start == 1)[:, None]
        return _force(jnp.asarray(self.token), is_first_R1, logits_RV)


@_rule
@dataclasses.dataclass(frozen=True)
class ForceLast:
    """The last token that there can be is an end, so that every answer ends; log-probability 0.

    Attributes:
      tokens: the id, or several, each of which may be chosen.
    """

    tokens: EndIds

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless they are ids of the vocabulary."""
        if self.tokens is None:
            raise ValueError("ForceLast needs the id of an end, not None")
        end_ids(self.tokens, vocab_size)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        tokens_E = end_ids(self.tokens, logits_RV.shape[1])
        return _force(tokens_E, history.step == history.limit - 1, logits_RV)


@_rule
@dataclasses.dataclass(frozen=True)
class Temperature:
    """The logits are divided by it.

    Attributes:
      value: above 0. One for all or `[B]`.
    """

    value: ArrayLike

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless it is above 0."""
        per_row("Temperature", self.value, (batch,), ": for 0, use greedy", above=0)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        return logits_RV / jnp.maximum(_column(self.value, logits_RV, above=0), _SMALLEST)


@_rule
@dataclasses.dataclass(frozen=True)
class TopK:
    """The most probable tokens alone; of equals, those with lower ids.

    Attributes:
      count: how many, at least 1.
    """

    count: int = dataclasses.field(metadata=dict(static=True))

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless it is an integer, at least 1."""
        check_integer("TopK", self.count)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        return keep_probable(logits_RV, int(self.count), None)


@_rule
@dataclasses.dataclass(frozen=True)
class TopP:
    """As few of the most probable tokens as have `mass` together; of equals, those of lower ids.

    Attributes:
      mass: in (0, 1]. One for all or `[B]`.
    """

    mass: ArrayLike

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless it is in (0, 1]."""
        per_row("TopP", self.mass, (batch,), above=0, most=1)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        mass = _column(self.mass, logits_RV, above=0, most=1)
        kept_RV = keep_probable(logits_RV, None, mass)
        return jnp.where(jnp.isnan(mass), jnp.nan, kept_RV)


@_rule
@dataclasses.dataclass(frozen=True)
class MinP:
    """The tokens that are at least a `share` as probable as the most probable one.

    Attributes:
      share: in (0, 1]. One for all or `[B]`.
    """

    share: ArrayLike

    def check(self, vocab_size: int, batch: int) -> None:
        """Raises ValueError unless it is in (0, 1]."""
        per_row("MinP", self.share, (batch,), above=0, most=1)

    def __call__(self, logits_RV: Array, history: History) -> Array:
        share = _column(self.share, logits_RV, above=0, most=1)
        return jnp.where(jnp.isnan(share), jnp.nan, keep_above(logits_RV, share))


@_rule
@dataclasses.dataclass(frozen=True)
class Normalize:
    """The log-probabilities of what the rules before it have left."""

    def __call__(self, logits_RV: Array, history: History) -> Array:
        return normalized(logits_RV)


def normalized(logits_RV: Array) -> Array:
    """Log-probabilities; where no token is possible, none is."""
    is_any_R1 = jnp.max(logits_RV, axis=-1, keepdims=True) != -jnp.inf
    return jnp.where(is_any_R1, jax.nn.log_softmax(logits_RV), -jnp.inf)


def _rows(value: Array, logits_RV: Array) -> Array:
    """`[]`, or `[B]` as `[R, 1]`, each for all hypotheses of its row."""
    if not value.ndim:
        return value
    return jnp.repeat(value, logits_RV.shape[0] // value.shape[0])[:, None]


def _column(
    value: ArrayLike, logits_RV: Array, above: float = -np.inf, most: float = np.inf
) -> Array:
    """As `_rows`, float32; what is out of range, and was traced, is NaN: it ends its row."""
    if above == 0 and not isinstance(value, jax.Array):
        # What is above 0 stays so.
        value = np.where(np.asarray(value) > 0, np.maximum(value, _SMALLEST), value)
    number = _rows(jnp.asarray(value, jnp.float32), logits_RV)
    return jnp.where((number > above) & (number <= most), number, jnp.nan)


def _occurs(tokens_RH: Array, is_meant_RH: Array, logits_RV: Array) -> Array:
    """`[R, V]`, which tokens are among those that are meant."""
    rows, vocab_size = logits_RV.shape
    token_RH = jnp.where(is_meant_RH, tokens_RH, vocab_size)
    rows_R1 = jnp.arange(rows)[:, None]
    return jnp.zeros((rows, vocab_size), bool).at[rows_R1, token_RH].set(True, mode="drop")


def _is_one_of(tokens: Array, logits_RV: Array) -> Array:
    """`[1, V]`."""
    return jnp.isin(jnp.arange(logits_RV.shape[1]), tokens)[None]


def _forbid(is_forbidden_RV: Array, logits_RV: Array) -> Array:
    return jnp.where(is_forbidden_RV, -jnp.inf, logits_RV)


def _force(tokens: Array, is_forced: Array, logits_RV: Array) -> Array:
    forced_1V = jnp.where(_is_one_of(tokens, logits_RV), 0.0, -jnp.inf)
    return jnp.where(is_forced, forced_1V, logits_RV)
