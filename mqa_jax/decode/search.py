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

Each function is one `lax.while_loop` that ends as soon as every row has. Call them inside a
`jax.jit` of your own, so that they compile once a shape:

    @jax.jit
    def continue_prompt(params, last_token_B, cache):
        def step_fn(tokens_B, cache):
            return my_model(params, tokens_B, cache)
        return greedy(step_fn, cache, last_token_B, max_new_tokens=32, eos_id=2).tokens

Array letters: B batch   V vocabulary   L max_new_tokens   b beam   R rows, B * b
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from mqa_jax.core.explicit import automatic, explicit, spec
from mqa_jax.decode.logits import keep_probable

Cache = TypeVar("Cache")


StepFn = Callable[[Array, Cache], tuple[Array, Cache]]


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
        marks a hypothesis that does not exist (a vocabulary too small for so wide a beam).
      cache: greedy decoding and sampling only: the cache after the last step, which holds all but
        the last token. Return it from a jitted function that the first cache is donated to, and
        nothing is copied.
    """

    tokens: Array
    length: Array
    steps: Array
    score: Array | None = None
    cache: Cache | None = None


def greedy(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    pad_id: int = 0,
) -> Decoded:
    """The most probable token at every step.

    Args:
      step_fn: the model, see the head of this file.
      cache: holds what comes before `tokens_B`.
      tokens_B: `[B]` int32, the last token of every row so far (a prompt's last, or the
        beginning-of-sentence id), which the cache does not hold yet.
      max_new_tokens: `L`, how many tokens to decode at most.
      eos_id: the token that ends a row; None: rows end at `L` only.
      pad_id: what follows the end of a row.

    Raises:
      ValueError: `max_new_tokens` below 1, or `eos_id` outside the vocabulary.
    """
    return _decode(
        step_fn,
        cache,
        tokens_B,
        lambda logits_BV, step: jnp.argmax(logits_BV, axis=-1),
        max_new_tokens,
        eos_id,
        pad_id,
    )


def sample(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    *,
    key: Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
) -> Decoded:
    """A token drawn from the model's distribution at every step.

    Args:
      key: a PRNG key, or `[B]` keys, one a row: then what a row samples does not depend on the rows
        beside it.
      temperature: the logits are divided by it before all else.
      top_k: only the `top_k` most probable tokens are drawn (and those as probable as the last).
      top_p: only the most probable tokens are drawn, as few as have a probability of `top_p`
        together (Holtzman et al. 2019), after `top_k`.
      Others: as `greedy`.

    Raises:
      ValueError: `temperature` not above 0, `top_k` below 1, `top_p` outside (0, 1], and as
        `greedy`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: for 0, use greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    keys_B = jax.random.split(key, tokens_B.shape[0]) if key.ndim == 0 else key

    # A pytree, so that the loop knows of the arrays in it.
    choose = jax.tree_util.Partial(_draw, keys_B, temperature, top_k, top_p)
    return _decode(step_fn, cache, tokens_B, choose, max_new_tokens, eos_id, pad_id)


def _draw(keys_B, temperature, top_k, top_p, logits_BV: Array, step: Array) -> Array:
    logits_BV = keep_probable(logits_BV / temperature, top_k, top_p)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(step_keys_B, logits_BV)


def _decode(
    step_fn: StepFn,
    cache: Cache,
    tokens_B: Array,
    choose: Callable[[Array, Array], Array],
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int,
) -> Decoded:
    """The loop of `greedy` and `sample`; `choose(logits_BV, step)` picks the next tokens."""
    check_search(step_fn, cache, tokens_B, max_new_tokens, eos_id)
    step_fn = explicit(step_fn, tokens_B, cache)
    return _search(step_fn, cache, tokens_B, choose, max_new_tokens, eos_id, pad_id)


def _decoded_spec(cache: Cache, tokens_B: Array, **_) -> Decoded:
    batch, no_split = spec(tokens_B), PartitionSpec()
    return Decoded(batch, batch, no_split, cache=jax.tree.map(spec, cache))


@automatic(_decoded_spec)
def _search(step_fn, cache, tokens_B, choose, max_new_tokens, eos_id, pad_id) -> Decoded:
    batch = tokens_B.shape[0]

    def is_running(state):
        step, _, _, is_ended_B, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(is_ended_B)

    def advance(state):
        step, tokens_B, output_BL, is_ended_B, length_B, cache = state
        logits_BV, cache = step_fn(tokens_B, cache)
        chosen_B = choose(logits_BV.astype(jnp.float32), step).astype(jnp.int32)
        tokens_B = jnp.where(is_ended_B, pad_id, chosen_B)
        output_BL = lax.dynamic_update_index_in_dim(output_BL, tokens_B, step, axis=1)
        length_B = jnp.where(is_ended_B, length_B, length_B + 1)
        if eos_id is not None:
            is_ended_B |= tokens_B == eos_id
        return step + 1, tokens_B, output_BL, is_ended_B, length_B, cache

    state = (
        jnp.int32(0),
        tokens_B.astype(jnp.int32),
        jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        cache,
    )
    steps, _, output_BL, _, length_B, cache = lax.while_loop(is_running, advance, state)
    return Decoded(output_BL, length_B, steps, cache=cache)


def check_search(step_fn, cache, tokens_B, max_new_tokens: int, eos_id: int | None) -> int:
    """Raises ValueError on arguments that do not fit; returns the size of the vocabulary."""
    if tokens_B.ndim != 1:
        raise ValueError(f"tokens_B must have shape [B], not {list(tokens_B.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    batch = tokens_B.shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if leaf.ndim == 0 or leaf.shape[0] != batch:
            raise ValueError(
                f"cache{jax.tree_util.keystr(path)} has shape {list(leaf.shape)}, but everything "
                f"in the cache must have the {batch} rows of tokens_B in front; what is not a "
                "row's own belongs into step_fn"
            )
    logits, _ = jax.eval_shape(step_fn, tokens_B.astype(jnp.int32), cache)
    if logits.ndim != 2 or logits.shape[0] != batch:
        raise ValueError(f"step_fn must return logits [{batch}, V], not {list(logits.shape)}")
    vocab_size = logits.shape[1]
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id={eos_id} is not in the vocabulary of {vocab_size} tokens")
    return vocab_size
