"""The models: cached decode, packing, windows, dropout; and a NumPy model beside them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig
from mqa_jax.attention.positions import Rope

B, S, T, V, D, L, MAX_LENGTH = 7, 5, 6, 37, 10, 2, 13
CONFIG = TransformerConfig(
    vocab_size=V,
    d_model=D,
    d_ff=17,
    num_layers=L,
    num_heads=4,
    num_kv_heads=4,
    head_dim=3,
    max_length=MAX_LENGTH,
)
# Compilation is what these tests take their time for: two of them have two layers.
VARIANTS = {
    "multi_head": dict(num_kv_heads=4),
    "multi_query": dict(num_kv_heads=1, num_layers=1),
    "multi_head_local": dict(num_kv_heads=4, window=3, num_layers=1),
    "multi_query_local": dict(num_kv_heads=1, window=3),
    "grouped_query": dict(num_kv_heads=2, num_layers=1),
    # What later models are made of, all of it in few models.
    "rope": dict(
        positions="rope", head_dim=4, num_kv_heads=1, qk_norm=True, gated=True, activation="silu"
    ),
    "sandwich": dict(
        positions="rope",
        rope=Rope(theta=50.0, scaling="linear", factor=2.0),
        head_dim=4,
        block="sandwich",
        window=(3, None),
        attention_softcap=1.0,
        logits_softcap=2.0,
        attention_scale=0.7,
        num_kv_heads=2,
    ),
    "relative": dict(
        positions="relative",
        relative_buckets=6,
        relative_distance=9,
        attention_scale=1.0,
        window=4,
        tied_softmax=False,
        num_layers=1,
    ),
    "post": dict(
        positions="sinusoidal",
        block="post",
        norm="layer",
        bias=("qkv", "out", "mlp", "logits"),
        tied_softmax=True,
        embedding_scale=3.0,
        num_encoder_layers=1,
        encoder_kv_heads=2,
        cross_kv_heads=1,
    ),
    "int8_weights": dict(quantized="int8_weights", num_kv_heads=2, window=(3, None)),
    "int8": dict(quantized="int8", num_kv_heads=1, gated=True, tied_softmax=True, num_layers=1),
}
# Blocks without a place for cross-attention.
PARALLEL = {
    "parallel": dict(positions="rope", head_dim=4, block="parallel", num_kv_heads=1, num_layers=1),
    "parallel_norms": dict(
        positions="rope", head_dim=4, block="parallel", parallel_norms=2, norm="layer", num_layers=1
    ),
}
MODELS = [EncoderDecoder, DecoderOnly]
# Some layers of roundings, in logits of about 1; bfloat16 keeps 8 bits, as does a row of int8, in
# which a sum in another order may come to lie on the other side of a half.
TOLERANCE = {
    "float32": dict(rtol=1e-5, atol=1e-5),
    "bfloat16": dict(rtol=5e-2, atol=5e-2),
    "int8": dict(rtol=5e-2, atol=5e-2),
}


def close(actual, expected, dtype="float32"):
    np.testing.assert_allclose(actual, expected, equal_nan=False, **TOLERANCE[dtype])


def build(cls, variant="multi_query", **changes):
    config = dataclasses.replace(CONFIG, **(VARIANTS | PARALLEL)[variant] | changes)
    model = cls(config, rngs=nnx.Rngs(0))
    # Biases begin at 0 and scales at 1, which would hide where they are left out.
    state = nnx.state(model)
    if config.quantized is None:
        nnx.update(model, jax.tree.map(lambda x: x + 0.1 * normal(x) if x.ndim == 1 else x, state))
    return model


def normal(like):
    return jnp.asarray(np.random.default_rng(like.size).normal(size=like.shape), like.dtype)


def tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    compiler_options=dict(  # compile fast
        xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True
    ),
)
def _call(graphdef, method, state, args, kwargs):
    return getattr(nnx.merge(graphdef, state), method)(*args, **kwargs)


def call(model, *args, method="__call__", **kwargs):
    """A method of the model under `jax.jit`, compiled once for each architecture and shape."""
    graphdef, state = nnx.split(model)
    return _call(graphdef, method, state, args, kwargs)


def forward(model, source, target, source_lengths=None, **kwargs):
    """The full pass of either model; a decoder alone has no use for the source."""
    if isinstance(model, DecoderOnly):
        return call(model, target, **kwargs)
    if source_lengths is not None:
        is_token = np.arange(source.shape[1]) < source_lengths[:, None]
        kwargs["source_segment_ids"] = is_token.astype(np.int32)
        kwargs["target_segment_ids"] = np.ones(target.shape, np.int32)
    return call(model, source, target, **kwargs)


# The rest of them is slow; each variant is here with one of both models.
QUICK = [
    (EncoderDecoder, "multi_query"),
    (EncoderDecoder, "relative"),
    (EncoderDecoder, "post"),
    (DecoderOnly, "multi_head_local"),
    (DecoderOnly, "rope"),
    (DecoderOnly, "sandwich"),
    (DecoderOnly, "parallel"),
]


@pytest.mark.parametrize(
    ("cls", "variant", "dtype"),
    [(*case, "float32") for case in QUICK]
    + [
        pytest.param(cls, variant, "float32", marks=pytest.mark.slow)
        for cls, variants in ((EncoderDecoder, VARIANTS), (DecoderOnly, VARIANTS | PARALLEL))
        for variant in variants
        if (cls, variant) not in QUICK
    ]
    + [(EncoderDecoder, "multi_query_local", "bfloat16")],
)
def test_decode_equals_the_full_pass_from_every_prefix_length(cls, variant, dtype):
    model = build(cls, variant, dtype=dtype)
    rows = prefix = np.arange(B)  # row `b` has a prompt of `b` tokens, none and all included
    source, target = tokens(0, B, S), tokens(1, B, T)
    source_lengths = np.array([5, 1, 4, 2, 3, 5, 4])
    full = forward(model, source, target, source_lengths)
    assert full.dtype == jnp.float32 and full.shape == (B, T, V)
    cross = ()
    if cls is EncoderDecoder:
        cross = (call(model, source, source_lengths, method="init_cross_cache"),)
    cache = model.init_cache(B, 2 * T)
    assert cache[0].key.dtype == dtype
    logits, cache = call(model, target, cache, *cross, lengths_B=prefix, method="prefill")
    is_prompt = np.arange(T) < prefix[:, None]
    tolerance = "int8" if variant == "int8" else dtype
    close(logits[is_prompt], full[is_prompt], tolerance)
    for step in range(T):
        position = np.minimum(prefix + step, T - 1)
        logits, cache = call(model, target[rows, position], cache, *cross, method="decode")
        is_left = prefix + step < T
        close(logits[is_left], full[rows, position][is_left], tolerance)


def reference(model, source, target):
    """The encoder-decoder without padding or window, in NumPy and float64."""
    weight = functools.partial(np.asarray, dtype=np.float64)

    def norm(layer, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight(layer.scale[...])

    def attend(layer, x, memory, is_causal=False):
        query = np.einsum("td,nhd->nth", x, weight(layer.query[...]))
        heads = query.shape[0] // layer.key.shape[0]
        key, value = (
            np.repeat(np.einsum("sd,khd->ksh", memory, weight(w[...])), heads, axis=0)
            for w in (layer.key, layer.value)
        )
        logits = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
        if is_causal:
            logits[:, np.triu(np.ones(logits.shape[1:], bool), 1)] = -np.inf
        exp = np.exp(logits)
        output = exp / exp.sum(-1, keepdims=True) @ value
        return np.einsum("nth,dnh->td", output, weight(layer.out[...]))

    def feed_forward(layer, x):
        return np.maximum(x @ weight(layer.wi[...]).T, 0) @ weight(layer.wo[...]).T

    table = weight(model.embedding.table[...])

    def embed(embedder, ids):
        return table[ids] + weight(embedder.positions.table[...])[: len(ids)]

    x = embed(model.encoder_embedder, source)
    for layer in model.encoder_layers:
        y = norm(layer.attention_norm, x)
        x = x + attend(layer.attention, y, y)
        x = x + feed_forward(layer.feed_forward, norm(layer.feed_forward_norm, x))
    memory = norm(model.encoder_norm, x)
    x = embed(model.decoder.embedder, target)
    for layer in model.decoder.layers:
        y = norm(layer.attention_norm, x)
        x = x + attend(layer.attention, y, y, is_causal=True)
        x = x + attend(layer.cross_attention, norm(layer.cross_attention_norm, x), memory)
        x = x + feed_forward(layer.feed_forward, norm(layer.feed_forward_norm, x))
    return norm(model.decoder.norm, x) @ table.T / np.sqrt(D)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_encoder_decoder_equals_numpy(kv_heads):
    model = build(EncoderDecoder, num_kv_heads=kv_heads, num_layers=2 if kv_heads == 2 else 1)
    source, target = tokens(2, 3, S), tokens(3, 3, T)
    logits = call(model, source, target)
    for row in range(3):
        close(logits[row], reference(model, np.array(source[row]), np.array(target[row])))


@pytest.mark.parametrize(
    ("cls", "variant"),
    [
        (EncoderDecoder, "multi_head_local"),
        (DecoderOnly, "multi_query"),
        (DecoderOnly, "parallel"),
        pytest.param(EncoderDecoder, "rope", marks=pytest.mark.slow),
        pytest.param(EncoderDecoder, "relative", marks=pytest.mark.slow),
        pytest.param(DecoderOnly, "post", marks=pytest.mark.slow),
    ],
)
def test_packed_rows_equal_the_sentences_alone(cls, variant):
    model = build(cls, variant)
    sentences = [(tokens(4, 1, 4), tokens(5, 1, 3)), (tokens(6, 1, 3), tokens(7, 1, 5))]

    def pack(side, length):
        row, segments, positions = np.zeros((3, 1, length), np.int32)
        start = 0
        for i, sentence in enumerate(sentences):
            end = start + sentence[side].shape[1]
            row[:, start:end] = sentence[side]
            segments[:, start:end] = i + 1
            positions[:, start:end] = np.arange(end - start)
            start = end
        return row, segments, positions

    source, source_segments, source_positions = pack(0, 8)
    target, target_segments, target_positions = pack(1, 11)
    if cls is EncoderDecoder:
        segments = dict(source_segment_ids=source_segments, target_segment_ids=target_segments)
        positions = dict(source_positions=source_positions, target_positions=target_positions)
    else:
        segments, positions = dict(segment_ids=target_segments), dict(positions=target_positions)
    packed = forward(model, source, target, **segments, **positions)
    close(packed[:, :3], forward(model, *sentences[0]))
    close(packed[:, 3:8], forward(model, *sentences[1]))
    assert np.isfinite(packed).all()
    # And both arguments take part in it.
    for other in (segments, positions):
        other = {name: np.ones_like(value) for name, value in other.items()}
        mixed = forward(model, source, target, **segments | positions | other)
        assert np.abs(mixed - packed)[:, 3:8].max() > 0.01


def test_a_window_is_of_the_decoders_self_attention_only():
    everything, local = (build(EncoderDecoder, window=window, num_layers=2) for window in (None, 3))
    source, target = tokens(0, 2, MAX_LENGTH), tokens(1, 2, T)
    encoded = [call(model, source, method="encode") for model in (everything, local)]
    np.testing.assert_array_equal(*encoded)
    logits = [call(model, source, target) for model in (everything, local)]
    close(logits[0][:, :3], logits[1][:, :3])  # a window of 3 hides nothing from 3 tokens
    assert np.abs(logits[0] - logits[1])[:, 3:].max(axis=-1).min() > 1e-3


@pytest.mark.parametrize(("window", "reach"), [(None, MAX_LENGTH), (3, 2 * L), (2, L)])
def test_a_token_changes_what_comes_behind_it_as_far_as_windows_reach(window, reach):
    model = build(DecoderOnly, window=window, num_layers=L)
    target = tokens(1, 1, MAX_LENGTH)
    changed = target.at[0, 4].set((target[0, 4] + 1) % V)
    difference = call(model, changed) - call(model, target)
    distance = np.arange(MAX_LENGTH) - 4
    np.testing.assert_array_equal(
        np.abs(difference[0]).max(axis=-1) > 0, (distance >= 0) & (distance <= reach)
    )


def test_every_source_token_reaches_every_target_token():
    model = build(EncoderDecoder, window=2)
    source, target = tokens(0, 1, S), tokens(1, 1, T)
    logits = call(model, source, target)
    for s in range(S):
        changed = source.at[0, s].set((source[0, s] + 1) % V)
        assert np.abs(call(model, changed, target) - logits).max(axis=-1).min() > 1e-4


def test_beams_share_their_sources_cross_cache():
    model = build(EncoderDecoder)
    source, target = tokens(0, 2, S), tokens(1, 6)
    cross = call(model, source, np.array([5, 2]), method="init_cross_cache")
    tiled = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), cross)
    shared, _ = call(model, target, model.init_cache(6, T), cross, method="decode")
    close(shared, call(model, target, model.init_cache(6, T), tiled, method="decode")[0])


def test_embeddings_are_tied_in_the_encoder_decoder_only():
    def shapes(cls):
        state = nnx.state(nnx.eval_shape(lambda: build(cls)))
        return [leaf.shape for leaf in jax.tree.leaves(state)]

    tied, untied = shapes(EncoderDecoder), shapes(DecoderOnly)
    assert (tied.count((V, D)), untied.count((V, D))) == (1, 2)
    assert tied.count((MAX_LENGTH, D)) == 2 and untied.count((MAX_LENGTH, D)) == 1


@pytest.mark.parametrize("bad", [-1, -V, V, 2**31 - 1])
@pytest.mark.parametrize("cls", MODELS)
def test_an_id_outside_the_vocabulary_is_nan_in_its_row(cls, bad):
    model = build(cls)
    source, target = tokens(0, 3, S), tokens(1, 3, T)
    logits = forward(model, source, target.at[1, 2].set(bad))
    assert np.isnan(logits[1, 2:]).all() and np.isfinite(logits[::2]).all()
    if cls is EncoderDecoder:
        logits = forward(model, source.at[1, 2].set(bad), target)
        assert np.isnan(logits[1]).all() and np.isfinite(logits[::2]).all()


@pytest.mark.parametrize("bad", [-1, MAX_LENGTH])
def test_a_position_outside_the_table_is_nan(bad):
    positions = np.tile(np.arange(T), (3, 1))
    positions[1, 2] = bad
    logits = call(build(DecoderOnly), tokens(1, 3, T), positions=positions)
    assert np.isnan(logits[1, 2:]).all() and np.isfinite(logits[::2]).all()


@pytest.mark.parametrize("variant", ["multi_query", "multi_query_local"])
def test_decode_past_the_last_position_is_nan_in_its_row(variant):
    model = build(DecoderOnly, variant)
    at = jnp.array([MAX_LENGTH - 1, MAX_LENGTH, 0])
    cache = [dataclasses.replace(c, length=at) for c in model.init_cache(3, MAX_LENGTH)]
    logits, _ = call(model, tokens(0, 3), tuple(cache), method="decode")
    np.testing.assert_array_equal(np.isnan(logits).all(axis=-1), [False, True, False])
    assert np.isfinite(logits[::2]).all()


@pytest.mark.parametrize(
    ("cls", "rate"),
    [
        pytest.param(EncoderDecoder, "dropout_rate", marks=pytest.mark.slow),
        pytest.param(EncoderDecoder, "attention_dropout_rate", marks=pytest.mark.slow),
        (DecoderOnly, "relu_dropout_rate"),
    ],
)
def test_each_dropout_rate_alone_takes_effect_where_rngs_are_given(cls, rate):
    source, target = tokens(0, 2, S), tokens(1, 2, T)
    plain = forward(build(cls), source, target)
    model = build(cls, **{rate: 0.3})
    np.testing.assert_array_equal(forward(model, source, target), plain)
    first, again, other = (
        forward(model, source, target, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    for a, b in ((first, plain), (first, other)):
        assert np.abs(a - b).max(axis=(1, 2)).min() > 0 and np.isfinite(a).all()


@pytest.mark.parametrize("wrong", [-1, S + 1])
def test_a_source_length_that_is_none_is_nan_under_jit(wrong):
    model = build(EncoderDecoder)

    @jax.jit
    def run(lengths):
        cross = model.init_cross_cache(tokens(0, 3, S), lengths)
        return model.decode(tokens(1, 6), model.init_cache(6, T), cross)[0]

    logits = run(np.array([S, wrong, 0]))
    np.testing.assert_array_equal(np.isnan(logits).all(1), np.arange(6) // 2 == 1)
    np.testing.assert_array_equal(np.isnan(logits).any(1), np.arange(6) // 2 == 1)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda e, d: e(tokens(0, 1, 14), tokens(0, 1, T)), "14 tokens in a row.* 13 positions"),
        (lambda e, d: e(tokens(0, 1, S), tokens(0, 1, 15)), "15 tokens in a row.* 13 positions"),
        (lambda e, d: d(tokens(0, 1, 14)), "14 tokens in a row.* 13 positions"),
        (lambda e, d: d(tokens(0, 7)), r"\[B, T\], not \[7\]"),
        (lambda e, d: e.init_cache(1, 14), "cache of 14 tokens.* 13 positions"),
        (lambda e, d: d.init_cache(1, 14), "cache of 14 tokens.* 13 positions"),
        (lambda e, d: d.prefill(tokens(0, 1, T), d.init_cache(1, 5)), "row 0 .* 6 tokens.* for 5"),
    ]
    + [
        (
            lambda e, d, side=side: e(
                tokens(0, 1, T), tokens(1, 1, T), **{side: jnp.ones((1, T), jnp.int32)}
            ),
            "source_segment_ids and target_segment_ids, or neither",
        )
        for side in ("source_segment_ids", "target_segment_ids")
    ]
    + [
        (
            lambda e, d, name=name, shape=shape: d(
                tokens(0, 3, T), **{name: jnp.ones(shape, jnp.int32)}
            ),
            rf"{name.replace('_', ' ')} must have the shape of their tokens, \[3, 6\]",
        )
        for name in ("positions", "segment_ids")
        for shape in ((3, 1), (2, T), (3, T + 1))
    ]
    + [
        (lambda e, d: d.decode(tokens(0, 2), d.init_cache(3, T)), "2 rows, but the cache has 3"),
        (lambda e, d: d.decode(tokens(0, 3), d.init_cache(3, T) * 2), "each of the 1 .*, not 2"),
        (lambda e, d: d.decode(tokens(0, 3), d.init_cache(3, T)[0]), "cache must be a tuple"),
        (lambda e, d: e.decode(tokens(0, 3), e.init_cache(3, T), None), "cross must .*, not None"),
        (
            lambda e, d: d.prefill(tokens(0, 3, T), d.init_cache(3, T), np.ones(2, int)),
            r"lengths_B must have shape \(3,\), not \(2,\)",
        ),
        (
            lambda e, d: e.init_cross_cache(tokens(0, 3, S), np.ones(1, int)),
            r"lengths_B must have shape \(3,\), not \(1,\)",
        ),
    ],
)
def test_misuse_raises(misuse, message):
    with pytest.raises(ValueError, match=message):
        misuse(build(EncoderDecoder), build(DecoderOnly))


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, 0) for name in ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads")]
    + [(name, 0) for name in ("num_kv_heads", "head_dim", "max_length", "window")]
    + [("num_kv_heads", 3), ("dropout_rate", 1.0), ("dropout_rate", -0.1)]
    + [("attention_dropout_rate", 1.5), ("relu_dropout_rate", -1.0)],
)
def test_bad_config_values_raise(field, value):
    name = r"window must be .*, not 0" if field == "window" else rf"{field}.*{value}"
    with pytest.raises(ValueError, match=name):
        build(DecoderOnly, **{field: value})


@pytest.mark.parametrize(
    ("positions", "options"),
    [
        ("learned", dict(rope=Rope(theta=100.0))),
        ("relative", dict(rope=dict(scaling="linear", factor=2.0))),
        ("rope", dict(relative_buckets=8)),
        ("sinusoidal", dict(relative_distance=20)),
    ],
)
def test_an_option_of_other_positions_is_refused(positions, options):
    with pytest.raises(ValueError, match="is of no effect with positions"):
        dataclasses.replace(CONFIG, positions=positions, **options)
