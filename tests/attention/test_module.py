"""The `Attention` modules against Flax, and what they promise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import TOLERANCE, close, normal, random_mask
from flax import nnx

import mqa_jax

B, T, S, N, H, D = 2, 7, 11, 6, 5, 13


def module(kv_heads=3, **kwargs):
    return mqa_jax.Attention(D, N, kv_heads, H, **dict(rngs=nnx.Rngs(0)) | kwargs)


@pytest.mark.parametrize(
    ("kv_heads", "is_cross"),
    [
        pytest.param(6, 0, marks=pytest.mark.slow),
        (3, 0),
        pytest.param(1, 0, marks=pytest.mark.slow),
        (1, 1),
    ],
)
def test_module_equals_flax_with_the_same_weights(kv_heads, is_cross):
    ours = module(kv_heads)
    theirs = nnx.MultiHeadAttention(
        N, D, N * H, num_kv_heads=kv_heads, use_bias=False, decode=False, rngs=nnx.Rngs(1)
    )
    for name in ("query", "key", "value", "out"):
        # Flax puts the inputs first.
        weight = jnp.moveaxis(getattr(ours, name)[...], *((0, -1) if name == "out" else (-1, 0)))
        assert weight.shape == getattr(theirs, name).kernel.shape
        getattr(theirs, name).kernel[...] = weight
    x, memory = normal(0, B, T, D), normal(1, B, S, D) if is_cross else None
    mask = random_mask(2, (B, N, T, S if is_cross else T))
    causal = np.tril(np.ones((T, T), bool))[None, None]
    expected = theirs(x, memory, mask=mask if is_cross else mask & causal)
    close(ours(x, memory, mask=mask, is_causal=not is_cross), expected, **TOLERANCE["float32"])


@pytest.mark.parametrize("window", [None, 1, 3, T])
def test_gradient_reaches_what_is_visible_and_nothing_else(window):
    attention = module(1, window=window)
    jacobian = jax.jit(jax.jacobian(lambda x: attention(x[None], is_causal=True)[0]))
    largest_TS = np.abs(jacobian(normal(3, T, D))).max(axis=(1, 3))
    distance = np.arange(T)[:, None] - np.arange(T)
    np.testing.assert_array_equal(largest_TS > 0, (distance >= 0) & (distance < (window or T)))


@pytest.mark.parametrize(
    ("make", "kv_heads"),
    [
        (mqa_jax.MultiHeadAttention, 6),
        (functools.partial(mqa_jax.GroupedQueryAttention, num_kv_heads=3), 3),
        (mqa_jax.MultiQueryAttention, 1),
    ],
)
def test_classes_differ_in_their_key_value_heads(make, kv_heads):
    attention = make(d_model=12, num_heads=6, rngs=nnx.Rngs(0))  # head_dim is 12 / 6
    _, state = nnx.split(attention)
    shapes = {path[0]: variable.shape for path, variable in nnx.to_flat_state(state)}
    kv_shape = (kv_heads, 2, 12)
    expected = dict(query=(6, 2, 12), key=kv_shape, value=kv_shape, out=(12, 6, 2))
    assert shapes == expected
    assert attention.init_cache(2, 7).key.shape == (2, kv_heads, 7, 2)


def test_linen_users_get_the_same_module():
    linen = nnx.bridge.to_linen(mqa_jax.MultiQueryAttention, D, N, H, window=3)
    x = normal(0, B, T, D)
    variables = jax.jit(linen.init)(jax.random.key(1), x)
    ours = module(1, window=3)
    for name in ("query", "key", "value", "out"):
        getattr(ours, name)[...] = variables["params"][name].value
    output = jax.jit(linen.apply)(variables, x)
    close(output, ours(x), **TOLERANCE["float32"])
    loss = jax.jit(jax.grad(lambda v: linen.apply(v, x).sum()))
    assert np.abs(loss(variables)["params"]["key"].value).max() > 0


def test_an_initializer_is_asked_for_inputs_and_outputs():
    """So that those of flax, which go by these, draw what they say."""
    asked = []

    def count(key, shape, dtype):
        asked.append(shape)
        return jnp.arange(math.prod(shape), dtype=dtype).reshape(shape)

    attention = module(3, kernel_init=count)
    assert asked == [(D, N * H), (D, 3 * H), (D, 3 * H), (N * H, D)]
    # Input `d` of output `o` is `d * O + o`; the weights have the outputs first.
    close(attention.query[1, 2], np.arange(D) * N * H + 1 * H + 2, rtol=0, atol=0)
    close(attention.out[4].ravel(), np.arange(N * H) * D + 4, rtol=0, atol=0)


def test_dropout_zeroes_or_scales_each_weight_where_rngs_are_given():
    attention = mqa_jax.MultiQueryAttention(D, 1, H, dropout_rate=0.75, rngs=nnx.Rngs(0))
    x = normal(0, 59, 1, D)  # 59 rows whose only weight is 1: dropout makes it 0 or 4
    plain, first, again, other = (
        np.asarray(attention(x, rngs=rngs))
        for rngs in (None, nnx.Rngs(dropout=1), nnx.Rngs(dropout=1), nnx.Rngs(dropout=2))
    )
    kept = np.abs(first).max(axis=(1, 2)) > 0
    assert 0 < kept.sum() < 30
    close(first, 4 * plain * kept[:, None, None], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(first, again)
    assert (np.abs(other).max(axis=(1, 2)) > 0).tolist() != kept.tolist()
    attention.dropout.rate = 0.0
    np.testing.assert_array_equal(attention(x), plain)


def test_dropout_leaves_a_key_out_for_all_queries_of_a_head():
    """Queries of zero weigh all keys alike, so what is left out is all that outputs tell."""
    attention = mqa_jax.MultiQueryAttention(D, 1, H, dropout_rate=0.5, rngs=nnx.Rngs(0))
    attention.query[...] = jnp.zeros_like(attention.query[...])
    x = normal(0, B, T, D)
    output = attention(x, rngs=nnx.Rngs(dropout=1))
    assert np.abs(output - attention(x)).max() > 0.1
    close(output, output[:, :1].repeat(T, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtype_is_that_of_outputs_and_caches_and_param_dtype_of_weights(dtype):
    def build():
        attention = module(1, dtype=dtype, param_dtype="float32")
        cache = attention.init_cache(2, 3)
        output = attention(jnp.zeros((B, T, D)))
        return output, cache.key, cache.value, module(1, param_dtype=dtype).key[...]

    assert [x.dtype for x in nnx.eval_shape(build)] == [dtype] * 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_kv_heads=4), "num_kv_heads=4 does not divide num_heads=6"),
        (dict(num_kv_heads=0), "num_kv_heads must be at least 1, not 0"),
        (dict(num_heads=-6), "num_heads must be at least 1, not -6"),
        (dict(d_model=0), "d_model must be at least 1, not 0"),
        (dict(head_dim=None), "num_heads=6 does not divide d_model=13"),
        (dict(head_dim=0), "head_dim must be at least 1, not 0"),
        (dict(window=0), "window must be at least 1, not 0"),
        (dict(window=2.5), "window must be an integer, not 2.5"),
        (dict(head_dim=True), "head_dim must be an integer, not True"),
        (dict(num_heads=6.0), "num_heads must be an integer, not 6.0"),
        (dict(d_model="13"), "d_model must be an integer, not '13'"),
        (dict(dropout_rate=-0.5), "dropout_rate must be .* not -0.5"),
        (dict(dropout_rate=np.nan), "dropout_rate must be .* not nan"),
        (dict(dropout_rate=1.5), "dropout_rate must be .* not 1.5"),
        (dict(dropout_rate=1.0), "dropout_rate must be .* not 1.0"),
        (dict(dtype="fp16"), "dtype must be a floating-point type, .* not 'fp16'"),
        (dict(dtype=jnp.int32), "dtype must be a floating-point type"),
        (dict(param_dtype=int), "param_dtype must be a floating-point type"),
    ],
)
def test_bad_sizes_raise(kwargs, message):
    sizes = dict(d_model=D, num_heads=N, num_kv_heads=3, head_dim=H) | kwargs
    with pytest.raises(ValueError, match=message):
        mqa_jax.Attention(**sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("x_shape", "memory_shape", "kwargs", "message"),
    [
        ((T, D), None, {}, r"\[B, T, 13\], not \[7, 13\] \(one row: x\[None\]\)"),
        ((B, T, 12), None, {}, r"not \[2, 7, 12\]"),
        ((B, T, D), (3, S, D), {}, r"memory_BSD must have shape \[2, S, 13\], not \[3, 11, 13\]"),
        ((B, T, D), (B, S, D), dict(is_causal=True), "is_causal=True, window=None"),
        ((B, T, D), None, dict(mask=np.ones((B, T), bool)), r"four axes .* not bool \[2, 7\]"),
        ((B, T, D), None, dict(mask=np.ones((B, 1, 1, T))), "not float64"),
    ],
)
def test_bad_inputs_raise(x_shape, memory_shape, kwargs, message):
    memory = None if memory_shape is None else jnp.zeros(memory_shape)
    with pytest.raises(ValueError, match=message):
        module()(jnp.zeros(x_shape), memory, **kwargs)


def test_a_window_and_a_memory_raise():
    with pytest.raises(ValueError, match="window=3 with a memory"):
        module(window=3)(jnp.zeros((B, T, D)), jnp.zeros((B, S, D)))


@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_only_floats_are_projected(dtype):
    attention, x = module(), np.ones((B, T, D), dtype)
    for misuse in (
        lambda: attention(x),
        lambda: attention(np.ones((B, T, D)), x),
        lambda: attention.prefill(x, attention.init_cache(B, T)),
        lambda: attention.decode(x[:, :1], attention.init_cache(B, T)),
        lambda: attention.init_cross_cache(x),
    ):
        with pytest.raises(ValueError, match=f"must be floats, not {np.dtype(dtype).name}"):
            misuse()


def test_lists_and_numpy_arrays():
    attention, x = module(), normal(0, B, T, D)
    mask = random_mask(1, (B, 1, T, T))
    expected = attention(x, mask=mask)
    for as_what in (np.asarray, lambda x: np.asarray(x, np.float64), lambda x: x.tolist()):
        close(attention(as_what(x), mask=mask.tolist()), expected, **TOLERANCE["float32"])
        output, _ = attention.prefill(as_what(x), attention.init_cache(B, T), [T, T])
        close(output, attention(x, is_causal=True), **TOLERANCE["float32"])


@pytest.mark.parametrize("sizes", [(0, T), (B, 0)])
def test_empty_axes(sizes):
    attention, x = module(), jnp.zeros((*sizes, D))
    assert attention(x, is_causal=True).shape == x.shape
    assert attention(x, jnp.zeros((sizes[0], S, D))).shape == x.shape
    if sizes[0]:
        cache = attention.init_cache(B, T)
        output, same = attention.prefill(x, cache)
        assert output.shape == x.shape and same is cache
    no_memory = attention(normal(0, B, T, D), jnp.zeros((B, 0, D)))
    np.testing.assert_array_equal(no_memory, np.zeros((B, T, D)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_head_in_half_precision_at_batch_one(dtype):
    """XLA on a CPU lacked the product of two projections of so few rows."""
    attention = mqa_jax.Attention(8, 1, 1, dtype=dtype, rngs=nnx.Rngs(0))
    x = normal(0, 1, 5, 8, dtype=dtype)

    @jax.jit
    def run(x):
        prefilled, _ = attention.prefill(x, attention.init_cache(1, 8))
        crossed, _ = attention.decode(x, attention.init_cross_cache(x))
        return attention(x, is_causal=True), prefilled, crossed, attention(x)

    full, prefilled, crossed, both_ways = run(x)
    close(prefilled, full, rtol=4e-2, atol=4e-2)
    close(crossed, both_ways, rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize(
    ("kv_heads", "window", "dtype"),
    [
        pytest.param(6, None, "bfloat16", marks=pytest.mark.slow),
        (1, None, "float32"),
        pytest.param(1, None, "float16", marks=pytest.mark.slow),
        pytest.param(3, 3, "float32", marks=pytest.mark.slow),
        (3, 3, "bfloat16"),
    ],
)
def test_caches_of_another_dtype_than_the_activations(kv_heads, window, dtype):
    other = "bfloat16" if dtype == "float32" else "float32"
    attention = module(kv_heads, window=window, dtype=dtype)
    x = normal(0, B, T, D, dtype=dtype)
    full = attention(x, is_causal=True)
    cache = attention.init_cache(B, T, dtype=other)
    assert cache.key.dtype == cache.value.dtype == other
    first, cache = attention.prefill(x[:, :4], cache)
    then, cache = attention.decode(x[:, 4:5], cache)
    if window is None:
        lanes, _ = attention.decode(x[:, 5:6], cache.expand(1))
    last, cache = attention.prefill(x[:, 5:], cache)
    assert cache.key.dtype == other and first.dtype == then.dtype == dtype
    close(jnp.concatenate([first, then, last], axis=1), full, rtol=4e-2, atol=4e-2)
    if window is None:
        close(lanes, full[:, 5:6], rtol=4e-2, atol=4e-2)


def test_caches_of_stacked_modules():
    """Three modules, one behind the other, made by `vmap` and run by `scan`."""
    make = nnx.vmap(lambda rngs: module(1, rngs=rngs), in_axes=0, out_axes=0)
    stack = make(nnx.Rngs(0).split(3))
    cache = stack.init_cache(B, T)
    assert cache.key.shape == (3, B, 1, T, H) and cache.length.shape == (3, B)

    @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def decode(attention, x, cache):
        return attention.decode(x, cache)

    x = normal(0, B, T, D)
    expected = x
    for layer in range(3):
        state = jax.tree.map(lambda leaf, i=layer: leaf[i], nnx.state(stack))
        expected = nnx.merge(nnx.graphdef(stack), state)(expected, is_causal=True)
    for t in range(T):
        output, cache = decode(stack, x[:, t : t + 1], cache)
        close(output[:, 0], expected[:, t], rtol=1e-4, atol=1e-4)


def test_a_batch_by_vmap():
    attention, x = module(1), normal(0, B, T, D)
    by_vmap = jax.vmap(lambda x: attention(x[None], is_causal=True)[0])(x)
    close(by_vmap, attention(x, is_causal=True), **TOLERANCE["float32"])


def test_train_and_eval_say_whether_dropout_happens():
    attention, x = module(dropout_rate=0.5), normal(0, B, T, D)
    plain = attention(x)
    attention.train()
    with pytest.raises(ValueError, match=r"train\(\) was called, but no rngs are given"):
        attention(x)
    assert np.abs(attention(x, rngs=nnx.Rngs(dropout=1)) - plain).max() > 0
    attention.eval()
    np.testing.assert_array_equal(attention(x, rngs=nnx.Rngs(dropout=1)), plain)
    np.testing.assert_array_equal(attention(x), plain)


def test_linen_users_drop_decode_and_prefill():
    linen = nnx.bridge.to_linen(mqa_jax.MultiQueryAttention, D, N, H, dropout_rate=0.5)
    x = normal(0, B, T, D)
    variables = linen.init(jax.random.key(1), x)
    plain = linen.apply(variables, x, is_causal=True)
    first, again, other = (
        linen.apply(variables, x, is_causal=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0 and np.abs(first - other).max() > 0
    cache = linen.apply(variables, B, T, nnx_method="init_cache")
    output, cache = linen.apply(variables, x[:, :4], cache, nnx_method="prefill")
    close(output, plain[:, :4], **TOLERANCE["float32"])
    for t in range(4, T):
        output, cache = linen.apply(variables, x[:, t : t + 1], cache, nnx_method="decode")
        close(output[:, 0], plain[:, t], **TOLERANCE["float32"])
