"""The kernel without a GPU: interpreted, against the same attention in plain JAX."""

import contextlib
import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mqa_jax
from mqa_jax.attention import cache as caches
from mqa_jax.attention import cached
from mqa_jax.attention.functional import Logits, attend
from mqa_jax.attention.kernels import gpu
from mqa_jax.core.quantized import LARGEST, Quantized, held
from mqa_jax.decode.beam import expand, reorder

H = 16
TOLERANCE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2e-2, atol=2e-2)}
FP8 = "float8_e4m3fn"


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
    """Queries of that dtype, or of float32 with keys and values of eight bits."""
    is_float = jnp.dtype(dtype) not in LARGEST
    query = normal(0, batch, length, heads, H, dtype=dtype if is_float else "float32")
    return query, *(held(normal(i, batch, kv_heads, slots, H), dtype) for i in (1, 2))


def plain(query, key, value, mask, scale=0.3):
    """Over floats, whatever the cache holds."""
    key, value = (x.widened() if isinstance(x, Quantized) else x for x in (key, value))
    return attend(query, key, value, mask, Logits(scale))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "splits", "dtype"),
    [
        (6, 6, 1, "float32"),
        pytest.param(6, 2, 2, "float32", marks=pytest.mark.slow),
        (6, 1, 5, "float32"),
        pytest.param(20, 1, 1, "float32", marks=pytest.mark.slow),
        pytest.param(6, 1, 1, "bfloat16", marks=pytest.mark.slow),
        (6, 2, 5, "bfloat16"),
        (6, 1, 1, "int8"),
        pytest.param(6, 6, 5, "int8", marks=pytest.mark.slow),
        (6, 2, 3, FP8),
    ],
)
def test_the_first_slots_of_each_row(heads, kv_heads, splits, dtype):
    slots, end = 83, jnp.array([83, 1, 40])
    query, key, value = arrays(3, 1, heads, kv_heads, slots, dtype)
    # What lies behind the end is not seen.
    key, value = jax.tree.map(lambda x: x.at[1, :, 1:].set(100), (key, value))
    got, _ = gpu.flash_decode(
        query, key, value, end_B=end, scale=0.3, splits=splits, block=16, interpret=True
    )
    assert got.dtype == query.dtype
    mask = (jnp.arange(slots)[None] < end[:, None])[:, None, None]
    close(got, plain(query, key, value, mask), query.dtype.name)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("length", "mask_length", "dtype"),
    [(1, 1, "float32"), (5, 5, "float32"), (5, 1, "float32"), (5, 5, "int8"), (1, 1, FP8)],
)
def test_masks_of_every_query_and_of_all(length, mask_length, dtype, splits):
    query, key, value = arrays(2, length, 6, 2, 70, dtype)
    mask = jnp.asarray(np.random.default_rng(3).random((2, mask_length, 70)) < 0.4)
    mask = mask.at[1, 0].set(False)  # A query that sees nothing.
    got, _ = gpu.flash_decode(
        query, key, value, mask_BTS=mask, scale=0.3, splits=splits, block=16, interpret=True
    )
    close(got, plain(query, key, value, mask[:, None]))
    assert not np.any(got[1, 0])


