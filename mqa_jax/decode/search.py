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
from collections.abc import Callable, Sequence
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
from mqa_jax.decode.history import Rule, check_rules, ruling
from mqa_jax.decode.logits import keep_above, keep_probable, scaled

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
    token_scores: Array | None = None


def greedy(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    max_new_tokens: int,
    eos_id: EndIds = None,
    pad_id: int = 0,
    rules: Sequence[Rule] = (),
    prompt: tuple[Array, Array] | None = None,
    token_scores: bool = False,
    begun: Decoded | None = None,
    steps: int | None = None,
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
      rules: what may be chosen, see `history` and `rules`; of tokens equally probable then, too,
        the one with the lowest id. Where they leave a row no token, it ends as one of which the
        logits are no numbers.
      prompt: for rules, what came before: tokens `[B, P]`, padded on the right, and how many of
        each row are real, `[B]`, `tokens_B` being the last of them. None: `tokens_B` alone.
      token_scores: whether to tell the log-probability of every token.
      begun: what a call with the same arguments, and `steps`, has decoded, to go on from: then
        `cache` is the one that it returned, and what is returned holds all tokens, from the first
        on. A row of which the host has made `length` less than `steps` has ended.
      steps: return after so many steps more, though rows have not ended; None: at the end.

    Raises:
      ValueError: `max_new_tokens` or `steps` below 1; numbers of a rule that make no sense;
        `eos_id`, `pad_id` or a token outside the vocabulary; shapes that do not fit; a `KVCache`
        without room for `L` more tokens. What is traced by `jax.jit` cannot be checked: ids
        outside the vocabulary, and tokens without room, become NaN in this package's models, which
        `Decoded.is_finite` tells.
    """

    def choose(logits_BV: Array, step: Array) -> tuple[Array, Array]:
        return jnp.argmax(logits_BV, axis=-1), logits_BV

    return _decode(
        step_fn,
        cache,
        tokens_B,
        choose,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        rules=rules,
        prompt=prompt,
        token_scores=token_scores,
        begun=begun,
        steps=steps,
    )


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
    min_p: ArrayLike | None = None,
    eos_id: EndIds = None,
    pad_id: int = 0,
    rules: Sequence[Rule] = (),
    prompt: tuple[Array, Array] | None = None,
    token_scores: bool = False,
    begun: Decoded | None = None,
    steps: int | None = None,
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
      min_p: only tokens at least that many times as probable as the most probable one, after
        `top_p`. One for all or `[B]`, one a row.
      Others: as `greedy`. All rules come before the temperature.

    Raises:
      ValueError: `temperature` not above 0, `top_k` below 1, `top_p` or `min_p` outside (0, 1], as
        many keys as there are not rows, and as `greedy`. A number that is traced and out of range
        ends its rows at once, `Decoded.is_finite` being False.
    """
    batch = np.shape(tokens_B)[:1]
    temperature = per_row("temperature", temperature, batch, ": for 0, use greedy", above=0)
    # What was traced has not been checked.
    is_legal = temperature > 0
    if top_p is not None:
        top_p = per_row("top_p", top_p, batch, above=0, most=1)
        is_legal &= (top_p > 0) & (top_p <= 1)
    if min_p is not None:
        min_p = per_row("min_p", min_p, batch, above=0, most=1)
        is_legal &= (min_p > 0) & (min_p <= 1)
    if top_k is not None:
        top_k = check_integer("top_k", top_k)
    keys = typed_keys(key)
    if keys.shape not in ((), batch):
        raise ValueError(
            f"key must be one PRNG key, or one a row, {list(batch)}: not {list(keys.shape)} of them"
        )
    keys_B = keys if keys.shape else jax.random.split(keys, batch)

    # A pytree, so that the loop knows of the arrays in it.
    choose = jax.tree_util.Partial(_draw, keys_B, temperature, top_k, top_p, min_p, is_legal)
    return _decode(
        step_fn,
        cache,
        tokens_B,
        choose,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        rules=rules,
        prompt=prompt,
        token_scores=token_scores,
        begun=begun,
        steps=steps,
    )


def _draw(
    keys_B: Array,
    temperature: np.ndarray | Array,
    top_k: int | None,
    top_p: np.ndarray | Array | None,
    min_p: np.ndarray | Array | None,
    is_legal: np.ndarray | Array,
    logits_BV: Array,
    step: Array,
) -> tuple[Array, Array]:
    logits_BV = keep_probable(scaled(logits_BV, temperature), top_k, top_p)
    if min_p is not None:
        logits_BV = keep_above(logits_BV, min_p)
    logits_BV = jnp.where(is_legal, logits_BV, jnp.nan)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(step_keys_B, logits_BV), logits_BV


def _decode(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    choose: Choose,
    *,
    max_new_tokens: int,
    eos_id: EndIds,
    pad_id: int,
    rules: Sequence[Rule],
    prompt: tuple[Array, Array] | None,
    token_scores: bool,
    begun: Decoded | None,
    steps: int | None,
) -> Decoded:
    """The loop of `greedy` and `sample`.

    `choose(logits_BV, step)` picks the next tokens, and returns them and the logits that it picked
    from: NaN if there is one, and minus infinity only where all are.
    """
    if steps is not None:
        steps = check_integer("steps", steps)
    # Of a decode that has begun, the cache holds a part already, and there was room for all.
    room = max_new_tokens if begun is None else 1
    ends_E, vocab_size = check_search(step_fn, cache, tokens_B, room, eos_id, pad_id)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    check_rules(rules, prompt, vocab_size, tokens_B.shape[0])
    if begun is not None:
        _check_begun(begun, tokens_B.shape[0], max_new_tokens, token_scores)
        begun = dataclasses.replace(begun, cache=None)
    return _search(
        explicit(step_fn, tokens_B, cache),
        cache,
        tokens_B,
        choose,
        max_new_tokens=max_new_tokens,
        ends_E=ends_E,
        pad_id=pad_id,
        rules=rules,
        prompt=prompt,
        token_scores=token_scores,
        begun=begun,
        steps=steps,
    )


def _check_begun(begun: Decoded, batch: int, max_new_tokens: int, token_scores: bool) -> None:
    """Raises ValueError unless it is of a decode like this one."""
    if begun.tokens.shape != (batch, max_new_tokens):
        raise ValueError(
            f"begun has tokens {list(begun.tokens.shape)}, not [{batch}, {max_new_tokens}]: go on "
            "with the arguments that it was begun with"
        )
    if token_scores != (begun.token_scores is not None):
        raise ValueError(f"token_scores={token_scores} is not what begun was begun with")


def _decoded_spec(cache: Cache, tokens_B: Array, token_scores: bool, **_: Any) -> Decoded:
    batch, no_split = spec(tokens_B), partition()
    return Decoded(
        batch,
        batch,
        no_split,
        cache=jax.tree.map(spec, cache),
        is_finite=batch,
        token_scores=batch if token_scores else None,
    )


@automatic(_decoded_spec)
def _search(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    choose: Choose,
    *,
    max_new_tokens: int,
    ends_E: Array,
    pad_id: int,
    rules: Sequence[Rule],
    prompt: tuple[Array, Array] | None,
    token_scores: bool,
    begun: Decoded | None,
    steps: int | None,
) -> Decoded:
    ruled, tokens_B = ruling(rules, tokens_B, prompt), as_int32(tokens_B)
    if begun is None:
        batch = tokens_B.shape[0]
        begun = Decoded(
            jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
            jnp.zeros(batch, jnp.int32),
            jnp.int32(0),
            is_finite=jnp.ones(batch, bool),
            token_scores=jnp.zeros((batch, max_new_tokens)) if token_scores else None,
        )
        is_ended_B = jnp.zeros(batch, bool)
    else:
        tokens_B = begun.tokens[:, begun.steps - 1]
        is_ended_B = (begun.length < begun.steps) | jnp.isin(tokens_B, ends_E)
    stop: int | Array = max_new_tokens
    if steps is not None:
        stop = jnp.minimum(begun.steps + min(steps, max_new_tokens), max_new_tokens)

    def is_running(state: tuple[Any, ...]) -> Array:
        decoded, _, is_ended_B = state
        return (decoded.steps < stop) & ~jnp.all(is_ended_B)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        decoded, tokens_B, is_ended_B = state
        step = decoded.steps
        given_BV, cache = step_fn(tokens_B, decoded.cache)
        given_BV = given_BV.astype(jnp.float32)
        logits_BV = given_BV if ruled is None else ruled(given_BV, decoded.tokens, step)
        chosen_B, logits_BV = choose(logits_BV, step)
        # NaN and infinity are chosen where they are: one logit a row tells of all of them.
        best_B = jnp.take_along_axis(logits_BV, chosen_B[:, None], axis=1)[:, 0]
        is_finite_B = decoded.is_finite & (jnp.isfinite(best_B) | is_ended_B)
        is_ended_B |= ~is_finite_B
        tokens_B = jnp.where(is_ended_B, pad_id, chosen_B.astype(jnp.int32))
        scores_BL = decoded.token_scores
        if scores_BL is not None:
            log_prob_BV = jax.nn.log_softmax(given_BV)
            score_B = jnp.take_along_axis(log_prob_BV, chosen_B[:, None], axis=1)[:, 0]
            score_B = jnp.where(is_ended_B, 0.0, score_B)
            scores_BL = lax.dynamic_update_index_in_dim(scores_BL, score_B, step, axis=1)
        decoded = Decoded(
            lax.dynamic_update_index_in_dim(decoded.tokens, tokens_B, step, axis=1),
            jnp.where(is_ended_B, decoded.length, decoded.length + 1),
            step + 1,
            cache=cache,
            is_finite=is_finite_B,
            token_scores=scores_BL,
        )
        return decoded, tokens_B, is_ended_B | jnp.isin(tokens_B, ends_E)

    state = (dataclasses.replace(begun, cache=cache), tokens_B, is_ended_B)
    decoded, _, _ = lax.while_loop(is_running, advance, state)
    return decoded
