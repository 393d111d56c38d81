"""Rotations and biases: their formulas, and that caches see them as the full pass does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import TOLERANCE, close, normal
from flax import nnx

import mqa_jax
from mqa_jax.attention.positions import RelativeBias, Rope, sinusoids

B, T, N, H, D = 2, 7, 6, 4, 13


def turned(x, position, theta=10_000.0):
    """Pairs `(i, i + H / 2)` as complex numbers, times a complex number of size 1."""
    half = x.shape[-1] // 2
    angle = position * theta ** -(np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def test_rope_turns_halves_by_position():
    x, positions = normal(0, B, T, N, H), np.array([[0, 1, 2, 3, 4, 5, 6], [9, 3, 3, 0, 1, 70, 2]])
    got = Rope(theta=100.0)(x, jnp.asarray(positions))
    for b, t in np.ndindex(B, T):
        close(got[b, t], turned(np.asarray(x)[b, t], positions[b, t], 100.0), rtol=1e-5, atol=1e-5)
    # What meets depends on the distance alone.
    query, key = normal(1, 1, 1, 1, H), normal(2, 1, 1, 1, H)
    at = [jnp.full((1, 1), p) for p in (3, 8, 1003, 1008)]
    near, far = (jnp.sum(Rope()(query, at[i]) * Rope()(key, at[i + 1])) for i in (0, 2))
    close(near, far, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("position", [100_000, 2**20 + 1])
def test_far_positions_are_as_exact_as_float32_in_bfloat16_too(position):
    x = normal(0, 1, 1, N, H, dtype="bfloat16")
    got = Rope()(x, jnp.full((1, 1), position))
    assert got.dtype == "bfloat16"
    close(got[0, 0], turned(np.asarray(x, np.float64)[0, 0], position), rtol=2e-2, atol=2e-2)


def test_scalings_of_rope():
    plain = Rope(theta=100.0).frequencies(8)
    np.testing.assert_allclose(plain, [1, 100**-0.25, 0.1, 100**-0.75])
    linear = Rope(theta=100.0, scaling="linear", factor=4.0).frequencies(8)
    np.testing.assert_allclose(linear, plain / 4)
    # 10, 3.2, 1 and 0.3 turns.
    scaled = Rope(
        theta=100.0,
        scaling="llama3",
        factor=4.0,
        low_freq_factor=2.0,
        high_freq_factor=4.0,
        original_max_length=63,
    ).frequencies(8)
    turns = 63 * plain / (2 * math.pi)
    keep = (turns[1] - 2) / 2
    assert turns[0] > 4 > turns[1] > 2 > turns[2]
    expected = [plain[0], plain[1] * (keep + (1 - keep) / 4), plain[2] / 4, plain[3] / 4]
    np.testing.assert_allclose(scaled, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(theta=0.0), "rope theta must be a finite number, above 0, not 0.0"),
        (dict(factor=math.nan, scaling="linear"), "rope factor must be a finite number"),
        (dict(factor=2.0), "rope factor=2.0 needs a scaling, such as 'linear'"),
        (dict(scaling="yarn"), "rope scaling 'yarn' is not one of default, linear, llama3"),
        (dict(scaling="llama3"), "rope scaling 'llama3' needs original_max_length"),
        (dict(low_freq_factor=math.nan), "rope low_freq_factor must be a finite number"),
        (dict(high_freq_factor=-1.0), "rope high_freq_factor must be a finite number, above 0"),
        (
            dict(scaling="llama3", original_max_length=0),
            "rope original_max_length must be at least 1, not 0",
        ),
        (
            dict(scaling="llama3", original_max_length=63.0),
            "rope original_max_length must be an integer, not 63.0",
        ),
        (
            dict(scaling="llama3", original_max_length=9, low_freq_factor=4.0),
            "rope low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
    ],
)
def test_rope_without_sense_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        Rope(**fields)


def test_halves_of_an_odd_head_raise():
    with pytest.raises(ValueError, match="head_dim=5 is odd: rope turns halves of a head"):
        mqa_jax.Attention(D, N, 1, 5, rope=Rope(), rngs=nnx.Rngs(0))


def test_of_two_buckets_one_is_the_querys_own():
    bias = RelativeBias(N, num_buckets=2, distance=3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(bias.buckets(jnp.array([1, 0, -1, -2, -9])), [0, 0, 1, 1, 1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_buckets(bidirectional):
    """Of (Raffel et al. 2020): 4 distances have buckets of their own, 4 ranges the others."""
    bias = RelativeBias(
        N, num_buckets=16 if bidirectional else 8, distance=20, bidirectional=bidirectional,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    # Ranges end at 4 * 5 ** (i / 4): 5.98, 8.94, 13.37, 20.
    before = [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7]
    behind = [8 + b for b in before] if bidirectional else [0] * len(before)
    offsets = jnp.arange(len(before), dtype=jnp.int32)
    np.testing.assert_array_equal(bias.buckets(-offsets), before)
    np.testing.assert_array_equal(bias.buckets(offsets)[1:], behind[1:])
    np.testing.assert_array_equal(bias.buckets(jnp.int32(-(2**30))), 7)
    query, key = jnp.array([[3, 1]]), jnp.array([[0, 2, 4]])
    table = np.asarray(bias.table[...])
    got = bias(query, key)
    assert got.shape == (1, N, 2, 3)
    for t, s in np.ndindex(2, 3):
        bucket = int(bias.buckets(key[0, s] - query[0, t]))
        np.testing.assert_array_equal(got[0, :, t, s], table[bucket])


def test_where_the_logarithm_is_whole_the_bucket_is_that_of_float32():
    """As transformers has it, and so the models that were trained there."""
    options = dict(rngs=nnx.Rngs(0))
    both = RelativeBias(N, num_buckets=18, distance=128, bidirectional=True, **options)
    offsets = jnp.array([7, 8, 15, 16, 63, 64])
    np.testing.assert_array_equal(both.buckets(-offsets), [4, 5, 5, 6, 7, 8])
    np.testing.assert_array_equal(both.buckets(offsets), [13, 14, 14, 15, 16, 17])
    one = RelativeBias(N, num_buckets=54, distance=64, **options)
    np.testing.assert_array_equal(one.buckets(-jnp.array([35, 36, 37])), [35, 36, 36])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_buckets=1), "num_buckets=1 must be at least 2"),
        (dict(num_buckets=5, bidirectional=True), "num_buckets=5 .* at least 4 and even"),
        (dict(num_buckets=8, distance=4), "distance=4 must be above 4"),
        (dict(distance=64.0), "distance must be an integer, not 64.0"),
        (dict(distance=2**20 + 1), "distance must be from 1 to 1048576, not 1048577"),
    ],
)
def test_relative_bias_without_sense_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        RelativeBias(N, **fields, rngs=nnx.Rngs(0))


def test_sinusoids_are_sines_then_cosines():
    for width in (6, 5):
        got, half = sinusoids(30, width), (width + 1) // 2
        for p, i in np.ndindex(30, width):
            angle = p / 10_000 ** (2 * (i % half) / width)
            expected = math.sin(angle) if i < half else math.cos(angle)
            assert got[p, i] == pytest.approx(expected, abs=1e-6)


def slopes(query_positions_BT, key_positions_BS):
    """A bias of one's own, that of ALiBi (Press et al. 2022)."""
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None]
    slope_N = 2.0 ** -jnp.arange(1.0, N + 1)
    return -slope_N[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)