@pytest.mark.parametrize(
    ("kind", "splits", "bad"),
    [
        pytest.param("end", 1, np.nan, marks=pytest.mark.slow),
        ("end", 3, np.inf),
        pytest.param("mask", 1, np.inf, marks=pytest.mark.slow),
        ("mask", 3, np.nan),
        ("mask_of_each", 1, np.nan),
        pytest.param("mask_of_each", 3, np.inf, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_seen_may_be_anything_and_what_is_seen_spoils_its_query(kind, splits, bad):
    length, slots = 5 if kind == "mask_of_each" else 1, 70
    query, key, value = arrays(2, length, 6, 2, slots)
    mask = jnp.asarray(np.random.default_rng(3).random((2, length, slots)) < 0.4)
    if kind == "end":
        mask = jnp.arange(slots)[None, None] < jnp.array([[[70]], [[40]]])
    elif kind == "mask_of_each":
        mask = mask.at[:, 1:3, 7].set(True).at[:, 3:, 7].set(False).at[:, 0, 7].set(False)
    masks = dict(end_B=jnp.array([70, 40])) if kind == "end" else dict(mask_BTS=mask)
    options = dict(scale=0.3, splits=splits, block=16, interpret=True, **masks)
    run = lambda *arrays: gpu.flash_decode(*arrays, **options)[0]  # noqa: E731
    expected = run(query, key, value)
    is_hidden_BS = ~jnp.any(mask, axis=1)
    key, value = (jnp.where(is_hidden_BS[:, None, :, None], bad, x) for x in (key, value))
    close(run(query, key, value), expected)
    at = 7 if kind == "mask_of_each" else int(np.argmax(mask[1, 0]))
    output = np.asarray(run(query, key, value.at[1, :, at].set(bad)))
    sees_BT = np.asarray(mask[..., at]) & np.array([[False], [True]])
    assert not np.isfinite(output[sees_BT]).any()
    close(output[~sees_BT], expected[~sees_BT])


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("of_key", [True, False])
def test_a_scale_that_is_not_finite_spoils_who_sees_its_vector(of_key, length):
    query, key, value = arrays(2, length, 6, 2, 70, "int8")
    mask = jnp.asarray(np.random.default_rng(3).random((2, length, 70)) < 0.4)
    mask = mask.at[:, -1].set(True).at[:, -1, 7].set(False).at[0, 0, 7].set(length == 1)
    options = dict(mask_BTS=mask, scale=0.3, block=16, interpret=True)
    run = lambda *arrays: gpu.flash_decode(*arrays, **options)[0]  # noqa: E731
    bad = key if of_key else value
    bad = dataclasses.replace(bad, scales=bad.scales.at[:, :, 7].set(jnp.nan))
    output = np.asarray(run(query, *((bad, value) if of_key else (key, bad))))
    sees_BT = np.asarray(mask[..., 7])
    assert sees_BT.any() and not sees_BT.all()
    assert np.isnan(output[sees_BT]).all()
    close(output[~sees_BT], run(query, key, value)[~sees_BT])


def test_a_cache_of_another_dtype_than_the_queries():
    query, key, value = arrays(2, 1, 6, 2, 70)
    key, value = (x.astype(jnp.bfloat16) for x in (key, value))
    end = jnp.array([70, 40])
    got, _ = gpu.flash_decode(query, key, value, end_B=end, scale=0.3, block=16, interpret=True)
    assert got.dtype == query.dtype
    mask = (jnp.arange(70)[None] < end[:, None])[:, None, None]
    close(got, attend(query, key, value, mask, Logits(0.3)), "bfloat16")


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "splits", "dtype"),
    [
        (2, 3, "float32"),
        (1, 1, "int8"),
        pytest.param(1, 1, "float32", marks=pytest.mark.slow),
        pytest.param(6, 1, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, 3, "int8", marks=pytest.mark.slow),
        pytest.param(2, 1, FP8, marks=pytest.mark.slow),
    ],
)
def test_a_token_that_is_written_and_attended_to(kv_heads, splits, dtype, with_mask):
    # The last one is written behind what is seen.
    slots, slot = 70, jnp.array([[6], [69], [0], [70], [caches.LOST], [50]])
    end = jnp.array([7, 70, 1, 40, 3, 20])
    query, key, value = arrays(6, 1, 6, kv_heads, slots, dtype)
    new = [normal(i, 6, 1, kv_heads, H, dtype=query.dtype) for i in (3, 4)]
    mask = (jnp.arange(slots)[None] < end[:, None])[:, None, None]
    if with_mask:  # The first row does not see its own.
        mask = (mask & (jnp.arange(slots) % 3 > 0)).at[2, :, :, 0].set(True)
    put = caches.put((key, value), slot, tuple(new))
    expected = plain(query, *put, mask)
    if dtype == "float32":
        # What is written to is not read, nor what is written where it is hidden.
        rows = jnp.arange(3)
        key, value = (x.at[rows, :, slot[:3, 0]].set(jnp.nan) for x in (key, value))
        if with_mask:
            new[1] = new[1].at[0].set(jnp.nan)
        put = caches.put((key, value), slot, tuple(new))
    masks = dict(mask_BTS=mask[:, 0]) if with_mask else dict(end_B=end)
    got, written = gpu.flash_decode(
        query,
        key,
        value,
        new=(tuple(new), slot),
        scale=0.3,
        splits=splits,
        block=16,
        interpret=True,
        **masks,
    )
    is_lost = slot[:, 0] < 0
    close(got[~is_lost], expected[~is_lost], query.dtype.name)
    assert np.all(np.isnan(got[is_lost]))
    jax.tree.map(np.testing.assert_array_equal, written, put)


def test_splits_fill_the_gpu_and_no_more():
    assert [gpu._splits(*x) for x in ((1024, 256), (128, 2048), (64, 8192))] == [1, 2, 4]
    assert gpu._splits(16, 16384) == 16
    assert gpu._splits(1, 2**20) == 128  # Each more is one more to combine.
    assert gpu._splits(1, 511) == 1  # A split has 256 slots at least.


def test_only_shapes_that_the_kernel_is_for():
    query, key, _ = arrays(2, 1, 6, 1, 7)
    assert cached.is_supported(query, key)
    assert not cached.is_supported(jnp.zeros((2, 11, 6, H)), key)  # 66 rows
    assert not cached.is_supported(query[..., :13], key[..., :13])


@pytest.fixture
def _kernel_everywhere(monkeypatch):
    """And how often it was made part of a program, to see that it was."""
    calls = []

    def interpreted(*args, **kwargs):
        calls.append(args[0].shape)
        return flash_decode(*args, **kwargs, interpret=True)

    flash_decode = gpu.flash_decode
    monkeypatch.setattr(gpu, "flash_decode", interpreted)
    monkeypatch.setattr(cached, "PLATFORM", "cpu")
    jax.clear_caches()
    yield calls
    jax.clear_caches()


LATER = dict(rope=mqa_jax.Rope(), qk_norm=True, scale=0.7, qkv_bias=True, out_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "options"),
    [
        (1, {}),
        (4, dict(window=3)),
        (2, LATER),
        (1, LATER | dict(window=3)),
    ],
)
def test_decoding_through_the_kernel_equals_the_full_pass(kv_heads, options, _kernel_everywhere):
    attention = mqa_jax.Attention(12, 4, kv_heads, H, **options, rngs=nnx.Rngs(0))
    state = nnx.state(attention)  # Biases begin at 0, which would hide where they are left out.
    nnx.update(attention, jax.tree.map(lambda p: p + 0.1 * normal(p.size, *p.shape), state))
    x, lengths = normal(5, 2, 7, 12), np.array([2, 4])
    full = attention(x, is_causal=True)
    _, cache = attention.prefill(x[:, :4], attention.init_cache(2, 7), lengths)
    for step in range(3):
        at = lengths + step
        output, cache = attention.decode(x[[[0], [1]], at[:, None]], cache)
        close(output[:, 0], full[[0, 1], at])
    assert _kernel_everywhere


