"""Whatever ids padding has, and wherever it lies, no token of a sentence notices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mqa_jax
from mqa_jax.model.layers import Embedding

V, MAX_LENGTH, B, S, T = 23, 13, 3, 5, 7
CONFIG = mqa_jax.TransformerConfig(
    vocab_size=V,
    d_model=8,
    d_ff=11,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=5,
    max_length=MAX_LENGTH,
)
BAD = (-1, -100, V, 2**31 - 1)


def build(cls, **changes):
    return cls(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(1, V, shape), jnp.int32)


def padded(x, lengths, bad):
    """`x` with `bad` behind the first `lengths`, and which are tokens."""
    is_token = np.arange(x.shape[1]) < np.array(lengths)[:, None]
    return jnp.where(is_token, x, bad), is_token


@nnx.jit
def losses(model, *inputs, **segments):
    """The logits, and the gradients of a loss over the tokens alone."""
    is_token = (segments.get("target_segment_ids", segments.get("segment_ids")) != 0)[..., None]

    def loss(model):
        logits = model(*inputs, **segments)
        return jnp.sum(jnp.where(is_token, logits, 0.0) ** 2), logits

    return nnx.grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("bad", BAD)
def test_training_rows_of_both_models(bad):
    source, is_source = padded(tokens(0, B, S), [5, 2, 4], bad)
    target, is_target = padded(tokens(1, B, T), [3, 7, 5], bad)
    for cls in (mqa_jax.EncoderDecoder, mqa_jax.DecoderOnly):
        model = build(cls)
        if cls is mqa_jax.DecoderOnly:
            inputs, segments = (target,), dict(segment_ids=is_target.astype(np.int32))
        else:
            inputs = source, target
            segments = dict(source_segment_ids=is_source.astype(np.int32))
            segments |= dict(target_segment_ids=is_target.astype(np.int32))
        usual = tuple(jnp.where(x == bad, 0, x) for x in inputs)
        got, expected = losses(model, *inputs, **segments), losses(model, *usual, **segments)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize(("bad", "window"), [*zip(BAD, (None, 3, None, 3), strict=True)])
def test_sources_prompts_and_chunks(bad, window):
    source, _ = padded(tokens(0, B, S), [5, 2, 4], bad)
    target, is_target = padded(tokens(1, B, T), [3, 7, 5], bad)
    model = build(mqa_jax.EncoderDecoder, window=window)

    @nnx.jit
    def run(model, source, target):
        cross = model.init_cross_cache(source, jnp.array([5, 2, 4]))
        cache = model.init_cache(B, T + 1)
        logits, cache = model.prefill(target, cache, cross, jnp.array([3, 7, 5]))
        return logits, model.decode(jnp.array([1, 2, 3]), cache, cross)

    logits, (after, cache) = run(model, source, target)
    usual = (jnp.where(x == bad, 0, x) for x in (source, target))
    expected, (expected_after, expected_cache) = run(model, *usual)
    np.testing.assert_array_equal(logits[is_target], expected[is_target])
    np.testing.assert_array_equal(after, expected_after)
    assert np.isfinite(after).all() and np.isfinite(logits[is_target]).all()
    jax.tree.map(np.testing.assert_array_equal, cache, expected_cache)


def test_gradients_behind_a_padded_prompt():
    """What padding embeds as reaches no weight, those that are not attention's neither."""
    target, is_target = padded(tokens(1, B, T), [3, 7, 5], -1)

    @nnx.jit
    def run(model, target):
        def loss(model):
            logits, _ = model.prefill(target, model.init_cache(B, T), jnp.array([3, 7, 5]))
            return jnp.sum(jnp.where(is_target[..., None], logits, 0.0) ** 2)

        return nnx.grad(loss)(model)

    model = build(mqa_jax.DecoderOnly)
    got, expected = run(model, target), run(model, jnp.where(is_target, target, 0))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.slow
