"""What a mask hides has no influence, be it NaN or infinite; what it shows does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import TOLERANCE, close, normal, random_mask
from compiled import compiled
from flax import nnx

import mqa_jax
from mqa_jax.attention import functional

B, T, S, N, H, D = 2, 7, 11, 6, 5, 13
KV_HEADS = (3, 1)
NOT_FINITE = (np.nan, pytest.param(np.inf, marks=pytest.mark.slow))


def module(kv_heads=3, **kwargs):
    return mqa_jax.Attention(D, N, kv_heads, H, **dict(rngs=nnx.Rngs(0)) | kwargs)


def segments(*lengths):
    return jnp.asarray(np.repeat(np.arange(1, len(lengths) + 1), lengths))[None]


def hidden_masks():
    """Name: a mask of 7 queries and 7 keys, and a key that some queries see and others do not."""
    per_head = random_mask(1, (B, N, T, T))
    per_head[..., 2] = np.arange(T) % 2 == np.arange(N)[:, None] % 2
    return dict(
        keys=(np.arange(T)[None, None, None] != 2, 2),
        causal=(np.tril(np.ones((T, T), bool))[None, None], 4),
        per_head=(per_head, 2),
        packed=(np.asarray(mqa_jax.segment_mask(segments(3, 4), segments(3, 4))), 2),
    )


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("kind", hidden_masks())
@pytest.mark.parametrize("blocks", [False, True])
def test_of_keys_and_values_only_those_seen_reach_outputs_and_gradients(
    kind, kv_heads, bad, blocks, monkeypatch
):
    if blocks:
        monkeypatch.setattr(functional, "QUERY_BLOCK", 3)
    mask, at = hidden_masks()[kind]
    sees_BTN = np.broadcast_to(mask[..., at], (B, N, T)).swapaxes(1, 2)
    query, cotangent = normal(0, B, T, N, H), normal(1, B, T, N, H)
    arrays = query, normal(2, B, T, kv_heads, H), normal(3, B, T, kv_heads, H)
    attend = functools.partial(mqa_jax.dot_product_attention, mask=mask)
    # The loss is of the queries that do not see it.
    cotangent = jnp.where(sees_BTN[..., None], 0.0, cotangent)

    @jax.jit
    def run(*arrays):
        output, backward = jax.vjp(attend, *arrays)
        return attend(*arrays), output, *backward(cotangent)

    expected = run(*arrays)
    for which in (1, 2):  # a key, a value
        spoiled = list(arrays)
        spoiled[which] = arrays[which].at[:, at].set(bad)
        alone, output, *gradients = run(*spoiled)
        for actual in (alone, output):
            if which == 2 or np.isnan(bad):  # An infinite key may have a weight of zero.
                assert not np.isfinite(actual[sees_BTN]).any()
            close(actual[~sees_BTN], expected[0][~sees_BTN], **TOLERANCE["float32"])
        for gradient, wanted in zip(gradients, expected[2:], strict=True):
            close(gradient, wanted, **TOLERANCE["float32"])


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_hidden_bias_has_no_gradient_through_a_cap(bad):
    arrays = normal(0, B, T, N, H), normal(2, B, T, 3, H), normal(3, B, T, 3, H)
    mask = np.tril(np.ones((T, T), bool))[None, None]

    def loss(arrays, bias):
        output = mqa_jax.dot_product_attention(*arrays, mask=mask, bias=bias, softcap=2.0)
        return jnp.sum(output**2)

    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    bias = normal(4, 1, N, T, T)
    expected = run(arrays, bias)
    got = run(arrays, jnp.where(mask, bias, bad))
    for actual, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(actual, wanted, **TOLERANCE["float32"])


def test_a_query_that_is_not_finite_stays_alone():
    """Its output is NaN, and the keys that it saw have the gradients of the other queries."""
    query, key, value = normal(0, B, T, N, H), normal(2, B, T, 3, H), normal(3, B, T, 3, H)
    cotangent = normal(1, B, T, N, H).at[:, 4].set(0.0)
    attend = functools.partial(mqa_jax.dot_product_attention, is_causal=True)

    @jax.jit
    def run(*arrays):
        output, backward = jax.vjp(attend, *arrays)
        return output, backward(cotangent)

    expected, wanted_gradients = run(query, key, value)
    output, gradients = run(query.at[:, 4].set(np.nan), key, value)
    others = np.arange(T) != 4
    assert np.isnan(output[:, 4]).all()
    close(output[:, others], expected[:, others], **TOLERANCE["float32"])
    for actual, wanted in zip(gradients, wanted_gradients, strict=True):
        close(actual, wanted, **TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("bad", "dtype"),
    # The last is finite, and keys and values of it are not.
    [
        (np.nan, "float32"),
        pytest.param(np.inf, "float32", marks=pytest.mark.slow),
        pytest.param(np.nan, "bfloat16", marks=pytest.mark.slow),
        (6e4, "float16"),
    ],
)
@pytest.mark.parametrize("kind", ["padding", "packed", "causal", "window", "memory"])
def test_the_full_pass_and_the_gradients_of_all_weights(kind, bad, dtype):
    attention = module(dtype=dtype, window=3 if kind == "window" else None)
    x, memory, kwargs, sees_T = normal(0, B, T, D), None, {}, np.zeros(T, bool)
    if kind == "padding":
        kwargs["mask"] = mqa_jax.padding_mask([4, 4], T)
    elif kind == "packed":
        kwargs["mask"] = mqa_jax.segment_mask(segments(3, 4), segments(3, 4))
        sees_T = np.arange(T) >= 3
    elif kind == "memory":
        memory = normal(1, B, S, D)
        kwargs["mask"] = mqa_jax.padding_mask([5, 5], S)
    else:
        kwargs["is_causal"] = True
        reach = 3 if kind == "window" else T
        sees_T = (np.arange(T) >= 5) & (np.arange(T) < 5 + reach)
    if kind != "memory":
        sees_T = sees_T | (np.arange(T) == 5)  # What asks is seen.
    cotangent = jnp.where(sees_T[:, None], 0.0, normal(4, B, T, D)).astype(dtype)

    @nnx.jit
    def run(attention, x, memory):
        def loss(attention):
            output = attention(x, memory, **kwargs)
            return jnp.sum(output * cotangent, where=~sees_T[None, :, None]), output

        return nnx.grad(loss, has_aux=True)(attention)

    def spoil(array):
        return None if array is None else array.at[:, 5].set(bad)

    gradients, output = run(
        attention, *((x, spoil(memory)) if kind == "memory" else (spoil(x), None))
    )
    expected_gradients, expected = run(attention, x, memory)
    close(output[:, ~sees_T], expected[:, ~sees_T], **TOLERANCE[dtype])
    assert not np.isfinite(output[:, sees_T]).any()
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
    if kind == "padding":  # Else the token itself takes part where it is finite.
        wanted = jax.tree.leaves(expected_gradients)
        for actual, leaf in zip(jax.tree.leaves(gradients), wanted, strict=True):
            close(actual, leaf, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("kv_heads", "window", "bad"),
    [(3, None, np.nan), (1, 3, np.nan), (3, 3, np.inf), (1, None, np.inf)],
)
def test_padding_of_a_prompt(kv_heads, window, bad):
    attention, lengths = module(kv_heads, window=window), np.array([4, 0, 6])
    x, is_token = normal(2, 3, T, D), np.arange(T) < lengths[:, None]

    @nnx.jit
    def run(attention, x):
        def loss(attention):
            output, cache = attention.prefill(x, attention.init_cache(3, T), lengths)
            return jnp.sum(output, where=is_token[..., None]), (output, cache)

        return nnx.grad(loss, has_aux=True)(attention)

    expected_gradients, (expected, expected_cache) = run(attention, x)
    gradients, (output, cache) = run(attention, jnp.where(is_token[..., None], x, bad))
    np.testing.assert_array_equal(output[is_token], expected[is_token])
    jax.tree.map(np.testing.assert_array_equal, cache, expected_cache)
    jax.tree.map(np.testing.assert_array_equal, gradients, expected_gradients)


@pytest.mark.parametrize(
    ("kv_heads", "slots", "dtype", "bad"),  # Sums and products, see `_is_sum`.
    [
        (6, 11, "float32", np.nan),
        (6, 300, "float32", np.inf),
        (1, 11, "float32", np.inf),
        (1, 11, "bfloat16", np.nan),
    ],
)
def test_slots_of_a_cache_that_hold_no_token(kv_heads, slots, dtype, bad):
    attention, lengths = module(kv_heads, dtype=dtype), np.array([3, 0, 4])
    x = normal(2, 3, T, D, dtype=dtype)
    _, clean = compiled(attention, "prefill")(x[:, :4], attention.init_cache(3, slots), lengths)
    is_empty = np.arange(slots)[None] >= lengths[:, None]
    dirty = dataclasses.replace(
        clean,
        key=jnp.where(is_empty[:, None, :, None], bad, clean.key).astype(dtype),
        value=jnp.where(is_empty[:, None, :, None], bad, clean.value).astype(dtype),
    )

    @nnx.jit
    def run(attention, x, cache):
        def loss(x):
            one, after = attention.decode(x[:, :1], cache)
            return jnp.sum(attention.prefill(x, cache)[0] + one), (one, after)

        (loss, (one, after)), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        plain, after = attention.decode(x[:, 1:2], after)
        return loss, one, gradient, plain, attention.prefill(x[:, :2], after)[0]

    for actual, expected in zip(
        run(attention, x[:, 4:], dirty), run(attention, x[:, 4:], clean), strict=True
    ):
        tolerance = dict(rtol=0.1, atol=0.1) if dtype == "bfloat16" else TOLERANCE[dtype]
        close(actual, expected, **tolerance)
    # A token that is there is seen, by its own row alone.
    seen = dataclasses.replace(dirty, value=dirty.value.at[2, :, 1].set(bad))
    _, one, _, plain, more = run(attention, x[:, 4:], seen)
    for output in (one, plain, more):
        assert not np.isfinite(output[2]).any() and np.isfinite(output[:2]).all()


@pytest.mark.parametrize(
    ("kv_heads", "bad"), [pytest.param(3, np.inf, marks=pytest.mark.slow), (1, np.nan)]
)
def test_empty_slots_of_a_ring(kv_heads, bad):
    attention, x = module(kv_heads, window=4), normal(2, 2, T, D)
    prefill, clean = compiled(attention, "prefill"), attention.init_cache(2, T)
    dirty = dataclasses.replace(
        clean, key=jnp.full_like(clean.key, bad), value=jnp.full_like(clean.value, bad)
    )
    for step in ([1] * T, [2, 1, 3, 1]):
        outputs = []
        for cache in (clean, dirty):
            start = 0
            outputs.append([])
            for length in step:
                output, cache = prefill(x[:, start : start + length], cache)
                outputs[-1].append(output)
                start += length
        close(*(jnp.concatenate(each, axis=1) for each in outputs), **TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("beams", "kv_heads", "bad"),
    [
        (1, 3, np.nan),
        pytest.param(1, 1, np.inf, marks=pytest.mark.slow),
        pytest.param(3, 3, np.inf, marks=pytest.mark.slow),
        (3, 1, np.nan),
    ],
)
def test_a_memory_where_its_mask_is_false(beams, kv_heads, bad):
    attention, mask = module(kv_heads), np.arange(S)[None] < np.array([[4], [9]])
    x, memory = normal(0, B * beams, 1, D), normal(1, B, S, D)

    @jax.jit
    def run(attention, memory, mask):
        return attention.decode(x, attention.init_cross_cache(memory, mask))[0]

    poisoned = jnp.where(mask[..., None], memory, bad)
    grad = jax.jit(nnx.grad(lambda attention, memory, mask: run(attention, memory, mask).sum()))
    np.testing.assert_array_equal(
        run(attention, poisoned, mask), expected := run(attention, memory, mask)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        grad(attention, poisoned, mask),
        grad(attention, memory, mask),
    )
    # And a cache that somebody made from such a memory.
    by_hand = dataclasses.replace(
        attention.init_cross_cache(memory, mask),
        **{
            name: functional.heads_first(jnp.einsum("BSD,KHD->BSKH", poisoned, weight[...]))
            for name, weight in dict(key=attention.key, value=attention.value).items()
        },
    )
    close(compiled(attention, "decode")(x, by_hand)[0], expected, **TOLERANCE["float32"])


@pytest.mark.parametrize(("kv_heads", "bad"), [(3, np.nan), (1, np.inf)])
def test_lanes_of_other_hypotheses_and_slots_behind_the_last(kv_heads, bad):
    attention, beam = module(kv_heads), 3
    prefill, decode = compiled(attention, "prefill"), compiled(attention, "decode")
    _, cache = prefill(normal(0, 2, 4, D), attention.init_cache(2, 6), np.array([4, 2]))
    x = normal(1, 2 * beam, 1, D)
    (clean, lanes), (_, other) = (
        decode(x.at[1].set(value), cache.expand(beam)) for value in (x[1], bad)
    )
    dirty, _ = decode(x.at[1].set(bad), cache.expand(beam))
    mine = np.arange(2 * beam) != 1
    close(dirty[mine], clean[mine], **TOLERANCE["float32"])
    assert not np.isfinite(dirty[1]).any()
    # Slots that hold nothing: in lanes of a hypothesis, and in those that no hypothesis refers to.
    is_empty = np.arange(6)[None, None] >= np.array([5, 3])[:, None, None]
    other = dataclasses.replace(
        other,
        **{
            name: jnp.where(is_empty[:, None, ..., None], bad, getattr(other, name))
            for name in ("key", "value")
        },
    )
    x = normal(2, 2 * beam, 1, D)
    expected, _ = decode(x, lanes)
    actual, _ = decode(x, other)
    close(actual[mine], expected[mine], **TOLERANCE["float32"])
    assert not np.isfinite(actual[1]).any()
    # Hypothesis 1 dies, and its lane with it.
    parents = jnp.array([[0, 2, 2], [0, 1, 2]])
    outputs = [decode(x, each.reorder(parents))[0] for each in (other, lanes)]
    close(*outputs, **TOLERANCE["float32"])