@pytest.mark.slow
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


CUDA = dict(lowering_platforms=("cuda",))


@pytest.fixture
def lowered_kernels(monkeypatch):
    """The shapes of queries that the kernel was lowered for, without a GPU: interpreted."""
    shapes = []

    def interpreted(*args, **kwargs):
        shapes.append(args[0].shape)
        return flash_decode(*args, **kwargs, interpret=True)

    flash_decode = gpu.flash_decode
    monkeypatch.setattr(gpu, "flash_decode", interpreted)
    monkeypatch.setattr(cached, "_compiles", lambda: True)
    jax.clear_caches()
    yield shapes
    jax.clear_caches()


def decode_step(heads=4, kv_heads=1, batch=8, **options):
    """A step, its arguments, and a step of a plain product for comparison."""
    attention = mqa_jax.Attention(16, heads, kv_heads, H, **options, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(attention)
    x = normal(5, batch, 3, 16)
    cache = attention.prefill(x, attention.init_cache(batch, 7), np.arange(batch) % 4)[1]

    def step(params, x, cache):
        return nnx.merge(graphdef, params).decode(x, cache)

    return step, (params, normal(6, batch, 1, 16), cache)


def test_the_kernel_is_for_the_platform_that_a_program_is_lowered_for(lowered_kernels):
    step, arguments = decode_step()
    traced = jax.jit(step).trace(*arguments)
    for platforms in (("cpu",), ("tpu",), ("cpu", "cuda")):
        traced.lower(lowering_platforms=platforms)
        assert not lowered_kernels
    traced.lower(**CUDA)
    assert lowered_kernels == [(8, 1, 4, H)]
    # Longer prompts are XLA's.
    attention = mqa_jax.Attention(16, 4, 1, H, rngs=nnx.Rngs(0))
    prefill = jax.jit(lambda x: attention.prefill(x, attention.init_cache(2, 40)))
    prefill.trace(normal(1, 2, 33, 16)).lower(**CUDA)
    assert len(lowered_kernels) == 1


def test_where_no_gpu_is_known_its_program_has_plain_attention():
    step, arguments = decode_step()
    assert "triton" not in jax.jit(step).trace(*arguments).lower(**CUDA).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("cache_dtype", [None, "int8", "fp8"])
def test_a_program_for_a_gpu_that_is_described_has_the_kernel(cache_dtype):
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    step, arguments = decode_step(cache_dtype=cache_dtype)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        lowered = jax.jit(step).trace(*arguments).lower(**CUDA)
    assert "triton" in lowered.as_text()


def test_a_cpu_does_not_import_pallas():
    program = """
import sys, jax, numpy as np, mqa_jax
from flax import nnx
attention = mqa_jax.MultiQueryAttention(32, 2, rngs=nnx.Rngs(0))
cache = attention.init_cache(2, 3)
x = np.ones((2, 1, 32), np.float32)
attention.decode(x, cache)
jax.jit(lambda x, cache: attention.decode(x, cache))(x, cache)
print("jax.experimental.pallas" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("False\n", 0), result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_is_that_of_plain_attention(_kernel_everywhere, monkeypatch, compiled):
    step, (params, x, cache) = decode_step()

    def loss(params, x):
        output, new = step(params, x, cache)
        return jnp.sum(output**2) + jnp.sum(new.key)

    gradient = jax.grad(loss, argnums=(0, 1))
    got = (jax.jit(gradient) if compiled else gradient)(params, x)
    monkeypatch.setattr(cached, "PLATFORM", "cuda")
    jax.tree.map(close, got, gradient(params, x))
    assert np.any(got[1] != 0)


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_vmap_adds_rows(_kernel_everywhere, cache_dtype):
    step, (params, x, cache) = decode_step(cache_dtype=cache_dtype)
    more = jnp.stack([x, 2 * x, x - 1])
    _kernel_everywhere.clear()
    got = jax.vmap(step, (None, 0, None))(params, more, cache)
    assert (24, 1, 4, H) in _kernel_everywhere
    for i, x in enumerate(more):
        expected = step(params, x, cache)
        jax.tree.map(close, jax.tree.map(lambda leaf, i=i: leaf[i], got), expected)


MESHES = [
    # axes, key/value heads, what a device's kernel is given: rows and query heads
    (dict(data=2, fsdp=2, tensor=2), 2, (2, 2)),
    (dict(data=2, fsdp=2, tensor=2), 1, (2, 2)),
    (dict(tensor=8), 2, (8, 4)),  # Two heads are not split by eight.
    (dict(rows=8), 2, (8, 4)),  # Rules do not name this axis.
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis_type", "is_set", "cache_dtype", "axes", "kv_heads", "local"),
    [(AxisType.Auto, False, None, *case) for case in MESHES[1:]]
    + [(AxisType.Explicit, is_set, None, *MESHES[0]) for is_set in (False, True)]
    + [(AxisType.Auto, False, "int8", *MESHES[1]), (AxisType.Explicit, True, "int8", *MESHES[0])],
)
def test_each_device_runs_the_kernel_on_its_own_part(
    _kernel_everywhere, axis_type, is_set, cache_dtype, axes, kv_heads, local
):
    step, arguments = decode_step(kv_heads=kv_heads, cache_dtype=cache_dtype)
    expected = step(*arguments)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))
    rows = tuple(name for name in ("data", "fsdp") if name in axes)
    heads = "tensor" if "tensor" in axes and kv_heads % axes["tensor"] == 0 else None
    place = lambda spec: functools.partial(jax.device_put, device=NamedSharding(mesh, spec))  # noqa: E731
    params, x, cache = arguments
    split = (
        jax.tree.map(place(P()), params),
        place(P(rows))(x),
        jax.tree.map(lambda leaf: place(P(rows, heads) if leaf.ndim > 1 else P(rows))(leaf), cache),
    )
    _kernel_everywhere.clear()
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        got = jax.jit(step)(*split)
    jax.tree.map(close, got, expected)
    assert {(shape[0], shape[2]) for shape in _kernel_everywhere} == {local}


def test_each_device_has_its_part_of_a_memory(lowered_kernels):
    attention = mqa_jax.Attention(16, 4, 2, H, rngs=nnx.Rngs(0))
    memory, x = normal(5, 8, 9, 16), normal(6, 8, 1, 16)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, P("data"))
    cache = jax.device_put(attention.init_cross_cache(memory), rows)
    step = jax.jit(lambda x, cache: attention.decode(x, cache)[0])
    with jax.set_mesh(mesh):
        step.trace(jax.device_put(x, rows), cache).lower(**CUDA)
    assert lowered_kernels == [(2, 1, 2, H)]


def test_one_device_of_several_has_the_kernel_too(lowered_kernels):
    step, arguments = decode_step()
    arguments = jax.device_put(arguments, jax.devices()[3])
    jax.jit(step).trace(*arguments).lower(**CUDA)
    assert lowered_kernels == [(8, 1, 4, H)]


def test_what_xla_would_have_to_take_apart_is_plain_attention(lowered_kernels):
    """Devices that a program tells of too late."""
    step, arguments = decode_step()
    rows = NamedSharding(mqa_jax.make_mesh(), P("data"))
    jax.jit(step, out_shardings=rows).trace(*arguments).lower(**CUDA)
    assert not lowered_kernels


@pytest.mark.slow
def test_within_a_shard_map_of_ones_own(lowered_kernels):
    step, arguments = decode_step()
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("rows"), P("rows")), out_specs=P("rows"), check_vma=False
    )
    jax.jit(mapped).trace(*arguments).lower(**CUDA)
    assert lowered_kernels == [(1, 1, 4, H)]
    jax.tree.map(close, jax.jit(mapped)(*arguments), step(*arguments))
