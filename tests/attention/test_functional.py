"""`dot_product_attention` against loops in float64, and against JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import TOLERANCE, close, normal, random_mask, to_float
from hypothesis import given, settings
from hypothesis import strategies as st

import mqa_jax
from mqa_jax.attention import functional

B, T, S, N, H, D = 2, 7, 11, 6, 5, 13
KV_HEADS = (6, 3, 1)
CASES = {  # keyword arguments, a mask by its shape; as many queries as keys, T of both
    "plain": {},
    "scale": dict(scale=0.3),
    "mask": dict(mask=(B, 1, T, T)),
    "mask_per_head": dict(mask=(B, N, T, T)),
    "mask_of_keys": dict(mask=(1, 1, 1, T)),
    "causal": dict(is_causal=True),
    "window": dict(window=3),
    "window_of_one": dict(window=1),
    "window_longer_than_all": dict(window=T + 2),
    "bias": dict(bias=(B, N, T, T)),
    "bias_of_keys": dict(bias=(1, N, 1, T)),
    "softcap": dict(softcap=0.5),
    "everything": dict(
        mask=(B, N, T, T), is_causal=True, window=4, scale=0.7, bias=(1, N, T, T), softcap=0.9
    ),
}


def loops(
    query,
    key,
    value,
    cotangent,
    *,
    mask=None,
    is_causal=False,
    window=None,
    scale=None,
    bias=0.0,
    softcap=None,
):
    """The definition, in float64: the output, and the gradients of `sum(output * cotangent)`."""
    query, key, value, cotangent = map(to_float, (query, key, value, cotangent))
    (batch, length, heads, head_dim), (_, keys, kv_heads, _) = query.shape, key.shape
    scale = head_dim**-0.5 if scale is None else scale
    mask = np.broadcast_to(True if mask is None else mask, (batch, heads, length, keys))
    bias = np.broadcast_to(bias, mask.shape).astype(np.float64)
    output, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
    for b, t, n in np.ndindex(batch, length, heads):
        k = n // (heads // kv_heads)
        seen = [
            s
            for s in range(keys)
            if mask[b, n, t, s]
            and (s <= t or not (is_causal or window))
            and (window is None or t - s < window)
        ]
        if not seen:
            continue
        logits = scale * key[b, seen, k] @ query[b, t, n] + bias[b, n, t, seen]
        slope = np.ones_like(logits)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
            slope = 1 - (logits / softcap) ** 2
        exp = np.exp(logits)
        weights = exp / exp.sum()
        d_weights = value[b, seen, k] @ cotangent[b, t, n]
        d_logits = scale * slope * weights * (d_weights - weights @ d_weights)
        output[b, t, n] = weights @ value[b, seen, k]
        d_query[b, t, n] = d_logits @ key[b, seen, k]
        d_key[b, seen, k] += np.outer(d_logits, query[b, t, n])
        d_value[b, seen, k] += np.outer(weights, cotangent[b, t, n])
    return output, d_query, d_key, d_value


def with_gradients(attention, query, key, value, cotangent, **kwargs):
    output, backward = jax.vjp(functools.partial(attention, **kwargs), query, key, value)
    return output, *backward(cotangent)


def inputs(kv_heads, keys, dtype="float32"):
    query, cotangent = (normal(i, B, T, N, H, dtype=dtype) for i in (0, 1))
    return query, *(normal(i, B, keys, kv_heads, H, dtype=dtype) for i in (2, 3)), cotangent


@pytest.mark.parametrize(
    ("kv_heads", "dtype"),
    [
        pytest.param(6, "float32", marks=pytest.mark.slow),
        (3, "float32"),
        pytest.param(1, "float32", marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_loops_and_jax_nn(case, kv_heads, dtype):
    kwargs = dict(CASES[case])
    if "mask" in kwargs:
        kwargs["mask"] = random_mask(4, kwargs["mask"])
    if "bias" in kwargs:
        kwargs["bias"] = normal(5, *kwargs["bias"], dtype=dtype)
    arrays = inputs(kv_heads, T, dtype)
    actual = with_gradients(mqa_jax.dot_product_attention, *arrays, **kwargs)
    assert [x.dtype for x in actual] == [dtype] * 4
    for result, expected in zip(actual, loops(*arrays, **kwargs), strict=True):
        close(result, expected, **TOLERANCE[dtype])
    if "softcap" in kwargs:
        return  # Which it does not have.
    window = kwargs.pop("window", None)
    local = {} if window is None else dict(local_window_size=(window - 1, 0))
    # jax.nn mixes dtypes inside.
    with jax.numpy_dtype_promotion("standard"):
        peer = with_gradients(jax.nn.dot_product_attention, *arrays, **kwargs | local)
    for result, expected in zip(actual, peer, strict=True):
        close(result, expected, **TOLERANCE[dtype])


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 6), seed=st.integers(0, 2**20), density=st.floats(0, 1)
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_shape_and_mask_equals_loops(sizes, seed, density):
    batch, length, keys, kv_heads, group, head_dim = sizes
    query, cotangent = (normal(seed + i, batch, length, kv_heads * group, head_dim) for i in (0, 1))
    key, value = (normal(seed + i, batch, keys, kv_heads, head_dim) for i in (2, 3))
    shape = (batch, kv_heads * group, length, keys)
    mask = np.random.default_rng(seed).random(shape) < density
    arrays = query, key, value, cotangent
    run = jax.jit(functools.partial(with_gradients, mqa_jax.dot_product_attention))
    for result, expected in zip(run(*arrays, mask=mask), loops(*arrays, mask=mask), strict=True):
        close(result, expected, **TOLERANCE["float32"])


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_a_row_that_sees_nothing_is_zero_with_zero_gradient(kv_heads):
    mask = random_mask(5, (B, N, T, T))
    mask[1, 2, 3] = mask[0, :, 4] = False
    arrays = inputs(kv_heads, T)
    with jax.debug_nans(True):  # no NaN on the way either
        output, d_query, d_key, d_value = with_gradients(
            mqa_jax.dot_product_attention, *arrays, mask=mask
        )
    for zeros in (output[1, 3, 2], output[0, 4], d_query[1, 3, 2], d_query[0, 4]):
        np.testing.assert_array_equal(zeros, np.zeros_like(zeros))
    blind = np.zeros((B, T, N), bool)
    blind[1, 3, 2] = blind[0, 4] = True
    assert np.abs(output)[~blind].min() > 0
    nothing = with_gradients(mqa_jax.dot_product_attention, *arrays, mask=np.zeros_like(mask))
    for zeros in nothing:
        np.testing.assert_array_equal(zeros, np.zeros_like(zeros))
    assert all(np.isfinite(x).all() for x in (output, d_query, d_key, d_value))


def test_softmax_of_bfloat16_inputs_is_taken_in_float32():
    # Logits 256 and 257: bfloat16 has no 257, and would weigh both keys alike.
    query = jnp.asarray([16.0, 1.0], jnp.bfloat16)[None, None, None]
    key = jnp.asarray([[16.0, 0.0], [16.0, 1.0]], jnp.bfloat16)[None, :, None]
    value = jnp.asarray([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16)[None, :, None]
    output = mqa_jax.dot_product_attention(query, key, value, scale=1.0)
    close(output[0, 0, 0], [1 / (1 + np.exp(-1))] * 2, rtol=0, atol=2**-8)  # 0.731, not 0.5


@pytest.mark.parametrize(
    "mask_kind",
    [
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("causal", marks=pytest.mark.slow),
        "keys",
        "full",
    ],
)
def test_queries_in_blocks_give_what_they_give_at_once(mask_kind, monkeypatch):
    _, key, value, _ = inputs(3, 17)
    query, cotangent = (normal(i, B, 17, N, H) for i in (0, 1))
    masks = dict(
        none=None,
        causal=np.tril(np.ones((17, 17), bool))[None, None],
        keys=random_mask(2, (B, 1, 1, 17)),
        full=random_mask(3, (B, N, 17, 17)),
    )
    attend = functools.partial(mqa_jax.dot_product_attention, mask=masks[mask_kind])
    expected = with_gradients(attend, query, key, value, cotangent)
    monkeypatch.setattr(functional, "QUERY_BLOCK", 5)  # 17 = 3 * 5 + 2
    assert "scan" in str(jax.make_jaxpr(attend)(query, key, value))
    got = with_gradients(attend, query, key, value, cotangent)
    for actual, wanted in zip(got, expected, strict=True):
        close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_hand_computed_multi_query():
    # Two heads, one key/value head; weights 1/4 and 3/4 for head 0, halves for head 1.
    query = jnp.asarray([[[[np.log(3.0)], [0.0]]]], jnp.float32)
    key = jnp.asarray([[[[0.0]], [[1.0]]]])
    value = jnp.asarray([[[[8.0]], [[16.0]]]])
    close(mqa_jax.dot_product_attention(query, key, value)[0, 0], [[14], [12]], rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "kwargs", "message"),
    [
        # A one-token query of a decode step would see key 0 only (flax issue 5591).
        (((2, 1, 6, 5), (2, 11, 3, 5)), dict(is_causal=True), "T=1 and S=11"),
        (((2, 7, 6, 5), (2, 11, 3, 5)), dict(window=4), "T=7 and S=11"),
        (((2, 7, 6, 5), (2, 7, 3, 5)), dict(window=0), "window must be at least 1.* not 0"),
        (((2, 7, 6, 5), (2, 11, 4, 5)), {}, "4 key/value heads do not divide the 6 query heads"),
        (((2, 7, 6, 5), (2, 11, 12, 5)), {}, "12 key/value heads do not divide the 6"),
        (((2, 7, 30), (2, 11, 3, 5)), {}, r"\(2, 7, 30\)"),
        (((2, 7, 6, 5), (2, 11, 5)), {}, r"\(2, 11, 5\)"),
        (((2, 7, 6, 5), (3, 11, 3, 5)), {}, r"share B and H.*\(3, 11, 3, 5\)"),
        (((2, 7, 6, 5), (2, 11, 3, 4)), {}, r"share B and H.*\(2, 11, 3, 4\)"),
        (((2, 7, 6, 5), (2, 11, 3, 5), (2, 10, 3, 5)), {}, r"\(2, 10, 3, 5\)"),
        (((2, 7, 6, 5), (2, 11, 3, 5)), dict(mask=np.ones((7, 11), bool)), r"bool \[7, 11\]"),
        (((2, 7, 6, 5), (2, 11, 3, 5)), dict(mask=np.ones((2, 3, 7, 11), bool)), r"\[2, 3, 7, 11"),
        (((2, 7, 6, 5), (2, 11, 3, 5)), dict(mask=np.ones((2, 1, 7, 11), np.int32)), "not int32"),
    ],
)
def test_misfits_raise(shapes, kwargs, message):
    query, key, *value = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        mqa_jax.dot_product_attention(query, key, value[0] if value else key, **kwargs)


@pytest.mark.parametrize("sizes", [(0, 7, 11), (2, 0, 11), (2, 7, 0), (0, 0, 0)])
@pytest.mark.parametrize("kwargs", [{}, dict(mask=np.ones((1, 1, 1, 1), bool))])
def test_empty_axes_give_zeros(sizes, kwargs):
    batch, length, keys = sizes
    query, key = jnp.ones((batch, length, N, H)), jnp.ones((batch, keys, 3, H))
    attend = functools.partial(mqa_jax.dot_product_attention, **kwargs)
    output, backward = jax.vjp(attend, query, key, key)
    np.testing.assert_array_equal(output, np.zeros(query.shape))
    for gradient, x in zip(backward(output), (query, key, key), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(x.shape))


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("dtype", [np.int32, np.complex64, bool])
def test_only_floats_are_attended_to(at, dtype):
    arrays = [np.ones((2, 7, 3, 5), np.float32)] * 3
    arrays[at] = arrays[at].astype(dtype)
    with pytest.raises(ValueError, match=f"must be floats, not {np.dtype(dtype).name}"):
        mqa_jax.dot_product_attention(*arrays)


@pytest.mark.parametrize("kind", [lambda x: x, jnp.asarray])
@pytest.mark.parametrize("scale", [np.nan, np.inf, True, np.ones(2), np.ones(7)])
def test_a_scale_is_a_finite_number(scale, kind):
    attend = functools.partial(mqa_jax.dot_product_attention, *[jnp.ones((2, 7, 3, 5))] * 3)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        attend(scale=kind(scale))
    if np.shape(scale) or scale is True:
        with pytest.raises(ValueError, match="scale must be one number"):
            jax.jit(lambda scale: attend(scale=scale))(scale)


def test_a_scale_is_no_text():
    with pytest.raises(ValueError, match="scale must be a finite number, not '1'"):
        mqa_jax.dot_product_attention(*[jnp.ones((2, 7, 3, 5))] * 3, scale="1")


@pytest.mark.parametrize("softcap", [0.0, -1.0, np.nan, np.inf, True, "1"])
def test_a_softcap_is_a_finite_number_above_zero(softcap):
    with pytest.raises(ValueError, match="softcap must be a finite number, above 0"):
        mqa_jax.dot_product_attention(*[jnp.ones((2, 7, 3, 5))] * 3, softcap=softcap)


def test_a_scale_may_be_learned():
    query, key, value, _ = inputs(3, T)

    def total(scale, mask=None):
        return mqa_jax.dot_product_attention(query, key, value, scale=scale, mask=mask).sum()

    mask = random_mask(4, (B, 1, T, T))
    for kwargs in ({}, dict(mask=mask)):
        got = jax.jit(jax.grad(functools.partial(total, **kwargs)))(jnp.float32(0.3))
        above, below = (float(total(jnp.float32(x), **kwargs)) for x in (0.31, 0.29))
        np.testing.assert_allclose(got, (above - below) / 0.02, rtol=2e-2, atol=1e-2)


def test_lists_and_mixed_dtypes():
    query, key, value, _ = inputs(3, T)
    expected = mqa_jax.dot_product_attention(query, key, value)
    lists = (x.tolist() for x in (query, key, value))
    close(mqa_jax.dot_product_attention(*lists), expected, **TOLERANCE["float32"])
    mixed = mqa_jax.dot_product_attention(query, key.astype(jnp.bfloat16), value)
    assert mixed.dtype == query.dtype
    close(mixed, expected, rtol=4e-2, atol=4e-2)
