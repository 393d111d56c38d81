"""Greedy decoding, sampling and beam search, on the device, for any model.

A model takes part through two things alone:

  * `cache`: a pytree of arrays whose first axis is the batch; what changes from step to step.
  * `step_fn(tokens, cache) -> (logits, cache)`: takes the last token of every row, `[rows]` int32,
    and returns logits of the next, `[rows, V]`.

What stays the same during a decode (an encoder's keys and values, say) belongs into `step_fn`, not
into the cache: beam search repeats and reorders all that is in the cache, and nothing else. With a
beam of `b`, `step_fn` is called with `B * b` rows, those of batch element `i` being
`i * b ... i * b + b - 1`. A part of the cache that knows a better way than to be copied brings a
method `expand(b)`, and what that returns a method `reorder(parent_Bb)`: `KVCache` does.

Logits that are minus infinity are tokens that cannot be. Logits that are NaN or plus infinity, or a
row without a finite one, are a fault of the model or of what it was given: the row ends there, and
`Decoded.is_finite` tells. No token is made of them.

Each function is one `lax.while_loop` that ends as soon as every row has. Call them inside a
`jax.jit` of your own, so that they compile once a shape:

    @jax.jit
    def continue_prompt(params, last_token_B, cache):
        def step_fn(tokens_B, cache):
            return my_model(params, tokens_B, cache)
        return greedy(step_fn, cache, last_token_B, max_new_tokens=32, eos_id=2).tokens

Array letters: B batch   V vocabulary   L max_new_tokens   b beam   R rows, B * b
E ids that end a row
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from mqa_jax.core.arrays import as_int32
from mqa_jax.core.checks import check_integer
from mqa_jax.core.explicit import automatic, explicit, partition, spec
from mqa_jax.decode.arguments import EndIds, check_search, per_row, typed_keys
from mqa_jax.decode.logits import keep_probable, scaled

Cache = TypeVar("Cache")
StepFn = Callable[[Array, Cache], tuple[Array, Cache]]

# From logits and the step to tokens, see `_decode`.
Choose = Callable[[Array, Array], tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What was decoded.

    Attributes:
      tokens: `[B, L]` int32, for beam search `[B, b, L]`, best hypothesis first. Where an
        end-of-sentence was reached it is included, and `pad_id` follows.
      length: `[B]` or `[B, b]` int32: tokens before the padding.
      steps: `[]` int32: how often `step_fn` was called.
      score: beam search only, `[B, b]` float32: log-probability over length penalty; minus infinity
        marks a hypothesis that does not exist (a vocabulary too small for so wide a beam), which
        has no tokens.
      cache: greedy decoding and sampling only: the cache after the last step, which holds all but
        the last token. Return it from a jitted function that the first cache is donated to, and
        nothing is copied.
      is_finite: `[B]` bool, False for a row that ended because `step_fn` returned NaN or infinity
        for it, or no token that is possible: its tokens are those from before. In a beam search
        it is enough that one of the live hypotheses met them; those that had ended are kept, those
        that had not follow, as they stood.
    """

    tokens: Array
    length: Array
    steps: Array
    score: Array | None = None
    cache: Any = None
    is_finite: Array | None = None


def greedy(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    max_new_tokens: int,
    eos_id: EndIds = None,
    pad_id: int = 0,
) -> Decoded:
    """The most probable token at every step; of equals, the one with the lowest id.

    Args:
      step_fn: the model, see the head of this file.
      cache: holds what comes before `tokens_B`.
      tokens_B: `[B]` integers, the last token of every row so far (a prompt's last, or the
        beginning-of-sentence id), which the cache does not hold yet.
      max_new_tokens: `L`, how many tokens to decode at most.
      eos_id: the token that ends a row, or several of them; None: rows end at `L` only.
      pad_id: what follows the end of a row, and what the model is given for a row that has ended:
        a token of the vocabulary. It may be one that the model decodes, or `eos_id` itself, since
        `Decoded.length` tells them apart.

    Raises:
      ValueError: `max_new_tokens` below 1; `eos_id`, `pad_id` or a token outside the vocabulary;
        shapes that do not fit; a `KVCache` without room for `L` more tokens. What is traced by
        `jax.jit` cannot be checked: ids outside the vocabulary, and tokens without room, become NaN
        in this package's models, which `Decoded.is_finite` tells.
    """

    def choose(logits_BV: Array, step: Array) -> tuple[Array, Array]:
        return jnp.argmax(logits_BV, axis=-1), logits_BV

    return _decode(step_fn, cache, tokens_B, choose, max_new_tokens, eos_id, pad_id)