def shifted(x_BTNH, positions_BT):
    """A rotation of one's own, which is none."""
    return x_BTNH + jnp.sin(positions_BT.astype(x_BTNH.dtype))[..., None, None]


def reference(attention, x, bias, turn, window=None):
    """Each query by itself, in float64."""
    query, key, value, out = (
        np.asarray(getattr(attention, name)[...], np.float64)
        for name in ("query", "key", "value", "out")
    )
    x, heads = np.asarray(x, np.float64), query.shape[0] // key.shape[0]
    output = np.zeros_like(x)
    for b, t, n in np.ndindex(*x.shape[:2], query.shape[0]):
        first = 0 if window is None else max(0, t - window + 1)
        q, k = turn(query[n] @ x[b, t], t), n // heads
        keys = np.stack([turn(key[k] @ x[b, s], s) for s in range(first, t + 1)])
        logits = keys @ q / math.sqrt(q.size) + [bias(n, t - s) for s in range(first, t + 1)]
        weights = np.exp(logits - logits.max())
        heads_value = weights / weights.sum() @ (x[b, first : t + 1] @ value[k].T)
        output[b, t] += out[:, n] @ heads_value
    return output


WAYS = {
    "rope": (dict(rope=Rope(theta=30.0)), None, lambda x, p: turned(x, p, 30.0), lambda n, d: 0),
    "own rotation": (dict(rope=shifted), None, lambda x, p: x + math.sin(p), lambda n, d: 0),
    "own bias": ({}, slopes, lambda x, p: x, lambda n, d: -d * 2.0 ** -(n + 1)),
}


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (3, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_the_full_pass_and_all_caches_equal_loops(way, kv_heads, window):
    options, bias, turn, bias_at = WAYS[way]
    attention = mqa_jax.Attention(D, N, kv_heads, H, window=window, **options, rngs=nnx.Rngs(0))
    x = normal(0, B, T, D)
    expected = reference(attention, x, bias_at, turn, window)

    @jax.jit
    def run(attention, x):
        full = attention(x, bias=bias, is_causal=True)
        # Behind each other, at positions that differ by row.
        cache = attention.init_cache(B, 2 * T)
        chunk, cache = attention.prefill(x[:, :3], cache, jnp.array([3, 2]), bias=bias)
        rows = jnp.arange(B)[:, None]
        at = jnp.array([[3, 4], [2, 3]])
        second, cache = attention.prefill(x[rows, at], cache, bias=bias)
        step, cache = attention.decode(x[rows, at[:, 1:] + 1], cache, bias=bias)
        beams = None
        if window is None:
            lanes = cache.expand(2)
            x_R1D = jnp.repeat(x[rows, at[:, 1:] + 2], 2, axis=0)
            beams, lanes = attention.decode(x_R1D, lanes, bias=bias)
        return full, chunk, second, step, beams

    full, chunk, second, step, beams = run(attention, x)
    close(full, expected, **TOLERANCE["float32"])
    close(chunk[0], expected[0, :3], **TOLERANCE["float32"])
    close(chunk[1, :2], expected[1, :2], **TOLERANCE["float32"])
    for row, first in enumerate((3, 2)):
        close(second[row], expected[row, first : first + 2], **TOLERANCE["float32"])
        close(step[row, 0], expected[row, first + 2], **TOLERANCE["float32"])
        if beams is not None:
            for beam in beams[2 * row : 2 * row + 2, 0]:
                close(beam, expected[row, first + 3], **TOLERANCE["float32"])


def test_positions_restart_where_they_are_said_to():
    attention = mqa_jax.Attention(D, N, 1, H, rope=Rope(), rngs=nnx.Rngs(0))
    x, segments = normal(0, B, T, D), jnp.array([[1, 1, 1, 2, 2, 2, 2]] * B)
    positions = jnp.array([[0, 1, 2, 5, 6, 7, 8]])
    mask = mqa_jax.segment_mask(segments, segments)
    got = attention(x, mask=mask, positions_BT=positions, is_causal=True)
    close(got[:, :3], attention(x[:, :3], is_causal=True), **TOLERANCE["float32"])
    # Distances count alone.
    close(got[:, 3:], attention(x[:, 3:], is_causal=True), **TOLERANCE["float32"])
    # And they do count.
    other = attention(x, mask=mask, positions_BT=2 * positions, is_causal=True)
    assert np.abs(got - other).max() > 0.01


@pytest.mark.parametrize(
    ("options", "kwargs", "message"),
    [
        (dict(rope=7), {}, r"rope must be a Rope\(\) or a function"),
        (dict(rope=lambda x, p: x[..., :2]), {}, "rope returned .* it must keep the shape"),
        ({}, dict(bias=lambda q, k: jnp.zeros((1, 1, T, 1, 1))), r"bias must broadcast to \[B, N"),
        ({}, dict(bias=np.zeros((1, N, T, T), np.int32)), "bias must be floats, not int32"),
        ({}, dict(positions_BT=jnp.zeros((B, T + 1), int)), r"positions_BT must be \[B, T\]"),
        ({}, dict(positions_BT=jnp.zeros((B, T))), "positions_BT must be integers, not float32"),
        (dict(rope=Rope()), dict(memory_BSD=np.ones((B, 3, D), np.float32)), "a rope, positions"),
        ({}, dict(memory_BSD=np.ones((B, 3, D), np.float32), bias=slopes), "a rope, positions"),
        (dict(softcap=0.0), {}, "softcap must be a finite number, above 0, not 0.0"),
        (dict(scale=math.inf), {}, "scale must be a finite number, not inf"),
    ],
)
def test_misuse_raises(options, kwargs, message):
    with pytest.raises(ValueError, match=message):
        mqa_jax.Attention(D, N, 1, H, **options, rngs=nnx.Rngs(0))(normal(0, B, T, D), **kwargs)


def test_a_rope_is_none_of_a_memorys():
    attention = mqa_jax.Attention(D, N, 1, H, rope=Rope(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="leave them out of cross-attention"):
        attention.init_cross_cache(normal(0, B, T, D))
