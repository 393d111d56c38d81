"""Beam search, and what it asks of a cache. The head of `search` says what a model brings.

Array letters: B batch   V vocabulary   L max_new_tokens   b beam   R rows, B * b   c candidates
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from mqa_jax.core.explicit import automatic, explicit, spec
from mqa_jax.decode.search import Cache, Decoded, StepFn, check_search


def length_penalty(length: Array | int, alpha: float) -> Array | float:
    """`((5 + length) / 6) ** alpha` (Wu et al. 2016, equation 14); `length` counts the EOS."""
    return ((5.0 + length) / 6.0) ** alpha


def expand(cache: Cache, beam_size: int) -> Cache:
    """A cache of `B` rows for `B * b` hypotheses, of which those of one row begin alike."""

    def of(node):
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

    def of(node):
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
    eos_id: int,
    alpha: float = 0.6,
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
      alpha: exponent of the length penalty, at least 0; the paper uses 0.6.
      Others: as `greedy`. `cache` has `B` rows; it is expanded to `B * b` here.

    Returns:
      tokens `[B, b, L]`, best first. Hypotheses that reached `L` without an end-of-sentence are
      given only where fewer than `b` have ended, behind those.

    Raises:
      ValueError: `beam_size` below 1, `alpha` below 0, and as `greedy`.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, not {beam_size}")
    if not alpha >= 0:
        raise ValueError(
            f"alpha must be at least 0, not {alpha}: below that, longer hypotheses would be "
            "punished twice and the search could not tell when to stop"
        )
    vocab_size = check_search(step_fn, cache, tokens_B, max_new_tokens, eos_id)
    if vocab_size < 2:
        raise ValueError(f"a vocabulary of {vocab_size} token leaves nothing to search")
    cache = expand(cache, beam_size)
    return _search(
        explicit(step_fn, tokens_B, cache),
        cache,
        tokens_B,
        beam_size=beam_size,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        alpha=alpha,
        pad_id=pad_id,
        vocab_size=vocab_size,
    )


def _decoded_spec(tokens_B: Array, **_) -> Decoded:
    batch, no_split = spec(tokens_B), PartitionSpec()
    return Decoded(batch, batch, no_split, batch)


@automatic(_decoded_spec)
def _search(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    beam_size: int,
    max_new_tokens: int,
    eos_id: int,
    alpha: float,
    pad_id: int,
    vocab_size: int,
) -> Decoded:
    """The loop of `beam_search`, over a cache of `B * b` rows."""
    batch = tokens_B.shape[0]
    rows_B1 = jnp.arange(batch)[:, None]

    def is_running(state):
        step, _, _, live_Bb, _, finished_Bb, _, _ = state
        reachable_B = live_Bb[:, 0] / length_penalty(max_new_tokens, alpha)
        return (step < max_new_tokens) & jnp.any(reachable_B > finished_Bb[:, -1])

    def advance(state):
        step, tokens_R, live_BbL, live_Bb, finished_BbL, finished_Bb, length_Bb, cache = state
        logits_RV, cache = step_fn(tokens_R, cache)
        log_prob_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32))
        candidate_BbV = live_Bb[:, :, None] + log_prob_RV.reshape(batch, beam_size, vocab_size)

        # At most one candidate of a beam ends it, so the best 2b hold at least b that do not.
        score_Bc, index_Bc = lax.top_k(candidate_BbV.reshape(batch, -1), 2 * beam_size)
        parent_Bc, token_Bc = index_Bc // vocab_size, index_Bc % vocab_size
        candidate_BcL = lax.dynamic_update_index_in_dim(
            live_BbL[rows_B1, parent_Bc], token_Bc, step, axis=2
        )
        is_end_Bc = token_Bc == eos_id

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
        return step + 1, tokens_R, live_BbL, live_Bb, finished_BbL, finished_Bb, length_Bb, cache

    padding_BbL = jnp.full((batch, beam_size, max_new_tokens), pad_id, jnp.int32)
    nothing_Bb = jnp.full((batch, beam_size), -jnp.inf)
    state = (
        jnp.int32(0),
        jnp.repeat(tokens_B.astype(jnp.int32), beam_size),
        padding_BbL,
        nothing_Bb.at[:, 0].set(0.0),  # All beams start alike: only the first may have offspring.
        padding_BbL,
        nothing_Bb,
        jnp.zeros((batch, beam_size), jnp.int32),
        cache,
    )
    state = lax.while_loop(is_running, advance, state)
    steps, _, live_BbL, live_Bb, finished_BbL, finished_Bb, length_Bb, _ = state

    # Live hypotheses are of use only where finished ones are missing: they rank behind those there.
    live_Bb /= length_penalty(max_new_tokens, alpha)
    rank_Bb = jnp.where(finished_Bb == -jnp.inf, 2, 0)
    rank_Bc = jnp.concatenate([rank_Bb, jnp.ones_like(rank_Bb)], axis=1)
    order_Bb = jnp.argsort(rank_Bc, axis=1, stable=True)[:, :beam_size]
    tokens_BbL = jnp.concatenate([finished_BbL, live_BbL], axis=1)[rows_B1, order_Bb]
    score_Bb = jnp.concatenate([finished_Bb, live_Bb], axis=1)[rows_B1, order_Bb]
    length_Bb = jnp.concatenate([length_Bb, jnp.full_like(length_Bb, steps)], axis=1)
    return Decoded(tokens_BbL, length_Bb[rows_B1, order_Bb], steps, score_Bb)