def test_a_chunk_whose_padding_lies_behind_the_last_position():
    model = build(mqa_jax.DecoderOnly)
    target = tokens(1, B, MAX_LENGTH)
    full = model(target)
    _, cache = model.prefill(target[:, :9], model.init_cache(B, MAX_LENGTH))
    chunk = jnp.concatenate([target[:, 9:], tokens(2, B, 3)], axis=1)  # 4 tokens, of which 4, 1, 0
    logits, cache = model.prefill(chunk, cache, [4, 1, 0])
    np.testing.assert_allclose(logits[0, :4], full[0, 9:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[1, 0], full[1, 9], rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_id_stays_in_its_sentence_of_a_packed_row(bad):
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2]])
    source = target = tokens(1, 1, T)
    for cls in (mqa_jax.EncoderDecoder, mqa_jax.DecoderOnly):
        model = build(cls)
        if cls is mqa_jax.DecoderOnly:
            run = functools.partial(model, segment_ids=segments)
        else:
            ids = dict(source_segment_ids=segments, target_segment_ids=segments)
            run = functools.partial(model, target_inputs_BT=target, **ids)
        expected, got = run(source), run(source.at[0, 1].set(bad))
        np.testing.assert_allclose(got[0, 3:], expected[0, 3:], rtol=1e-5, atol=1e-6)
        assert np.isnan(got[0, 1:3]).all()
        np.testing.assert_array_equal(np.isnan(got[0, 0]).all(), cls is mqa_jax.EncoderDecoder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_caches_of_a_dtype_of_their_own(dtype):
    target = tokens(1, B, T)
    model = build(mqa_jax.DecoderOnly)
    cache = model.init_cache(B, T, dtype=dtype)
    assert cache[0].key.dtype == dtype
    first, cache = model.prefill(target[:, :4], cache)
    second, cache = model.decode(target[:, 4], cache)
    assert cache[1].value.dtype == dtype and second.dtype == jnp.float32
    full = model(target)
    np.testing.assert_allclose(first, full[:, :4], rtol=0.1, atol=0.1)
    np.testing.assert_allclose(second, full[:, 4], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_ff", 2.5), ("vocab_size", True), ("num_layers", "2"), ("window", 2.5), ("remat", 1)]
    + [("dropout_rate", np.nan), ("attention_dropout_rate", "0.1"), ("dtype", "fp16")]
    + [("param_dtype", "int32"), ("head_dim", 4.0), ("max_length", -1)],
)
def test_a_config_is_checked_before_any_weight_is_made(field, value):
    with pytest.raises(
        ValueError, match=f"{field} must be .*, not|remat 1 is not one of False, True"
    ):
        dataclasses.replace(CONFIG, **{field: value})


def test_ids_that_are_none_are_refused():
    model = build(mqa_jax.DecoderOnly)
    for misuse in (
        lambda: model(np.ones((B, T))),
        lambda: model.decode(np.ones(B), model.init_cache(B, T)),
        lambda: model.prefill(np.ones((B, T)), model.init_cache(B, T)),
        lambda: model(tokens(0, B, T), segment_ids=np.ones((B, T))),
        lambda: model(tokens(0, B, T), positions=np.ones((B, T))),
    ):
        with pytest.raises(ValueError, match="must be integers, not float64"):
            misuse()
    with pytest.raises(ValueError, match="holds 4294967301, which does not fit into int32"):
        model(np.full((B, T), 2**32 + 5))


def test_a_narrow_id_does_not_wrap_around_into_the_table():
    table = Embedding(300, 4, rngs=nnx.Rngs(0))
    assert np.isnan(table(np.array([-1], np.int8))).all()
    np.testing.assert_array_equal(table(np.array([200], np.uint8)), table(np.array([200])))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            np.isnan(table(jnp.array([7, 2**32 + 7, 2**31, -(2**32) + 7]))).all(1), [0, 1, 1, 1]
        )
