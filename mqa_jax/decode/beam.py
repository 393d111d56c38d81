"""Beam search, and what it asks of a cache. The head of `search` says what a model brings.

Array letters: B batch   V vocabulary   L max_new_tokens   b beam   R rows, B * b   c candidates
E ids that end a hypothesis
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mqa_jax.core.arrays import as_int32
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.explicit import automatic, explicit, partition, spec
from mqa_jax.decode.arguments import EndIds, check_search
from mqa_jax.decode.history import Rule, check_rules, ruling
from mqa_jax.decode.rules import normalized
from mqa_jax.decode.search import Cache, Decoded, StepFn

_LARGEST = float(np.finfo(np.float32).max)


def length_penalty(length: Array | int, alpha: float | Array) -> Array | float:
    """`((5 + length) / 6) ** alpha` (Wu et al. 2016, equation 14); `length` counts the EOS."""
    return ((5.0 + length) / 6.0) ** alpha


def power_penalty(length: Array | float, alpha: float | Array) -> Array | float:
    """`length ** alpha`; `length` counts the EOS, and neither a prompt nor what a target begins
    with."""
    return length**alpha


@dataclasses.dataclass(frozen=True)
class BeamRules:
    """What a beam search makes of its hypotheses, each rule apart from the others.

    As it stands, what this package does; `TRANSFORMERS` is what Hugging Face's transformers does.

    Attributes:
      length_penalty: of a length and `alpha`, by which a log-probability is divided: a base that
        grows with the length, to the power of `alpha`.
      only_best_end: of the best `(1 + E) b` continuations, `E` being the number of ids that end
        one, only those among the best `b` may finish there; otherwise all of them.
      limit_ends: at `L` tokens the live hypotheses finish too, and compete with those that have;
        otherwise they are given where fewer than `b` have finished, behind those.
      early_stopping: a row is over, True: as soon as `b` hypotheses have finished; False: when the
        best live one, were it to end where it stands, would not be among the best `b`; "never":
        when no ending of it, up to `L` tokens, could be.
      on_log_probs: rules on logits are asked after the softmax, on log-probabilities, of which
        those that remain need not add up to one any more; `rules.Normalize` at their end sees to
        that. Otherwise before it.
    """

    length_penalty: Callable[[Any, Any], Any] = length_penalty
    only_best_end: bool = False
    limit_ends: bool = False
    early_stopping: bool | str = "never"
    on_log_probs: bool = False

    def __post_init__(self) -> None:
        if not callable(self.length_penalty):
            raise ValueError(
                f"length_penalty must be a function of length and alpha, not "
                f"{self.length_penalty!r}: the number is alpha"
            )
        for name in ("only_best_end", "limit_ends", "on_log_probs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping must be True, False or "never", not {self.early_stopping!r}'
            )


# Its default of `early_stopping`; a directory's generation_config.json may say another one.
TRANSFORMERS = BeamRules(
    power_penalty, only_best_end=True, limit_ends=True, early_stopping=False, on_log_probs=True
)


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
    rules: Sequence[Rule] = (),
    prompt: tuple[Array, Array] | None = None,
    token_scores: bool = False,
    beam_rules: BeamRules = BeamRules(),
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
      beam_rules: how hypotheses are compared, which of them finish, and when a row is over; what
        is said here of that is the default.
      Others: as `greedy`. `cache` has `B` rows; it is expanded to `B * b` here. A hypothesis that
        `rules` leave no token has no offspring. What they take away counts in its score, but not
        in `token_scores`.

    Returns:
      tokens `[B, b, L]`, best first. Hypotheses that reached `L` without an end-of-sentence are
      given only where fewer than `b` have ended, behind those.

    Raises:
      ValueError: `beam_size` below 1, `alpha` below 0 or so large that scores are no numbers any
        more, and as `greedy`. An `alpha` that is traced and out of range ends all rows at once,
        `Decoded.is_finite` being False.
    """
    beam_size = check_integer("beam_size", beam_size)
    if not isinstance(beam_rules, BeamRules):
        raise ValueError(f"beam_rules must be BeamRules, not {beam_rules!r}")
    ends_E, vocab_size = check_search(step_fn, cache, tokens_B, max_new_tokens, eos_id, pad_id)
    check_rules(rules, prompt, vocab_size, tokens_B.shape[0])
    max_new_tokens = int(max_new_tokens)
    penalty = beam_rules.length_penalty
    is_legal: bool | Array = True
    if isinstance(alpha, jax.core.Tracer):
        if alpha.shape or alpha.dtype == bool:
            raise ValueError(f"alpha must be one number, not {alpha}")
        alpha = alpha.astype(jnp.float32)
        is_legal = (alpha >= 0) & jnp.isfinite(penalty(max_new_tokens, alpha))
    else:
        # Below 0 longer hypotheses would be punished twice, and no one could tell when to stop.
        alpha = check_number("alpha", alpha, least=0)
        if alpha * math.log(penalty(max_new_tokens, 1)) > math.log(_LARGEST):
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
        rules=rules,
        prompt=prompt,
        token_scores=token_scores,
        beam_rules=beam_rules,
    )


