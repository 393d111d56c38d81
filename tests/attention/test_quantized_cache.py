"""Keys and values in eight bits: every cache, beside one of floats that NumPy has rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from mqa_jax import Attention
from mqa_jax.attention import cache as caches
from mqa_jax.attention.cached import attend_to_cache
from mqa_jax.attention.positions import Rope
from mqa_jax.core.quantized import Quantized, held

B, T, D, H = 3, 6, 16, 8
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
MEMORY = jnp.asarray(RNG.normal(size=(B, 5, D)), jnp.float32)
LENGTHS = np.array([6, 1, 3])


def as_numpy(x, dtype):
    """Floats that eight bits hold: a scale for the vectors of the last axis."""
    x = np.asarray(x, np.float32)
    most = np.max(np.abs(x), axis=-1, keepdims=True)
    largest = 127 if dtype == "int8" else 448
    scaled = x * np.divide(largest, most, out=np.zeros_like(most), where=most > 0)
    values = np.round(scaled) if dtype == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    return jnp.asarray(values.astype(np.float32) * (most / np.float32(largest)))


class Rounded(Attention):
    """Attention whose keys and values are rounded before they come into a cache of floats."""

    def project_key_value(self, x_BSD, positions_BS):
        key, value = super().project_key_value(x_BSD, positions_BS)
        return as_numpy(key, self.kind), as_numpy(value, self.kind)


def pair(dtype, num_kv_heads, **options):
    """The module with caches of eight bits, and the one beside it."""
    options = dict(head_dim=H, qkv_bias=True) | options
    ours = Attention(D, 4, num_kv_heads, cache_dtype=dtype, rngs=nnx.Rngs(0), **options)
    theirs = Rounded(D, 4, num_kv_heads, rngs=nnx.Rngs(0), **options)
    theirs.kind = dtype
    return ours, theirs


def ragged(attention):
    """A prompt in chunks, then steps, each row at its own position."""
    cache, outputs = attention.init_cache(B, 2 * T + 4), []
    for chunk in (X, X[:, ::-1]):
        y, cache = attention.prefill(chunk, cache, LENGTHS)
        outputs.append(jnp.where(jnp.arange(T)[None, :, None] < LENGTHS[:, None, None], y, 0))
    for step in range(3):
        y, cache = attention.decode(X[:, step : step + 1], cache)
        outputs.append(y)
    return outputs, cache


def beams(attention):
    """Hypotheses that begin alike, part, and replace each other."""
    cache = attention.init_cache(B, T + 4)
    _, cache = attention.prefill(X, cache, LENGTHS)
    cache, outputs = cache.expand(2), []
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2 * B, 1, D)), jnp.float32)
    for x, parents in zip(
        rows, ([[0, 1]] * B, [[1, 1], [0, 0], [1, 0]], [[0, 0]] * B), strict=True
    ):
        cache = cache.reorder(jnp.asarray(parents))
        y, cache = attention.decode(x, cache)
        outputs.append(y)
    return outputs, cache


def cross(attention):
    """Two rows a source, of which a part is padding."""
    mask = np.arange(5) < np.array([5, 2, 3])[:, None]
    cache = attention.init_cross_cache(MEMORY, mask)
    y, cache = attention.decode(jnp.concatenate([X[:, :1], X[:, 1:2]]), cache)
    return [y], cache


PATHS = {
    "multi_head": (ragged, 4, dict()),
    "multi_query, rope": (ragged, 1, dict(rope=Rope())),
    "ring": (ragged, 2, dict(window=4)),
    "ring, multi_query": (ragged, 1, dict(window=3, qk_norm=True)),
    "softcap": (ragged, 2, dict(softcap=2.0, scale=0.7)),
    "beams": (beams, 1, dict()),
    "beams, multi_head": (beams, 4, dict()),
    "cross": (cross, 1, dict()),
    "cross, grouped": (cross, 2, dict()),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_every_path_attends_to_what_is_rounded(path, dtype):
    run, num_kv_heads, options = PATHS[path]
    ours, theirs = pair(dtype, num_kv_heads, **options)
    (found, cache), (expected, wide) = run(ours), run(theirs)
    for y, z in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    for quantized, floats in ((cache.key, wide.key), (cache.value, wide.value)):
        assert isinstance(quantized, Quantized) and quantized.values.dtype.itemsize == 1
        assert quantized.scales.shape == quantized.shape[:-1] == floats.shape[:-1]
        np.testing.assert_allclose(quantized.widened(), floats, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_how_wrong_it_can_be_follows_from_the_scales(num_kv_heads):
    """A key is wrong by half of its scale at most in each of `H` numbers, so a logit by `d`, a
    weight of the softmax by a factor of `exp(2 d)`; and a value by half of its own scale."""
    ours, _ = pair("int8", num_kv_heads)
    exact = Attention(D, 4, num_kv_heads, head_dim=H, qkv_bias=True, rngs=nnx.Rngs(0))
    for attention in (ours, exact):  # What comes out of the heads.
        attention.out[...] = jnp.eye(4 * H)[:D].reshape(D, 4, H)
    caches = [attention.prefill(X, attention.init_cache(B, 8))[1] for attention in (ours, exact)]
    y, cache = ours.decode(X[:, :1], caches[0])
    z, wide = exact.decode(X[:, :1], caches[1])
    query_BNH = np.abs(exact.project_query(X[:, :1], None))[:, 0]
    group = 4 // num_kv_heads
    key_BN = np.repeat(np.max(cache.key.scales, axis=2), group, axis=1) / 2
    value_BN = np.repeat(np.max(cache.value.scales, axis=2), group, axis=1) / 2
    most_BN = np.repeat(np.max(np.abs(wide.value), axis=(2, 3)), group, axis=1)
    d_BN = H**-0.5 * key_BN * query_BNH.sum(-1)
    bound_BN = np.expm1(2 * d_BN) * most_BN + np.exp(2 * d_BN) * value_BN
    wrong = np.abs(np.asarray(y - z)[:, 0]).reshape(B, 2, H)  # Two of the heads.
    assert np.all(wrong <= 1.0001 * bound_BN[:, :2, None] + 1e-6) and np.max(wrong) > 1e-4
    assert np.max(bound_BN) < 0.5


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_what_a_cache_may_hold(dtype):
    """Nothing, zeros, and one that stands out; what is not finite spoils those that see it."""
    ours, theirs = pair(dtype, 1, qkv_bias=False)
    cache = ours.init_cache(2, 4)
    assert cache.key.values.shape == (2, 1, 4, H) and not np.any(cache.key.widened())
    x = np.zeros((2, 3, D), np.float32)
    x[1, 1] = 1e6
    x[1, 2] = 1e-3
    for attention in (ours, theirs):
        y, cache = attention.prefill(jnp.asarray(x), attention.init_cache(2, 4))
        assert np.isfinite(y).all() and not np.any(y[0])
    spoiled = jnp.asarray(x).at[0, 1].set(jnp.nan)
    y, cache = ours.prefill(spoiled, ours.init_cache(2, 4))
    np.testing.assert_array_equal(np.isnan(y).all(-1), [[False, True, True], [False] * 3])
    # Behind a row's end it is hidden, whatever it is.
    y, cache = ours.prefill(spoiled, ours.init_cache(2, 4), [1, 3])
    y, cache = ours.decode(jnp.ones((2, 1, D)), cache)
    assert np.isfinite(y).all()
    hidden = dataclasses.replace(
        cache.value, scales=jnp.where(jnp.arange(4) < 2, cache.value.scales, jnp.nan)
    )
    cache = dataclasses.replace(cache, length=jnp.array([1, 1]), value=hidden)
    assert np.isfinite(ours.decode(jnp.ones((2, 1, D)), cache)[0]).all()


def test_dtypes_of_caches():
    attention = Attention(D, 4, 1, rngs=nnx.Rngs(0))
    assert attention.init_cache(1, 4, "int8").key.values.dtype == jnp.int8
    assert attention.init_cache(1, 4, "fp8").value.values.dtype == jnp.float8_e4m3fn
    assert attention.init_cache(1, 4, "bfloat16").key.dtype == jnp.bfloat16
    for bad in ("int4", "int16", 3, "float8_e5m2"):
        with pytest.raises(ValueError, match=r"dtype must be float32, .* int8 or fp8, not"):
            attention.init_cache(1, 4, bad)
    with pytest.raises(ValueError, match="cache_dtype must be float32, .* not 'int4'"):
        Attention(D, 4, 1, cache_dtype="int4", rngs=nnx.Rngs(0))


def test_a_cache_can_be_donated():
    ours, _ = pair("int8", 1)
    step = jax.jit(lambda x, cache: ours.decode(x, cache), donate_argnums=1)
    cache = ours.init_cache(B, 4)
    _, after = step(X[:, :1], cache)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache)) and int(after.length[0]) == 1


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("length", [1, 3])
def test_queries_have_a_gradient(dtype, length):
    """As over floats; a scale that is hidden and not finite has no part in it."""
    draw = np.random.default_rng(2).normal
    query = jnp.asarray(draw(size=(2, length, 4, H)), jnp.float32)
    key, value = (held(jnp.asarray(draw(size=(2, 2, 7, H)), jnp.float32), dtype) for _ in range(2))
    mask = jnp.arange(7)[None, None, None] < jnp.array([5, 2])[:, None, None, None]

    def gradient(key, value):
        return jax.grad(lambda query: jnp.sum(jnp.sin(attend_to_cache(query, key, value, mask))))(
            query
        )

    expected = gradient(key.widened(), value.widened())
    key, value = (
        dataclasses.replace(x, scales=x.scales.at[..., 6].set(jnp.nan)) for x in (key, value)
    )
    np.testing.assert_allclose(gradient(key, value), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_tpu_writes_what_others_write(dtype):
    draw = np.random.default_rng(3).normal
    buffers = tuple(held(jnp.asarray(draw(size=(4, 2, 7, H)), jnp.float32), dtype) for _ in "kv")
    new = tuple(jnp.asarray(draw(size=(4, 1, 2, H)), jnp.float32) for _ in "kv")
    slot = jnp.array([[0], [6], [7], [caches.LOST]])
    expected = caches.put(buffers, slot, new)
    for buffer, x, there in zip(buffers, new, expected, strict=True):
        found = caches._put_chosen(buffer, slot, x)
        jax.tree.map(np.testing.assert_array_equal, found, there)
        assert np.any(found.values != buffer.values)
