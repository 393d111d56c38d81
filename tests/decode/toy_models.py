"""Models of a few numbers, and searches over them: what the tests of searches share.

B batch   V vocabulary   L max_new_tokens   R rows   D hidden
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import settings
from hypothesis import strategies as st

from mqa_jax import beam_search, greedy, sample

EOS = 2
# Scores are sums of a few float32 log-probabilities.
CLOSE = dict(rtol=1e-5, atol=1e-5)
START = np.array([1, 4], np.int32)
seeds = st.integers(0, 2**31)


def property_test(max_examples):
    return settings(derandomize=True, deadline=None, max_examples=max_examples)


class Chain(NamedTuple):
    """A Markov chain; its logits hang on the position too."""

    logits_LVV: jax.Array

    def cache(self, batch):
        return {"position": jnp.zeros(batch, jnp.int32)}

    def step(self, tokens_R, cache):
        position_R = cache["position"]
        return self.logits_LVV[position_R, tokens_R], {"position": position_R + 1}


class Historian(NamedTuple):
    """Logits that hang on every token so far, which the cache keeps: a wrong reorder shows."""

    embed_LVD: jax.Array
    out_DV: jax.Array
    bias_V: jax.Array

    @classmethod
    def random(cls, seed, length, vocab_size, eos_bias=0.0, holes=()):
        """Token `v` at position `l`, of `(l, v)` in `holes`, makes NaN of all that follows it."""
        rng = np.random.default_rng(seed)
        embed, out = rng.normal(size=(length, vocab_size, 5)), rng.normal(size=(5, vocab_size))
        for hole in holes:
            embed[hole] = np.nan
        bias = eos_bias * np.eye(vocab_size)[EOS % vocab_size]
        return cls(*(jnp.asarray(x, jnp.float32) for x in (embed, out, bias)))

    def cache(self, batch):
        history_BL = jnp.zeros((batch, self.embed_LVD.shape[0]), jnp.int32)
        return {"history": history_BL, "length": jnp.zeros(batch, jnp.int32)}

    def step(self, tokens_R, cache):
        (rows, length), at_R = cache["history"].shape, cache["length"]
        history_RL = cache["history"].at[jnp.arange(rows), at_R].set(tokens_R)
        x_RLD = self.embed_LVD[jnp.arange(length)[None], history_RL]
        is_past_RL = jnp.arange(length)[None] <= at_R[:, None]
        x_RD = jnp.sum(jnp.where(is_past_RL[..., None], x_RLD, 0.0), axis=1)
        logits_RV = jnp.tanh(x_RD) @ self.out_DV + self.bias_V[None]
        return logits_RV, {"history": history_RL, "length": at_R + 1}

    def log_prob(self, history):
        """The same for one history, in float64."""
        embed, out, bias = (np.asarray(x, np.float64) for x in self)
        logits = np.tanh(sum(embed[i, token] for i, token in enumerate(history))) @ out + bias
        return logits - np.log(np.sum(np.exp(logits)))


def random_model(model_type, config):
    """Weights from NumPy, since JAX would compile for every shape of them."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model_type(config, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, weights)


@functools.cache
def compiled(search, **options):
    def run(model, tokens_B, **arrays):
        cache = model.cache(tokens_B.shape[0])
        return search(model.step, cache, tokens_B, **options, **arrays)

    return jax.jit(run)


def decode(search, model, tokens, *, key=None, **options):
    """`search` under `jax.jit`, compiled once for all models of like shape; results in NumPy."""
    arrays = {} if key is None else {"key": key}
    return jax.device_get(compiled(search, **options)(model, jnp.asarray(tokens), **arrays))


SEARCHES = {
    "greedy": greedy,
    "sample": functools.partial(sample, key=jax.random.key(0)),
    "beam_search": functools.partial(beam_search, beam_size=3),
}


def successors(vocab_size, follows, length):
    logits_VV = np.random.default_rng(0).normal(size=(vocab_size, vocab_size))
    for token, successor in follows.items():
        logits_VV[token, successor] = 9.0
    return Chain(jnp.asarray(np.broadcast_to(logits_VV, (length, *logits_VV.shape)), jnp.float32))


FOLLOWS = {0: 6, 1: 3, 2: 4, 3: 5, 4: 2, 5: 2, 6: 0}
