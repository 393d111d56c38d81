"""Modules on a mesh with explicit axes: what they compute on one device, and where it lies.

Whole models are in test_sharding.py, beside those on other meshes.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import TOLERANCE, close, normal
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mqa_jax import Attention, RelativeBias, Rope, dot_product_attention, sample
from mqa_jax.core.explicit import partition
from mqa_jax.core.sharding import ShardingRules
from mqa_jax.model.layers import Embedding, FeedForward

BATCH, HEADS = ("data", "fsdp"), "tensor"
B, T, D, N, H = 8, 7, 16, 4, 6
SLOW = pytest.mark.slow
LATER = dict(qk_norm=True, softcap=1.0, scale=0.7, qkv_bias=True, out_bias=True)
same = functools.partial(jax.tree.map, functools.partial(close, **TOLERANCE["float32"]))


@pytest.fixture(scope="module")
def mesh():
    axes = dict(data=2, fsdp=2, tensor=2)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes)
    )


def split(mesh, x):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(BATCH)))


def split_weights(mesh, module):
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, jax.device_put(params, ShardingRules().params(mesh, params)))


def entries(array):
    """How the type of an array says that it is split."""
    return tuple(jax.typeof(array).sharding.spec)


# Chunks of a prompt, one token, and what a row of its own length leaves behind.
def decode(attention, x, bias=None):
    cache = attention.init_cache(B, 9)
    lengths = np.array([4, 3, 2, 1, 0, 1, 2, 3])
    outputs = [attention(x, is_causal=True, bias=bias)]
    for first, last, new in ((0, 4, lengths), (4, 6, None), (6, 7, None)):
        output, cache = attention.prefill(x[:, first:last], cache, new, bias=bias)
        outputs.append(output)
    output, cache = attention.decode(x[:, :1], cache, bias=bias)
    return outputs, output, cache


def with_bias(attention, x):
    """T5's, on the same mesh."""
    return decode(attention, x, RelativeBias(N, num_buckets=5, distance=6, rngs=nnx.Rngs(1)))


def cross(attention, x):
    cache = attention.init_cross_cache(x, jnp.arange(T)[None] < jnp.arange(1, B + 1)[:, None])
    return attention.decode(x[:, :1], cache), attention(x, x[:, :3])


@pytest.mark.parametrize(
    ("num_kv_heads", "options", "use", "compiled", "is_set"),
    [
        pytest.param(1, {}, decode, True, True, marks=SLOW),
        (2, dict(window=3), decode, True, False),
        pytest.param(2, {}, decode, False, False, marks=SLOW),
        (4, {}, cross, True, True),
        pytest.param(2, LATER | dict(rope=Rope()), decode, True, True, marks=SLOW),
        pytest.param(4, LATER | dict(window=3), with_bias, True, True, marks=SLOW),
        pytest.param(2, LATER, cross, True, True, marks=SLOW),
        (2, dict(cache_dtype="int8"), decode, True, True),
        pytest.param(1, dict(cache_dtype="fp8", window=3), decode, False, True, marks=SLOW),
        pytest.param(2, dict(cache_dtype="int8"), cross, True, False, marks=SLOW),
    ],
)
def test_attention_and_its_caches(mesh, num_kv_heads, options, use, compiled, is_set):
    attention = Attention(D, N, num_kv_heads, H, **options, rngs=nnx.Rngs(0))
    x = normal(1, B, T, D)
    expected = jax.jit(use)(attention, x)
    run = jax.jit(use) if compiled else use
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        got = run(split_weights(mesh, attention), split(mesh, x))
    same(got, expected)
    cache = got[0][1] if use is cross else got[2]
    kv_heads = HEADS if num_kv_heads % 2 == 0 else None
    key = cache.key.values if "cache_dtype" in options else cache.key
    assert entries(key) == (BATCH, kv_heads, None, None)
    assert entries(jax.tree.leaves(got)[0])[0] == BATCH
    if key is not cache.key:
        assert entries(cache.key.scales) == (BATCH, kv_heads, None)


@pytest.mark.parametrize("axes", [dict(rows=4, model=2), dict(rows=8)])
def test_axes_of_any_name(axes):
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes)
    )
    attention, x = Attention(D, N, 1, H, rngs=nnx.Rngs(0)), normal(1, B, T, D)
    with jax.set_mesh(mesh):
        got = jax.jit(decode)(attention, jax.device_put(x, PartitionSpec("rows")))
    same(got, jax.jit(decode)(attention, x))
    assert entries(got[1]) == ("rows", None, None)


def test_the_function_alone(mesh):
    query, key, value = (normal(i, B, T, heads, H) for i, heads in enumerate((N, 2, 2)))
    expected = dot_product_attention(query, key, value, is_causal=True)
    specs = [PartitionSpec(BATCH, None, HEADS)] * 3
    with jax.set_mesh(mesh):
        arguments = map(jax.device_put, (query, key, value), specs)
        got = jax.jit(functools.partial(dot_product_attention, is_causal=True))(*arguments)
    same(got, expected)
    assert entries(got) == (BATCH, None, HEADS, None)


def test_layers_around_attention(mesh):
    embedding, ids = Embedding(12, D, rngs=nnx.Rngs(0)), jnp.arange(B)[:, None]
    feed_forward = FeedForward(D, 6, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        split_embedding = split_weights(mesh, embedding)
        x = split_embedding(split(mesh, ids))
        logits = split_embedding.logits(x)
        y = split_weights(mesh, feed_forward)(x)
    same((x, logits, y), (embedding(ids), embedding.logits(embedding(ids)), feed_forward(x)))
    assert entries(x) == entries(y) == (BATCH, None, None)
    assert entries(logits) == (BATCH, None, HEADS)


def test_dropout_draws_what_it_draws_elsewhere_and_never_twice(mesh):
    attention = Attention(D, N, 1, H, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = normal(1, B, T, D)

    def twice(attention, x):
        rngs = nnx.Rngs(dropout=3)
        return attention(x, rngs=rngs), attention(x, rngs=rngs)

    expected = twice(attention, x)
    assert not np.allclose(*expected)
    with jax.set_mesh(mesh):
        same(jax.jit(twice)(split_weights(mesh, attention), split(mesh, x)), expected)


def test_sampling_with_keys_and_a_model_of_ones_own(mesh):
    """`step_fn` is called with the types that its arguments came with."""
    table = normal(2, 11, 11)

    def run(table, tokens, state, key):
        seen = []

        def step_fn(tokens, state):
            seen.append((entries(tokens), entries(state)))
            sharding = jax.typeof(state).sharding
            if not sharding.mesh.empty:
                return table.at[tokens].get(out_sharding=sharding), state
            return table[tokens], state

        decoded = sample(step_fn, state, tokens, key=key, max_new_tokens=5, top_k=3)
        return decoded.tokens, seen

    def result(*args):
        seen = []

        def tokens(*args):
            output, types = run(*args)
            seen.extend(types)
            return output

        return jax.jit(tokens)(*args), seen

    arguments = jnp.arange(B, dtype=jnp.int32), normal(3, B, 11)
    expected, _ = result(table, *arguments, jax.random.key(0))
    with jax.set_mesh(mesh):
        got, seen = result(table, *(split(mesh, x) for x in arguments), jax.random.key(0))
    np.testing.assert_array_equal(got, expected)
    assert set(seen) == {((BATCH,), (BATCH, None))}


def test_a_mesh_axis_splits_one_axis_only():
    assert partition(("data", "fsdp"), "fsdp", "tensor") == PartitionSpec(
        ("data", "fsdp"), None, "tensor"
    )
