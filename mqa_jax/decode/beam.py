"""Beam search, and what it asks of a cache. The head of `search` says what a model brings.

Array letters: B batch   V vocabulary   L max_new_tokens   b beam   R rows, B * b   c candidates
E ids that end a hypothesis
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mqa_jax.core.arrays import as_int32
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.explicit import automatic, explicit, partition, spec
from mqa_jax.decode.arguments import EndIds, check_search
from mqa_jax.decode.search import Cache, Decoded, StepFn

_LARGEST = float(np.finfo(np.float32).max)


def length_penalty(length: Array | int, alpha: float | Array) -> Array | float:
    """`((5 + length) / 6) ** alpha` (Wu et al. 2016, equation 14); `length` counts the EOS."""
    return ((5.0 + length) / 6.0) ** alpha


def expand(cache: Cache, beam_size: int) -> Cache:
    """A cache of `B` rows for `B * b` hypotheses, of which those of one row begin alike."""

    def of(node: Any) -> Any:
        if hasattr(node, "expand"):
            return node.expand(beam_size)
        return _repeat(node, beam_size)

    return jax.tree.map(of, cache, is_leaf=lambda node: hasattr(node, "expand"))


@automatic(lambda array, **_: spec(array))
def _repeat(array: Array, beam_size: int) -> Array:
    return jnp.repeat(array, beam_size, axis=0)


def reorder(cache: Cache, parent_Bb: Array) -> Cache:
    """The cache in which hypothesis `j` of row `i` continues hypothesis `parent_Bb[i, j]`."""
    batch, beam_size = parent_Bb.shape
    parent_R = (jnp.arange(batch)[:, None] * beam_size + parent_Bb).reshape(-1)

    def of(node: Any) -> Any:
        if hasattr(node, "reorder"):
            return node.reorder(parent_Bb)
        return node.at[parent_R].get(mode="promise_in_bounds")

    return jax.tree.map(of, cache, is_leaf=lambda node: hasattr(node, "reorder"))


def beam_search(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    beam_size: int,
    max_new_tokens: int,
    eos_id: EndIds = None,
    alpha: float | Array = 0.6,
    pad_id: int = 0,
) -> Decoded:
    """The `beam_size` best hypotheses found, by log-probability over length penalty.

    Live and finished hypotheses are kept apart, `beam_size` of each, so that a hypothesis that ends
    does not narrow the search. It stops when no live hypothesis can still enter the finished ones:
    a live log-probability `p <= 0` can only fall, so no ending of it scores above
    `p / length_penalty(max_new_tokens)`.

    Args:
      beam_size: `b`. With 1 this is greedy decoding, except that the search goes on behind an
        end-of-sentence that is not the most probable token.
      eos_id: as for `greedy`; None: the best hypotheses of `L` tokens.
      alpha: exponent of the length penalty, at least 0; the paper uses 0.6.
      Others: as `greedy`. `cache` has `B` rows; it is expanded to `B * b` here.

    Returns:
      tokens `[B, b, L]`, best first. Hypotheses that reached `L` without an end-of-sentence are
      given only where fewer than `b` have ended, behind those.

    Raises:
      ValueError: `beam_size` below 1, `alpha` below 0 or so large that scores are no numbers any
        more, and as `greedy`. An `alpha` that is traced and out of range ends all rows at once,
        `Decoded.is_finite` being False.
    """
    beam_size = check_integer("beam_size", beam_size)
    ends_E = check_search(step_fn, cache, tokens_B, max_new_tokens, eos_id, pad_id)
    max_new_tokens = int(max_new_tokens)
    is_legal: bool | Array = True
    if isinstance(alpha, jax.core.Tracer):
        if alpha.shape or alpha.dtype == bool:
            raise ValueError(f"alpha must be one number, not {alpha}")
        alpha = alpha.astype(jnp.float32)
        is_legal = (alpha >= 0) & jnp.isfinite(length_penalty(max_new_tokens, alpha))
    else:
        # Below 0 longer hypotheses would be punished twice, and no one could tell when to stop.
        alpha = check_number("alpha", alpha, least=0)
        if alpha * math.log(length_penalty(max_new_tokens, 1)) > math.log(_LARGEST):
            raise ValueError(f"alpha={alpha} makes length penalties that are no float32 any more")
    cache = expand(cache, beam_size)
    return _search(
        explicit(step_fn, tokens_B, cache),
        cache,
        tokens_B,
        beam_size=beam_size,
        max_new_tokens=max_new_tokens,
        ends_E=ends_E,
        alpha=alpha,
        is_legal=is_legal,
        pad_id=pad_id,
    )


def _decoded_spec(tokens_B: Array, **_: Any) -> Decoded:
    batch, no_split = spec(tokens_B), partition()
    return Decoded(batch, batch, no_split, batch, is_finite=batch)


@automatic(_decoded_spec)
def _search(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    beam_size: int,
    max_new_tokens: int,
    ends_E: Array,
    alpha: float | Array,
    is_legal: bool | Array,
    pad_id: int,
) -> Decoded:
    """The loop of `beam_search`, over a cache of `B * b` rows."""
    batch = tokens_B.shape[0]
    rows_B1 = jnp.arange(batch)[:, None]

    def is_open(live_Bb: Array, finished_Bb: Array, is_finite_B: Array) -> Array:
        """`[B]`, whether a live hypothesis can still enter the finished ones."""
        reachable_B = live_Bb[:, 0] / length_penalty(max_new_tokens, alpha)
        return is_finite_B & (reachable_B > finished_Bb[:, -1])

    def is_running(state: tuple[Any, ...]) -> Array:
        step, _, hypotheses, is_finite_B, _ = state
        _, live_Bb, _, finished_Bb, _, _ = hypotheses
        return (step < max_new_tokens) & jnp.any(is_open(live_Bb, finished_Bb, is_finite_B))

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens_R, hypotheses, is_finite_B, cache = state
        live_BbL, live_Bb, finished_BbL, finished_Bb, length_Bb, live_length_B = hypotheses
        logits_RV, cache = step_fn(tokens_R, cache)
        log_prob_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32))
        log_prob_BbV = log_prob_RV.reshape(batch, beam_size, -1)
        vocab_size = log_prob_BbV.shape[-1]

        # NaN, infinity, or minus infinity throughout: all of its log-probabilities are NaN then.
        is_nan_Bb = jnp.isnan(log_prob_BbV[:, :, 0])
        is_open_B = is_open(live_Bb, finished_Bb, is_finite_B)
        is_finite_B &= ~(is_open_B & jnp.any(is_nan_Bb & (live_Bb > -jnp.inf), axis=1))
        candidate_BbV = jnp.where(
            is_nan_Bb[:, :, None], -jnp.inf, live_Bb[:, :, None] + log_prob_BbV
        )

        # At most E candidates of a beam end it, so the best (1 + E) b hold b that do not.
        count = min((1 + ends_E.size) * beam_size, beam_size * vocab_size)
        score_Bc, index_Bc = lax.top_k(candidate_BbV.reshape(batch, -1), count)
        parent_Bc, token_Bc = index_Bc // vocab_size, index_Bc % vocab_size
        candidate_BcL = lax.dynamic_update_index_in_dim(
            live_BbL[rows_B1, parent_Bc], token_Bc, step, axis=2
        )
        is_end_Bc = jnp.isin(token_Bc, ends_E)

        ended_Bc = jnp.where(
            is_end_Bc, score_Bc / length_penalty((step + 1).astype(jnp.float32), alpha), -jnp.inf
        )
        finished_Bb, best_Bb = lax.top_k(
            jnp.concatenate([finished_Bb, ended_Bc], axis=1), beam_size
        )
        finished_BbL = jnp.concatenate([finished_BbL, candidate_BcL], axis=1)[rows_B1, best_Bb]
        new_length_Bc = jnp.full_like(token_Bc, step + 1)
        length_Bb = jnp.concatenate([length_Bb, new_length_Bc], axis=1)[rows_B1, best_Bb]

        live_Bb, best_Bb = lax.top_k(jnp.where(is_end_Bc, -jnp.inf, score_Bc), beam_size)
        live_BbL = candidate_BcL[rows_B1, best_Bb]
        cache = reorder(cache, parent_Bc[rows_B1, best_Bb])
        tokens_R = token_Bc[rows_B1, best_Bb].reshape(-1)

        # What a row has come to stays where its search is over, or met what is no number.
        new = (live_BbL, live_Bb, finished_BbL, finished_Bb, length_Bb, live_length_B + 1)
        goes_on_B = is_open_B & is_finite_B
        hypotheses = jax.tree.map(
            lambda new, old: jnp.where(jnp.expand_dims(goes_on_B, range(1, new.ndim)), new, old),
            new,
            hypotheses,
        )
        return step + 1, tokens_R, hypotheses, is_finite_B, cache

    padding_BbL = jnp.full((batch, beam_size, max_new_tokens), pad_id, jnp.int32)
    nothing_Bb = jnp.full((batch, beam_size), -jnp.inf)
    hypotheses = (
        padding_BbL,
        nothing_Bb.at[:, 0].set(0.0),  # All beams start alike: only the first may have offspring.
        padding_BbL,
        nothing_Bb,
        jnp.zeros((batch, beam_size), jnp.int32),
        jnp.zeros(batch, jnp.int32),
    )
    state = (
        jnp.int32(0),
        jnp.repeat(as_int32(tokens_B), beam_size),
        hypotheses,
        jnp.full(batch, is_legal),
        cache,
    )
    steps, _, hypotheses, is_finite_B, _ = lax.while_loop(is_running, advance, state)
    live_BbL, live_Bb, finished_BbL, finished_Bb, length_Bb, live_length_B = hypotheses

    # Live hypotheses are of use only where finished ones are missing: they rank behind those there.
    live_Bb /= length_penalty(max_new_tokens, alpha)
    rank_Bb = jnp.where(finished_Bb == -jnp.inf, 2, 0)
    rank_Bc = jnp.concatenate([rank_Bb, jnp.ones_like(rank_Bb)], axis=1)
    order_Bb = jnp.argsort(rank_Bc, axis=1, stable=True)[:, :beam_size]
    tokens_BbL = jnp.concatenate([finished_BbL, live_BbL], axis=1)[rows_B1, order_Bb]
    score_Bb = jnp.concatenate([finished_Bb, live_Bb], axis=1)[rows_B1, order_Bb]
    live_length_Bb = jnp.broadcast_to(live_length_B[:, None], length_Bb.shape)
    length_Bb = jnp.concatenate([length_Bb, live_length_Bb], axis=1)[rows_B1, order_Bb]
    # A hypothesis that does not exist has no tokens.
    is_there_Bb = score_Bb > -jnp.inf
    return Decoded(
        jnp.where(is_there_Bb[:, :, None], tokens_BbL, pad_id),
        jnp.where(is_there_Bb, length_Bb, 0),
        steps,
        score_Bb,
        is_finite=is_finite_B,
    )