def _decoded_spec(tokens_B: Array, token_scores: bool, **_: Any) -> Decoded:
    batch, no_split = spec(tokens_B), partition()
    scores = batch if token_scores else None
    return Decoded(batch, batch, no_split, batch, is_finite=batch, token_scores=scores)


class _Hypotheses(NamedTuple):
    """Those of all rows.

    Attributes:
      live: arrays `[B, b, L]`, what is known of each token: its id, and its log-probability if that
        was asked for.
      live_score: `[B, b]`, log-probabilities.
      live_length: `[B]`, tokens of the live ones; it stays where a row is over.
      finished: as `live`.
      finished_score: `[B, b]`, log-probabilities over length penalty.
      finished_length: `[B, b]`.
    """

    live: list[Array]
    live_score: Array
    live_length: Array
    finished: list[Array]
    finished_score: Array
    finished_length: Array


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
    rules: Sequence[Rule],
    prompt: tuple[Array, Array] | None,
    token_scores: bool,
    beam_rules: BeamRules,
) -> Decoded:
    """The loop of `beam_search`, over a cache of `B * b` rows."""
    batch = tokens_B.shape[0]
    rows_B1 = jnp.arange(batch)[:, None]
    ruled = ruling(rules, tokens_B, prompt)
    if ruled is not None:
        ruled = ruled.expand(beam_size)
    penalty, early_stopping = beam_rules.length_penalty, beam_rules.early_stopping

    def is_open(hypotheses: _Hypotheses, is_finite_B: Array) -> Array:
        """`[B]`, whether a live hypothesis can still enter the finished ones."""
        best_B, worst_B = hypotheses.live_score[:, 0], hypotheses.finished_score[:, -1]
        if early_stopping is True:
            return is_finite_B & (worst_B == -jnp.inf) & (best_B > -jnp.inf)
        # Its own length, which stays where its search is over: a row that is does not open again.
        length: Array | int = max_new_tokens
        if early_stopping is False:
            length = jnp.maximum(hypotheses.live_length, 1).astype(jnp.float32)
        return is_finite_B & (best_B / penalty(length, alpha) > worst_B)

    def log_probs(logits_RV: Array, live_BbL: Array, step: Array) -> tuple[Array, Array]:
        """`[B, b, V]` of the tokens, and `[B, b]`, whether those of a hypothesis are no numbers."""
        if ruled is None:
            # As `jax.nn.log_softmax`. Where there is NaN, infinity, or minus infinity throughout,
            # all of it is NaN, and the sum tells: a look at one token's would write all of it out.
            shifted_RV = logits_RV - jnp.max(logits_RV, axis=-1, keepdims=True)
            log_sum_R = jnp.log(jnp.sum(jnp.exp(shifted_RV), axis=-1))
            log_prob_RV, is_nan_R = shifted_RV - log_sum_R[:, None], jnp.isnan(log_sum_R)
        else:
            live_RL = live_BbL.reshape(batch * beam_size, -1)
            if beam_rules.on_log_probs:
                log_prob_RV = ruled(jax.nn.log_softmax(logits_RV), live_RL, step)
            else:
                log_prob_RV = normalized(ruled(logits_RV, live_RL, step))
            is_nan_R = jnp.isnan(jnp.max(log_prob_RV, axis=-1))
        log_prob_BbV = log_prob_RV.reshape(batch, beam_size, -1)
        return log_prob_BbV, is_nan_R.reshape(batch, beam_size)

    def is_running(state: tuple[Any, ...]) -> Array:
        step, _, hypotheses, is_finite_B, _ = state
        return (step < max_new_tokens) & jnp.any(is_open(hypotheses, is_finite_B))

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens_R, old, is_finite_B, cache = state
        logits_RV, cache = step_fn(tokens_R, cache)
        logits_RV = logits_RV.astype(jnp.float32)
        log_prob_BbV, is_nan_Bb = log_probs(logits_RV, old.live[0], step)
        vocab_size = log_prob_BbV.shape[-1]

        is_open_B = is_open(old, is_finite_B)
        is_finite_B &= ~(is_open_B & jnp.any(is_nan_Bb & (old.live_score > -jnp.inf), axis=1))
        candidate_BbV = jnp.where(
            is_nan_Bb[:, :, None], -jnp.inf, old.live_score[:, :, None] + log_prob_BbV
        )

        # At most E candidates of a beam end it, so the best (1 + E) b hold b that do not.
        count = min((1 + ends_E.size) * beam_size, beam_size * vocab_size)
        score_Bc, index_Bc = lax.top_k(candidate_BbV.reshape(batch, -1), count)
        parent_Bc, token_Bc = index_Bc // vocab_size, index_Bc % vocab_size
        chosen: list[Array] = [token_Bc]
        if token_scores:
            # Of the model's own distribution, whatever the rules have made of it.
            own_BbV = jax.nn.log_softmax(logits_RV).reshape(candidate_BbV.shape)
            chosen.append(own_BbV[rows_B1, parent_Bc, token_Bc])
        candidates = [
            lax.dynamic_update_index_in_dim(live_BbL[rows_B1, parent_Bc], new_Bc, step, axis=2)
            for live_BbL, new_Bc in zip(old.live, chosen, strict=True)
        ]
        is_end_Bc = jnp.isin(token_Bc, ends_E)
        if beam_rules.limit_ends:
            is_end_Bc |= step == max_new_tokens - 1
        may_finish_Bc = is_end_Bc
        if beam_rules.only_best_end:
            may_finish_Bc &= jnp.arange(count)[None] < beam_size

        ended_Bc = jnp.where(
            may_finish_Bc, score_Bc / penalty((step + 1).astype(jnp.float32), alpha), -jnp.inf
        )
        finished_score_Bb, best_Bb = lax.top_k(
            jnp.concatenate([old.finished_score, ended_Bc], axis=1), beam_size
        )

        def joined(old: Array, new: Array) -> Array:
            return jnp.concatenate([old, new], axis=1)[rows_B1, best_Bb]

        finished = [joined(*both) for both in zip(old.finished, candidates, strict=True)]
        finished_length_Bb = joined(old.finished_length, jnp.full_like(token_Bc, step + 1))

        live_score_Bb, best_live_Bb = lax.top_k(jnp.where(is_end_Bc, -jnp.inf, score_Bc), beam_size)
        live = [candidate_BcL[rows_B1, best_live_Bb] for candidate_BcL in candidates]
        cache = reorder(cache, parent_Bc[rows_B1, best_live_Bb])
        tokens_R = token_Bc[rows_B1, best_live_Bb].reshape(-1)

        # What a row has come to stays where its search is over, or met what is no number.
        new = _Hypotheses(
            live,
            live_score_Bb,
            old.live_length + 1,
            finished,
            finished_score_Bb,
            finished_length_Bb,
        )
        goes_on_B = is_open_B & is_finite_B
        hypotheses = jax.tree.map(
            lambda new, old: jnp.where(jnp.expand_dims(goes_on_B, range(1, new.ndim)), new, old),
            new,
            old,
        )
        return step + 1, tokens_R, hypotheses, is_finite_B, cache

    nothing = [jnp.full((batch, beam_size, max_new_tokens), pad_id, jnp.int32)]
    if token_scores:
        nothing.append(jnp.zeros((batch, beam_size, max_new_tokens)))
    no_score_Bb = jnp.full((batch, beam_size), -jnp.inf)
    state = (
        jnp.int32(0),
        jnp.repeat(as_int32(tokens_B), beam_size),
        _Hypotheses(
            live=nothing,
            # All beams start alike: only the first may have offspring.
            live_score=no_score_Bb.at[:, 0].set(0.0),
            live_length=jnp.zeros(batch, jnp.int32),
            finished=nothing,
            finished_score=no_score_Bb,
            finished_length=jnp.zeros((batch, beam_size), jnp.int32),
        ),
        jnp.full(batch, is_legal),
        cache,
    )
    steps, _, found, is_finite_B, _ = lax.while_loop(is_running, advance, state)

    # Live hypotheses are of use only where finished ones are missing: they rank behind those there.
    live_score_Bb = found.live_score / penalty(max_new_tokens, alpha)
    rank_Bb = jnp.where(found.finished_score == -jnp.inf, 2, 0)
    rank_Bc = jnp.concatenate([rank_Bb, jnp.ones_like(rank_Bb)], axis=1)
    order_Bb = jnp.argsort(rank_Bc, axis=1, stable=True)[:, :beam_size]

    def ranked(finished: Array, live: Array) -> Array:
        return jnp.concatenate([finished, live], axis=1)[rows_B1, order_Bb]

    score_Bb = ranked(found.finished_score, live_score_Bb)
    live_length_Bb = jnp.broadcast_to(found.live_length[:, None], found.finished_length.shape)
    length_Bb = ranked(found.finished_length, live_length_Bb)
    # A hypothesis that does not exist has no tokens.
    is_there_Bb = score_Bb > -jnp.inf
    tokens_BbL, *scores = (
        jnp.where(is_there_Bb[:, :, None], ranked(*both), blank)
        for *both, blank in zip(found.finished, found.live, (pad_id, 0.0), strict=False)
    )
    return Decoded(
        tokens_BbL,
        jnp.where(is_there_Bb, length_Bb, 0),
        steps,
        score_Bb,
        is_finite=is_finite_B,
        token_scores=scores[0] if token_scores else None,
    )