def sample(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    key: Array,
    max_new_tokens: int,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    eos_id: EndIds = None,
    pad_id: int = 0,
) -> Decoded:
    """A token drawn from the model's distribution at every step.

    Args:
      key: a PRNG key, or `[B]` keys, one a row: then what a row samples does not depend on the rows
        beside it. Of `jax.random.key`, or as `jax.random.PRNGKey` makes them.
      temperature: the logits are divided by it before all else; one for all or `[B]`, one a row.
      top_k: only the `top_k` most probable tokens are drawn; of equals, those with lower ids.
      top_p: only the most probable tokens are drawn, as few as have a probability of `top_p`
        together (Holtzman et al. 2019), after `top_k`; of equals, those with lower ids. One for
        all or `[B]`, one a row.
      Others: as `greedy`.

    Raises:
      ValueError: `temperature` not above 0, `top_k` below 1, `top_p` outside (0, 1], as many keys
        as there are not rows, and as `greedy`. A temperature or `top_p` that is traced and out of
        range ends its rows at once, `Decoded.is_finite` being False.
    """
    rows = np.shape(tokens_B)[:1]
    temperature = per_row("temperature", temperature, rows, ": for 0, use greedy", above=0)
    # What was traced has not been checked.
    is_legal = temperature > 0
    if top_p is not None:
        top_p = per_row("top_p", top_p, rows, above=0, most=1)
        is_legal &= (top_p > 0) & (top_p <= 1)
    if top_k is not None:
        top_k = check_integer("top_k", top_k)
    keys = typed_keys(key)
    if keys.shape not in ((), rows):
        raise ValueError(
            f"key must be one PRNG key, or one a row, {list(rows)}: not {list(keys.shape)} of them"
        )
    keys_B = keys if keys.shape else jax.random.split(keys, rows)

    # A pytree, so that the loop knows of the arrays in it.
    choose = jax.tree_util.Partial(_draw, keys_B, temperature, top_k, top_p, is_legal)
    return _decode(step_fn, cache, tokens_B, choose, max_new_tokens, eos_id, pad_id)


def _draw(
    keys_B: Array,
    temperature: np.ndarray | Array,
    top_k: int | None,
    top_p: np.ndarray | Array | None,
    is_legal: np.ndarray | Array,
    logits_BV: Array,
    step: Array,
) -> tuple[Array, Array]:
    logits_BV = keep_probable(scaled(logits_BV, temperature), top_k, top_p)
    logits_BV = jnp.where(is_legal, logits_BV, jnp.nan)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(step_keys_B, logits_BV), logits_BV


def _decode(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    choose: Choose,
    max_new_tokens: int,
    eos_id: EndIds,
    pad_id: int,
) -> Decoded:
    """The loop of `greedy` and `sample`.

    `choose(logits_BV, step)` picks the next tokens, and returns them and the logits that it picked
    from: NaN if there is one, and minus infinity only where all are.
    """
    ends_E = check_search(step_fn, cache, tokens_B, max_new_tokens, eos_id, pad_id)
    step_fn = explicit(step_fn, tokens_B, cache)
    return _search(step_fn, cache, tokens_B, choose, max_new_tokens, ends_E, pad_id)


def _decoded_spec(cache: Cache, tokens_B: Array, **_: Any) -> Decoded:
    batch, no_split = spec(tokens_B), partition()
    return Decoded(batch, batch, no_split, cache=jax.tree.map(spec, cache), is_finite=batch)


@automatic(_decoded_spec)
def _search(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    choose: Choose,
    max_new_tokens: int,
    ends_E: Array,
    pad_id: int,
) -> Decoded:
    batch = tokens_B.shape[0]

    def is_running(state: tuple[Any, ...]) -> Array:
        step, _, _, is_ended_B, _, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(is_ended_B)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens_B, output_BL, is_ended_B, is_finite_B, length_B, cache = state
        logits_BV, cache = step_fn(tokens_B, cache)
        chosen_B, logits_BV = choose(logits_BV.astype(jnp.float32), step)
        # NaN and infinity are chosen where they are: one logit a row tells of all of them.
        best_B = jnp.take_along_axis(logits_BV, chosen_B[:, None], axis=1)[:, 0]
        is_finite_B &= jnp.isfinite(best_B) | is_ended_B
        is_ended_B |= ~is_finite_B
        tokens_B = jnp.where(is_ended_B, pad_id, chosen_B.astype(jnp.int32))
        output_BL = lax.dynamic_update_index_in_dim(output_BL, tokens_B, step, axis=1)
        length_B = jnp.where(is_ended_B, length_B, length_B + 1)
        is_ended_B |= jnp.isin(tokens_B, ends_E)
        return step + 1, tokens_B, output_BL, is_ended_B, is_finite_B, length_B, cache

    state = (
        jnp.int32(0),
        as_int32(tokens_B),
        jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.ones(batch, bool),
        jnp.zeros(batch, jnp.int32),
        cache,
    )
    state = lax.while_loop(is_running, advance, state)
    steps, _, output_BL, _, is_finite_B, length_B, cache = state
    return Decoded(output_BL, length_B, steps, cache=cache, is_finite=is_finite_B)
