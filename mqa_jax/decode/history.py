"""What a rule on logits sees of its row, and how a search asks its rules.

A rule is any function `rule(logits_RV, history) -> logits_RV`: it makes tokens less likely, or
impossible (minus infinity). `rules` has those that people expect. Rows are told nothing of each
other; a beam search asks for all of its hypotheses, each of which has the history that led to it.

Array letters: B batch   V vocabulary   L max_new_tokens   P prompt length   H history, P + L
b beam   R rows, B or B * b
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mqa_jax.core.arrays import as_int32
from mqa_jax.core.checks import check_integer
from mqa_jax.decode.arguments import known_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens of every row so far; all rows end in the same column.

    Attributes:
      tokens: `[R, H]` int32, those of row `r` in the columns `start[r] ... end - 1`.
      start: `[R]` int32, the first column of a row: where its prompt begins, or, where the search
        was told of none, the token that it began with.
      end: `[]` int32, behind the last column.
      step: `[]` int32, how many of the tokens are new: 0 where the first is chosen.
      limit: `L`, how many new ones there can be; that of step `L - 1` is the last.
    """

    tokens: Array
    start: Array
    end: Array
    step: Array
    limit: int = dataclasses.field(metadata=dict(static=True))

    @property
    def is_token(self) -> Array:
        """`[R, H]`, whether there is a token in a column."""
        column_H = jnp.arange(self.tokens.shape[1])
        return (column_H[None] >= self.start[:, None]) & (column_H[None] < self.end)

    @property
    def is_new(self) -> Array:
        """`[R, H]`, whether it is one that the search has chosen."""
        return self.is_token & (jnp.arange(self.tokens.shape[1])[None] >= self.end - self.step)

    def last(self, count: int) -> Array:
        """`[R, count]`, the tokens at the end; -1 in front where there are not so many."""
        column_n = self.end - count + jnp.arange(count)
        tokens_Rn = self.tokens[:, jnp.maximum(column_n, 0)]
        return jnp.where(column_n[None] >= self.start[:, None], tokens_Rn, -1)


class Rule(Protocol):
    """See the head of this file.

    A rule may have a method `check(vocab_size, batch)` too, which a search calls before it starts,
    and which raises a ValueError for numbers that make no sense. One whose numbers `jax.jit`
    traces is a pytree.
    """

    def __call__(self, logits_RV: Array, history: History, /) -> Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ruling:
    """The rules of a search with what they are told of its rows; see `ruling`.

    Attributes:
      rules: asked one behind the other.
      prompt: `[R, P]` int32, with its tokens at the right.
      start: `[R]` int32, the first of them.
    """

    rules: tuple[Rule, ...]
    prompt: Array
    start: Array

    def expand(self, beam_size: int) -> "Ruling":
        """For the `B * b` hypotheses of a beam search."""
        prompt_RP, start_R = (jnp.repeat(x, beam_size, axis=0) for x in (self.prompt, self.start))
        return Ruling(self.rules, prompt_RP, start_R)

    def __call__(self, logits_RV: Array, new_RL: Array, step: Array) -> Array:
        """The logits that the rules leave; NaN in rows whose own are no numbers.

        Args:
          logits_RV: float32, as the model gave them.
          new_RL: the tokens chosen so far, `step` of them.
        """
        history = History(
            tokens=jnp.concatenate([self.prompt, new_RL], axis=1),
            start=self.start,
            end=self.prompt.shape[1] + step,
            step=step,
            limit=new_RL.shape[1],
        )
        # A rule that leaves out what is NaN would hide it.
        is_number_R1 = jnp.isfinite(jnp.max(logits_RV, axis=-1, keepdims=True))
        ruled_RV = logits_RV
        for rule in self.rules:
            ruled_RV = rule(ruled_RV, history)
            if np.shape(ruled_RV) != logits_RV.shape:
                raise ValueError(
                    f"{rule} must return logits {list(logits_RV.shape)}, as it was given, not "
                    f"{list(np.shape(ruled_RV))}"
                )
            is_number_R1 &= ~jnp.isnan(jnp.max(ruled_RV, axis=-1, keepdims=True))
        return jnp.where(is_number_R1, ruled_RV.astype(jnp.float32), jnp.nan)


def ruling(
    rules: Sequence[Rule], tokens_B: Array, prompt: tuple[Array, Array] | None
) -> Ruling | None:
    """The rules of a search; None where it has none, and nothing is to be kept for them.

    Args:
      tokens_B: what the search begins with.
      prompt: `[B, P]` tokens, padded on the right, and `[B]`, how many of each row are real: all
        that came before, `tokens_B` included. None: `tokens_B` alone.
    """
    if not rules:
        return None
    if prompt is None:
        no_padding_B = jnp.zeros(tokens_B.shape, jnp.int32)
        return Ruling(tuple(rules), as_int32(tokens_B)[:, None], no_padding_B)
    tokens_BP, lengths_B = map(as_int32, prompt)
    width = tokens_BP.shape[1]
    # From padding on the right to padding on the left: what follows a prompt stands behind it.
    column_BP = (jnp.arange(width)[None] + lengths_B[:, None]) % width
    tokens_BP = jnp.take_along_axis(tokens_BP, column_BP, axis=1)
    return Ruling(tuple(rules), tokens_BP, width - lengths_B)


def check_rules(
    rules: Any, prompt: tuple[Array, Array] | None, vocab_size: int, batch: int
) -> None:
    """Raises ValueError for what is no rule, one with a number that makes no sense, and a prompt
    of another shape."""
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise ValueError(f"rules must be a sequence of rules, not {rules!r}")
    for rule in rules:
        if isinstance(rule, type) or not callable(rule):
            raise ValueError(f"rules must be functions of logits and history, not {rule!r}")
        check: Any = getattr(rule, "check", None)
        if check is not None:
            check(vocab_size, batch)
    if prompt is None:
        return
    shapes = [list(np.shape(x)) for x in prompt]
    if len(shapes) != 2 or len(shapes[0]) != 2 or not shapes[0][1] or shapes[0][0] != batch:
        raise ValueError(f"prompt must be tokens [{batch}, P] and lengths [{batch}], not {shapes}")
    if shapes[1] != [batch]:
        raise ValueError(f"the lengths of prompt must be [{batch}], not {shapes[1]}")
    for row, length in enumerate(known_values(prompt[1])):
        check_integer(f"the length of prompt {row}", length, most=shapes[0][1])
