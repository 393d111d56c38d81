"""Caches: whatever way tokens reach a cache, outputs equal the full forward pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import mqa_jax
from mqa_jax.attention import cache as caches
from mqa_jax.decode.beam import expand, reorder

T, S, N, H, D = 7, 11, 6, 5, 13
# The same products in another order: a few roundings, of values of about 1, in float32 and in
# bfloat16 (8 bits), where attention weights and outputs are rounded too.
TOLERANCE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2e-2, atol=2e-2)}


def close(actual, expected, dtype="float32"):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, equal_nan=False, **TOLERANCE[dtype])


def module(kv_heads=1, window=None, dtype="float32"):
    return mqa_jax.Attention(D, N, kv_heads, H, window=window, dtype=dtype, rngs=nnx.Rngs(0))


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _call(graphdef, method, state, x, cache, *args):
    return getattr(nnx.merge(graphdef, state), method)(x, cache, *args)


def jitted(attention, method):
    """`prefill` or `decode` under `jax.jit`, the cache donated; compiled once per shape."""
    graphdef, state = nnx.split(attention)
    return functools.partial(_call, graphdef, method, state)


@jax.jit
def full_pass(attention, x):
    return attention(x, is_causal=True)


def bytes_of(cache):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("kv_heads", "window", "dtype"),
    [(6, None, "float32"), (3, 3, "float32"), (1, None, "float32")]
    + [pytest.param(1, w, "float32", marks=pytest.mark.slow) for w in (1, T, T + 2)]
    + [(6, 3, "bfloat16"), pytest.param(1, None, "bfloat16", marks=pytest.mark.slow)],
)
def test_decode_equals_the_full_pass_from_every_prefix_length(kv_heads, window, dtype):
    attention = module(kv_heads, window, dtype)
    rows = prefix = np.arange(T + 1)  # row `b` has a prompt of `b` tokens, none and all included
    x = normal(0, T + 1, T, D, dtype=dtype)
    full = full_pass(attention, x)
    empty = attention.init_cache(T + 1, 2 * T)
    output, cache = jitted(attention, "prefill")(x, empty, prefix)
    assert empty.key.is_deleted() and empty.value.is_deleted()
    is_prompt = np.arange(T) < prefix[:, None]
    close(output[is_prompt], full[is_prompt], dtype)
    decode = jitted(attention, "decode")
    for step in range(T):
        position = np.minimum(prefix + step, T - 1)
        output, cache = decode(x[rows, position][:, None], cache)
        is_left = prefix + step < T
        close(output[is_left, 0], full[rows, position][is_left], dtype)
    np.testing.assert_array_equal(cache.length, prefix + T)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prompt", [1, 4])
def test_unpadded_prompt_without_jit(prompt, window):
    attention = module(3, window)
    x = normal(0, 2, T, D)
    full = full_pass(attention, x)
    output, cache = attention.prefill(x[:, :prompt], attention.init_cache(2, T))
    close(output, full[:, :prompt])
    for t in range(prompt, T):
        output, cache = attention.decode(x[:, t : t + 1], cache)
        close(output[:, 0], full[:, t])


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (3, 3)])
@given(lengths=st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=5, max_size=5))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_chunks_give_the_full_pass_and_padding_leaves_no_trace(kv_heads, window, lengths):
    chunk, total = 4, 20
    attention = module(kv_heads, window)
    x = normal(1, 3, total, D)
    full = np.asarray(full_pass(attention, x))
    prefill = jitted(attention, "prefill")
    cache = attention.init_cache(3, total)
    start = np.zeros(3, int)
    for chunk_lengths in np.array(lengths):
        tokens = np.full((3, chunk, D), 1e30, np.float32)
        for row, length in enumerate(chunk_lengths):
            tokens[row, :length] = x[row, start[row] : start[row] + length]
        output, cache = prefill(tokens, cache, chunk_lengths)
        for row, length in enumerate(chunk_lengths):
            close(output[row, :length], full[row, start[row] : start[row] + length])
        start += chunk_lengths
    np.testing.assert_array_equal(cache.length, start)
    assert max(np.abs(cache.key).max(), np.abs(cache.value).max()) < 1e3


@pytest.mark.parametrize("window", [None, 3])
def test_padding_changes_no_bit(window):
    attention = module(1, window)
    x, lengths = np.array(normal(2, 3, T, D)), np.array([4, 0, 6])
    is_token = np.arange(T) < lengths[:, None]
    poisoned = np.where(is_token[..., None], x, 1e30).astype(np.float32)
    prefill = jitted(attention, "prefill")
    clean, clean_cache = prefill(x, attention.init_cache(3, T), lengths)
    dirty, dirty_cache = prefill(poisoned, attention.init_cache(3, T), lengths)
    np.testing.assert_array_equal(clean[is_token], dirty[is_token])
    jax.tree.map(np.testing.assert_array_equal, clean_cache, dirty_cache)
    assert np.abs(clean_cache.key[1]).max() == 0 < np.abs(clean_cache.key[0]).min(axis=2).max()


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_caches_hold_key_value_heads_only(kv_heads):
    cache = module(kv_heads).init_cache(2, S)
    assert cache.key.shape == cache.value.shape == (2, kv_heads, S, H)
    assert bytes_of(cache) == 2 * (2 * kv_heads * S * H * 4) + 2 * 4
    cross = module(kv_heads).init_cross_cache(normal(0, 2, S, D))
    assert cross.key.shape == cross.value.shape == (2, kv_heads, S, H)


def test_ring_cache_does_not_grow_with_the_length():
    short, long = (module(3, window=4).init_cache(2, length) for length in (3, 300_000))
    assert isinstance(short, mqa_jax.RingCache)
    assert bytes_of(short) == bytes_of(long) == 2 * (2 * 3 * 4 * H * 4) + 2 * 4
    bfloat16 = module(3, window=4, dtype="bfloat16").init_cache(2, 3)
    assert bytes_of(bfloat16) == 2 * (2 * 3 * 4 * H * 2) + 2 * 4


def test_ring_cache_puts_position_p_into_slot_p_mod_window():
    attention = module(1, window=3)
    x = normal(0, 1, 5, D)
    key = np.einsum("TD,HD->TH", x[0], attention.key[...][0])
    _, cache = jitted(attention, "prefill")(x, attention.init_cache(1, 5))
    close(cache.key[0, 0], key[[3, 4, 2]])


def test_ring_cache_writes_a_slot_once(monkeypatch):
    # Of two writes to one slot a GPU may keep either, a CPU keeps the last.
    slots, put = [], caches.put
    monkeypatch.setattr(caches, "put", lambda *args: slots.append(args[1]) or put(*args))
    attention = module(1, window=3)
    attention.prefill(normal(0, 3, T, D), attention.init_cache(3, T), np.array([7, 2, 4]))
    assert [sorted(row) for row in slots[0].tolist()] == [
        [0, 1, 2, 3, 3, 3, 3],  # 3 is past the end: not written
        [0, 1, 3, 3, 3, 3, 3],
        [0, 1, 2, 3, 3, 3, 3],
    ]


def overflowing():
    """Rows of 3, 2, 3 tokens in caches of 5, and 2, 3, 3 more: row 2 has no room for its sixth."""
    attention = module(3)
    x = normal(0, 3, 6, D)
    empty = attention.init_cache(3, 5)
    _, cache = jitted(attention, "prefill")(x[:, :3], empty, np.array([3, 2, 3]))
    return attention, x, cache, np.array([2, 3, 3])


def test_overflow_raises():
    attention, x, cache, lengths = overflowing()
    with pytest.raises(ValueError, match="row 2 of the cache would hold 6 tokens.*room for 5"):
        attention.prefill(x[:, 3:], cache, lengths)
    _, cache = attention.prefill(x[:, 3:], cache, np.array([2, 1, 0]))
    with pytest.raises(ValueError, match="row 0 of the cache would hold 6 tokens.*room for 5"):
        attention.decode(x[:, :1], cache)


def test_overflow_under_jit_is_nan_in_exactly_that_row():
    attention, x, cache, lengths = overflowing()
    new = jnp.stack([x[0, 3:], x[1, 2:5], x[2, 3:]])
    output, cache = jitted(attention, "prefill")(new, cache, lengths)
    full = full_pass(attention, x)
    close(output[0, :2], full[0, 3:5])
    close(output[1], full[1, 2:5])
    assert np.isnan(output[2]).all()
    # Rows 0 and 1 are full now, and row 2 stays lost.
    output, _ = jitted(attention, "decode")(x[:, 5:], cache)
    assert np.isnan(output).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[2, 4, 1], [2, -1, 1]])
def test_lengths_that_the_chunk_does_not_have_raise_and_under_jit_are_nan(lengths, window):
    attention = module(window=window)
    x, empty = normal(0, 3, 3, D), attention.init_cache(3, T)
    with pytest.raises(ValueError, match=re.escape(f"lengths_B={lengths}")):
        attention.prefill(x, empty, np.array(lengths))
    output, cache = jitted(attention, "prefill")(x, empty, np.array(lengths))
    full = full_pass(attention, x)
    close(output[0, :2], full[0, :2])
    close(output[2, :1], full[2, :1])
    assert np.isnan(output[1]).all()
    # Whoever reads the cache alone must not go on as if nothing had been.
    caches_behind = [cache] if window else [cache, jax.jit(lambda cache: cache.expand(2))(cache)]
    for cache in caches_behind:
        rows = np.repeat(np.arange(3), len(cache.length) // 3)
        for _ in range(5):
            output, cache = jitted(attention, "decode")(x[rows, :1], cache)
            np.testing.assert_array_equal(np.isnan(output).all((1, 2)), rows == 1)
            np.testing.assert_array_equal(np.isnan(output).any((1, 2)), rows == 1)


@pytest.mark.parametrize(
    ("kv_heads", "length"),
    [
        pytest.param(6, 1, marks=pytest.mark.slow),
        (3, 1),
        pytest.param(1, 1, marks=pytest.mark.slow),
        (1, 4),
    ],
)
def test_beams_over_a_cross_cache_equal_a_tiled_memory(kv_heads, length):
    batch, beams = 2, 3
    attention = module(kv_heads)
    x, memory = normal(0, batch * beams, length, D), normal(1, batch, S, D)
    mask = np.random.default_rng(2).random((batch, S)) < 0.6
    tiled, tiled_mask = (np.repeat(a, beams, axis=0) for a in (memory, mask))
    call, remember = compiled(attention), compiled(attention, "init_cross_cache")
    cross = remember(memory, mask)
    output, same = attention.decode(x, cross)
    close(output, call(x, tiled, mask=tiled_mask[:, None, None]))
    assert same is cross
    poisoned = np.where(mask[..., None], memory, 1e30).astype(np.float32)
    close(attention.decode(x, remember(poisoned, mask))[0], output)
    everything = np.ones_like(tiled_mask)[:, None, None]
    unmasked, _ = compiled(attention, "decode")(x, remember(memory))
    close(unmasked, call(x, tiled, mask=everything))


def test_a_source_of_padding_alone_gives_zeros():
    attention = module()
    mask = np.arange(2)[:, None] == np.ones((1, S))
    cross = compiled(attention, "init_cross_cache")(normal(1, 2, S, D), mask)
    output, _ = compiled(attention, "decode")(normal(0, 4, 1, D), cross)
    np.testing.assert_array_equal(output[:2], np.zeros((2, 1, D)))
    assert np.abs(output[2:]).min() > 0


def test_a_batch_of_none():
    attention = module()
    nothing, empty = (
        np.zeros((0, 1, D), np.float32),
        jax.tree.map(lambda x: x[:0], attention.init_cache(1, T)),
    )
    for cache in (empty, empty.expand(2), CROSS(attention, memory_BSD=np.zeros((0, S, D)))):
        assert attention.decode(nothing, cache)[0].shape == (0, 1, D)


ONE = jnp.zeros((3, 1, D))
CROSS = functools.partial(mqa_jax.Attention.init_cross_cache, memory_BSD=np.zeros((2, S, D)))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda a: a.decode(jnp.zeros((3, 2, D)), a.init_cache(3, T)), "one token a row, not T=2"),
        (lambda a: a.decode(jnp.zeros((5, 1, D)), CROSS(a)), "5 rows over .* cache of 2"),
        (lambda a: a.decode(jnp.zeros((4, D)), CROSS(a)), r"not \[4, 13\]"),
        (lambda a: a.prefill(jnp.zeros((2, 3, D)), a.init_cache(3, T)), r"\[3, T, 13\], not \[2"),
        (
            lambda a: a.prefill(jnp.zeros((3, 2, D)), a.init_cache(3, T), np.array([1, 2])),
            r"shape \(3,\), not \(2,\)",
        ),
        (lambda a: a.init_cache(0, T), "batch must be at least 1, not 0"),
        (lambda a: a.init_cache(3, 0), "length must be at least 1, not 0"),
        (lambda a: CROSS(a, mask_BS=np.ones((2, 5), bool)), r"\(2, 11\).* not bool .*\(2, 5\)"),
        (lambda a: CROSS(a, mask_BS=np.ones((2, S), np.int8)), "not int8"),
        (lambda a: a.init_cross_cache(jnp.zeros((2, S, 12))), r"memory_BSD.*\[2, 11, 12\]"),
        (lambda a: a.decode(ONE, None), "cache must be one that init_cache .* not a NoneType"),
        (lambda a: a.prefill(ONE, (a.init_cache(3, T),)), "not a tuple"),
        (lambda a: a.prefill(ONE, CROSS(a)), "not a CrossCache"),
        (lambda a: a.decode(ONE, module(6).init_cache(3, T)), r"keys are \[3, 6, 7, 5\]"),
        (lambda a: module(6).decode(ONE, a.init_cache(3, T)), "this one has 6 key/value heads"),
        (lambda a: module(6).decode(ONE[:2], CROSS(a)), "this one has 6 key/value heads"),
        (lambda a: a.decode(ONE, module(window=3).init_cache(3, T)), "3 slots .* window=None"),
        (lambda a: module(1, 4).decode(ONE, module(1, 3).init_cache(3, T)), "3 slots .* window=4"),
        (lambda a: CROSS(module(window=3)), "window=3 with a memory"),
        (
            lambda a: module(3, 3).decode(ONE, module(3).init_cache(1, T).expand(3)),
            "BeamCache holds all tokens, and a module with window=3",
        ),
        (lambda a: module(window=3).decode(ONE[:2], CROSS(a)), "window=3 with a memory"),
    ],
)
def test_misuse_raises(misuse, message):
    with pytest.raises(ValueError, match=message):
        misuse(module())


# Beams


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("lengths", [(0, 0), (4, 2)])
def test_lanes_hold_what_moved_copies_would(kv_heads, lengths):
    """Hypotheses branch, die out and merge; the plain way copies a row of the cache each time."""
    beam, slots, rng = 3, 9, np.random.default_rng(5)
    attention = module(kv_heads)
    cache = attention.init_cache(2, slots)
    _, cache = jitted(attention, "prefill")(normal(0, 2, 4, D), cache, np.array(lengths))
    lanes = expand(cache, beam)
    copies = jax.tree.map(lambda x: jnp.repeat(x, beam, axis=0), cache)
    for step in range(slots - max(lengths)):
        x = normal(1 + step, 2 * beam, 1, D)
        got, lanes = jitted(attention, "decode")(x, lanes)
        expected, copies = jitted(attention, "decode")(x, copies)
        close(got, expected)
        parent_Bb = jnp.asarray(rng.integers(0, beam, (2, beam)))
        before = lanes.key
        lanes = reorder(lanes, parent_Bb)
        assert lanes.key is before, "keys must stay where they are"
        copies = jax.tree.map(
            lambda x, p=parent_Bb: x[(np.arange(2)[:, None] * beam + p).ravel()], copies
        )
        np.testing.assert_array_equal(lanes.length, copies.length)
    x = normal(99, 2 * beam, 1, D)
    with pytest.raises(ValueError, match=f"hold {slots + 1} tokens.* room for {slots}"):
        attention.decode(x, lanes)
    # Under jit only the rows of the fuller batch element are lost, if only that one is full.
    is_full = np.repeat(np.array(lengths) == max(lengths), beam)
    got = jitted(attention, "decode")(x, lanes)[0]
    np.testing.assert_array_equal(np.isnan(got).all(axis=(1, 2)), is_full)


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "options"),
    [
        (mqa_jax.DecoderOnly, 1, {}),
        (mqa_jax.DecoderOnly, 2, dict(positions="rope")),
        *(
            pytest.param(mqa_jax.EncoderDecoder, *case, marks=pytest.mark.slow)
            for case in ((4, {}), (1, dict(positions="relative")))
        ),
    ],
)
def test_beam_search_over_lanes_is_beam_search_over_copies(model_type, kv_heads, options):
    config = mqa_jax.TransformerConfig(
        vocab_size=11,
        d_model=12,
        d_ff=17,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=6,
        max_length=13,
        **options,
    )
    model = model_type(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda x: normal(x.size, *x.shape), params)
    prompt_BP, lengths_B = jnp.array([[1, 4, 6, 9], [3, 8, 0, 0]]), jnp.array([4, 2])

    @functools.partial(jax.jit, static_argnums=2)
    def search(params, prompt_BP, is_plain):
        model = nnx.merge(graphdef, params)
        rest = ()
        if model_type is mqa_jax.EncoderDecoder:
            rest = (model.init_cross_cache(prompt_BP, lengths_B),)
        _, cache = model.prefill(prompt_BP, model.init_cache(2, 13), *rest, lengths_B)
        # In a tuple the arrays have no way of their own, so the search copies their rows.
        pack = (lambda cache: tuple(vars(x) for x in cache)) if is_plain else (lambda cache: cache)
        unpack = (lambda cache: tuple(caches.KVCache(**x) for x in cache)) if is_plain else pack

        def step_fn(tokens_R, cache):
            logits_RV, cache = model.decode(tokens_R, unpack(cache), *rest)
            return logits_RV, pack(cache)

        return mqa_jax.beam_search(
            step_fn, pack(cache), jnp.array([2, 5]), beam_size=4, max_new_tokens=9, eos_id=7
        )

    got, expected = search(params, prompt_BP, False), search(params, prompt_BP, True)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.length, expected.length)
    close(got.score, expected.score)
    assert got.steps > 3


def test_a_chunk_for_beams_is_refused():
    attention = module()
    cache = attention.init_cache(2, 5).expand(3)
    with pytest.raises(ValueError, match="one token a row, not T=2"):
        attention.prefill(normal(0, 6, 2, D), cache)


@pytest.mark.parametrize(
    ("search", "kv_heads", "window"),
    [
        ("greedy", 4, None),
        ("greedy", 1, None),
        ("greedy", 1, 3),
        ("beam_search", 4, None),
        ("beam_search", 1, None),  # Of a ring, which is small, beams do move the rows.
    ],
)
def test_no_cache_is_copied_in_the_compiled_loop(search, kv_heads, window):
    """In the optimized HLO; greedy decoding is given its cache, beam search makes its own."""
    config = mqa_jax.TransformerConfig(
        vocab_size=11,
        d_model=12,
        d_ff=17,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=5,
        max_length=29,
        window=window,
    )
    model = mqa_jax.DecoderOnly(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    options = dict(beam_size=3, eos_id=7) if search == "beam_search" else {}

    @functools.partial(jax.jit, donate_argnums=1 if search == "greedy" else ())
    def run(params, cache, tokens_B):
        model = nnx.merge(graphdef, params)
        decode = getattr(mqa_jax, search)
        decoded = decode(model.decode, cache, tokens_B, max_new_tokens=23, **options)
        return decoded.tokens, decoded.cache

    cache = model.init_cache(2, 29)
    hlo = run.lower(params, cache, jnp.array([2, 5])).compile().as_text()
    beams = cache if search == "greedy" else expand(cache, 3)
    for shape in {x.shape for layer in (*cache, *beams) for x in (layer.key, layer.value)}:
        array = re.escape(f"f32[{','.join(map(str, shape))}]")
        assert re.search(array, hlo), "the loop must have such an array"
        copies = re.findall(rf".* = {array}\S* copy(?:-start)?\(.*", hlo)
        assert not copies, copies
