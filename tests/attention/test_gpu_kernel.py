"""The kernel without a GPU: interpreted, against the same attention in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mqa_jax
from mqa_jax.attention.functional import attend
from mqa_jax.attention.kernels import gpu
from mqa_jax.decode.beam import expand, reorder

H = 16
TOLERANCE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2e-2, atol=2e-2)}


@pytest.fixture(autouse=True)
def _interpreted_pallas():
    # The interpreter itself is written without regard to these.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(actual, expected, dtype="float32"):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, equal_nan=False, **TOLERANCE[dtype])


def arrays(batch, length, heads, kv_heads, slots, dtype="float32"):
    query = normal(0, batch, length, heads, H, dtype=dtype)
    return query, *(normal(i, batch, kv_heads, slots, H, dtype=dtype) for i in (1, 2))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "splits", "dtype"),
    [
        (6, 6, 1, "float32"),
        (6, 2, 2, "float32"),
        (6, 1, 5, "float32"),
        (20, 1, 1, "float32"),
        (6, 1, 1, "bfloat16"),
        (6, 2, 5, "bfloat16"),
    ],
)
def test_the_first_slots_of_each_row(heads, kv_heads, splits, dtype):
    slots, end = 83, jnp.array([83, 1, 40])
    query, key, value = arrays(3, 1, heads, kv_heads, slots, dtype)
    # What lies behind the end is not seen.
    key, value = (x.at[1, :, 1:].set(1e4) for x in (key, value))
    got = gpu.flash_decode(
        query, key, value, end_B=end, scale=0.3, splits=splits, block=16, interpret=True
    )
    assert got.dtype == query.dtype
    mask = (jnp.arange(slots)[None] < end[:, None])[:, None, None]
    close(got, attend(query, key, value, mask, 0.3), dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("length", "mask_length"), [(1, 1), (5, 5), (5, 1)])
def test_masks_of_every_query_and_of_all(length, mask_length, splits):
    query, key, value = arrays(2, length, 6, 2, 70)
    mask = jnp.asarray(np.random.default_rng(3).random((2, mask_length, 70)) < 0.4)
    mask = mask.at[1, 0].set(False)  # A query that sees nothing.
    got = gpu.flash_decode(
        query, key, value, mask_BTS=mask, scale=0.3, splits=splits, block=16, interpret=True
    )
    close(got, attend(query, key, value, mask[:, None], 0.3))
    assert not np.any(got[1, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", ["end", "mask", "mask_of_each"])
def test_what_is_not_seen_may_be_anything_and_what_is_seen_spoils_its_query(kind, splits, bad):
    length, slots = 5 if kind == "mask_of_each" else 1, 70
    query, key, value = arrays(2, length, 6, 2, slots)
    mask = jnp.asarray(np.random.default_rng(3).random((2, length, slots)) < 0.4)
    if kind == "end":
        mask = jnp.arange(slots)[None, None] < jnp.array([[[70]], [[40]]])
    elif kind == "mask_of_each":
        mask = mask.at[:, 1:3, 7].set(True).at[:, 3:, 7].set(False).at[:, 0, 7].set(False)
    masks = dict(end_B=jnp.array([70, 40])) if kind == "end" else dict(mask_BTS=mask)
    run = functools.partial(
        gpu.flash_decode, scale=0.3, splits=splits, block=16, interpret=True, **masks
    )
    expected = run(query, key, value)
    is_hidden_BS = ~jnp.any(mask, axis=1)
    key, value = (jnp.where(is_hidden_BS[:, None, :, None], bad, x) for x in (key, value))
    close(run(query, key, value), expected)
    at = 7 if kind == "mask_of_each" else int(np.argmax(mask[1, 0]))
    output = np.asarray(run(query, key, value.at[1, :, at].set(bad)))
    sees_BT = np.asarray(mask[..., at]) & np.array([[False], [True]])
    assert not np.isfinite(output[sees_BT]).any()
    close(output[~sees_BT], expected[~sees_BT])


def test_a_cache_of_another_dtype_than_the_queries():
    query, key, value = arrays(2, 1, 6, 2, 70)
    key, value = (x.astype(jnp.bfloat16) for x in (key, value))
    end = jnp.array([70, 40])
    got = gpu.flash_decode(query, key, value, end_B=end, scale=0.3, block=16, interpret=True)
    assert got.dtype == query.dtype
    mask = (jnp.arange(70)[None] < end[:, None])[:, None, None]
    close(got, attend(query, key, value, mask, 0.3), "bfloat16")


def test_splits_fill_the_gpu_and_no_more():
    assert [gpu._splits(*x) for x in ((1024, 256), (128, 2048), (64, 8192))] == [1, 2, 4]
    assert gpu._splits(16, 16384) == 16
    assert gpu._splits(1, 2**20) == 128  # Each more is one more to combine.
    assert gpu._splits(1, 511) == 1  # A split has 256 slots at least.


def test_only_shapes_that_the_kernel_is_for(monkeypatch):
    query, key, _ = arrays(2, 1, 6, 1, 7)
    assert not gpu.is_supported(query, key)  # No GPU here.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert gpu.is_supported(query, key)
    assert not gpu.is_supported(jnp.zeros((2, 11, 6, H)), key)  # 66 rows
    assert not gpu.is_supported(query[..., :13], key[..., :13])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not gpu.is_supported(query, key)


@pytest.fixture
def _kernel_everywhere(monkeypatch):
    interpreted = functools.partial(gpu.flash_decode, interpret=True)
    monkeypatch.setattr(gpu, "flash_decode", interpreted)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("_kernel_everywhere")
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_decoding_through_the_kernel_equals_the_full_pass(kv_heads, window):
    attention = mqa_jax.Attention(12, 4, kv_heads, H, window=window, rngs=nnx.Rngs(0))
    x, lengths = normal(5, 2, 7, 12), np.array([2, 4])
    full = attention(x, is_causal=True)
    _, cache = attention.prefill(x[:, :4], attention.init_cache(2, 7), lengths)
    for step in range(3):
        at = lengths + step
        output, cache = attention.decode(x[[[0], [1]], at[:, None]], cache)
        close(output[:, 0], full[[0, 1], at])


@pytest.mark.usefixtures("_kernel_everywhere")
def test_beams_and_memories_go_through_the_kernel():
    attention = mqa_jax.MultiQueryAttention(12, 4, H, rngs=nnx.Rngs(0))
    memory, mask = normal(5, 2, 9, 12), jnp.arange(9)[None] < jnp.array([[9], [4]])
    x = normal(6, 6, 1, 12)
    output, _ = attention.decode(x, attention.init_cross_cache(memory, mask))
    expected = attention(x.reshape(2, 3, 12), memory, mask=mask[:, None, None])
    close(output, expected.reshape(6, 1, 12))

    cache = attention.init_cache(2, 5)
    _, cache = attention.prefill(memory[:, :3], cache)
    lanes = expand(cache, 3)
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), cache)
    for parents in ([[2, 0, 0], [1, 1, 2]], [[0, 1, 2], [0, 0, 0]]):
        got, lanes = attention.decode(x, lanes)
        expected, copies = attention.decode(x, copies)
        close(got, expected)
        lanes, copies = (reorder(c, jnp.array(parents)) for c in (lanes, copies))
