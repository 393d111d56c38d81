"""What a step reads, computes and needs, on cases small enough to count by hand."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig
from mqa_jax.measure import roofline

CONFIG = TransformerConfig(
    vocab_size=11,
    d_model=6,
    d_ff=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    max_length=7,
)
NORM, FEED_FORWARD = 6, 6 * 10 + 10 * 6
QUERY = OUT = 6 * 4 * 3
KEY = VALUE = 6 * 2 * 3
SELF = QUERY + KEY + VALUE + OUT
CROSS = QUERY + OUT  # its keys and values are not projected in a step
SOFTMAX = 11 * 6
PRODUCTS = {
    EncoderDecoder: 2 * (SELF + CROSS + FEED_FORWARD) + SOFTMAX,
    DecoderOnly: 2 * (SELF + FEED_FORWARD) + SOFTMAX,
}
NORMS = {EncoderDecoder: 2 * 3 * NORM + NORM, DecoderOnly: 2 * 2 * NORM + NORM}


def make(model_type, **changes):
    """A model of which there are only the shapes."""
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.eval_shape(lambda: model_type(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("model_type", [EncoderDecoder, DecoderOnly])
def test_weight_bytes_of_a_step(model_type):
    weights = PRODUCTS[model_type] + NORMS[model_type]
    assert roofline.weight_bytes(make(model_type)) == 4 * weights
    assert roofline.weight_bytes(make(model_type, param_dtype="bfloat16")) == 2 * weights
    assert roofline.weight_bytes(model_type(CONFIG, rngs=nnx.Rngs(0))) == 4 * weights


@pytest.mark.parametrize(("window", "slots"), [(None, 7), (3, 3)])
def test_kv_bytes_of_a_step(window, slots):
    model = EncoderDecoder(dataclasses.replace(CONFIG, window=window), rngs=nnx.Rngs(0))
    cache = model.init_cache(5, 7)
    cross = model.init_cross_cache(jnp.zeros((5, 4), jnp.int32))
    layers, keys_and_values, float32 = 2, 2, 4
    rows = layers * keys_and_values * float32 * 5 * 2 * 3
    assert roofline.kv_bytes(cache) == rows * slots
    assert roofline.kv_bytes((cache, cross)) == rows * (slots + 4)
    assert roofline.kv_bytes(roofline.expanded(cache, 13)) == 13 * rows * slots


def test_abstract_caches_have_the_shapes_of_real_ones():
    model = EncoderDecoder(CONFIG, rngs=nnx.Rngs(0))
    real = model.init_cache(5, 7), model.init_cross_cache(jnp.zeros((5, 7), jnp.int32))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(roofline.abstract_caches(model, 5, 7)) == shapes(real)
    assert roofline.abstract_caches(make(DecoderOnly), 5, 7)[1] == ()


@pytest.mark.parametrize(("window", "slots"), [(None, 7), (3, 3)])
@pytest.mark.parametrize("model_type", [EncoderDecoder, DecoderOnly])
def test_flops_of_a_step(model_type, window, slots):
    model = make(model_type, window=window)
    caches = roofline.abstract_caches(model, 5, 7)
    read = slots + (7 if model_type is EncoderDecoder else 0)
    products, queries_keys, weights_values = 2 * PRODUCTS[model_type], 2 * 4 * 3, 2 * 4 * 3
    expected = products + 2 * read * (queries_keys + weights_values)  # two layers
    assert roofline.step_flops(model, caches, rows=1) == expected
    assert roofline.step_flops(model, caches, rows=13) == 13 * expected
    # Biases are added, and scales multiply what is there already.
    for changes in (dict(bias=("qkv", "mlp")), dict(quantized="int8", cache_dtype="int8")):
        model = make(model_type, window=window, **changes)
        caches = roofline.abstract_caches(model, 5, 7)
        assert roofline.step_flops(model, caches, rows=1) == expected


def test_the_least_time_is_that_of_reading_or_of_computing():
    limits = roofline.Roofline(gb_per_s=20.0, gflop_per_s=300.0)
    assert limits.milliseconds(10**9, 3 * 10**9) == pytest.approx(50)
    assert limits.milliseconds(10**8, 3 * 10**9) == pytest.approx(10)


def test_the_probes_give_rates(monkeypatch):
    monkeypatch.setattr(roofline, "PROBE_BYTES", 3e6)
    monkeypatch.setattr(roofline, "PROBE_SIZES", (17, 19))
    products, matmul = [], jnp.matmul

    def watched(x, y, **options):
        products.append(str(x.dtype))
        return matmul(x, y, **options)

    monkeypatch.setattr(jnp, "matmul", watched)
    precisions = {
        "bfloat16": "bfloat16",
        "bfloat16 int8": "int8",
        "float32 int8_weights int8-caches": "float32",
    }
    for precision, dtype in precisions.items():
        products.clear()
        limits = roofline.probe(precision)
        assert limits.gb_per_s > 0 and limits.gflop_per_s > 0
        assert set(products) == {dtype}


@pytest.mark.parametrize("model_type", [EncoderDecoder, DecoderOnly])
def test_the_largest_batch_is_the_last_that_fits(model_type):
    for changes in (dict(), dict(quantized="int8", cache_dtype="int8")):
        model = make(model_type, **changes)
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
        caches = roofline.kv_bytes(roofline.abstract_caches(model, 5, 7))
        exactly = weights + caches + 4 * 5 * model.config.vocab_size
        assert roofline.largest_batch(model, 7, exactly) == 5
        assert roofline.largest_batch(model, 7, exactly - 1) == 4
        assert roofline.largest_batch(model, 7, weights - 1) == 0


def test_memory_of_encoding_and_of_a_search():
    encoder = 2 * (QUERY + KEY + VALUE + OUT + FEED_FORWARD + 2 * NORM) + NORM
    # The decoder has keys and values of its own in cross-attention; tables of 7 positions each.
    decoder = PRODUCTS[EncoderDecoder] + NORMS[EncoderDecoder] + 2 * (KEY + VALUE)
    kv = 2 * 2 * 4 * 5 * 2 * 7 * 3
    parts = roofline.memory_parts(make(EncoderDecoder), batch=5, context_length=7)
    assert parts == {
        "weights": 4 * (encoder + decoder + 2 * 7 * 6),
        "caches": 2 * kv,
        "encoding": 3 * 4 * 5 * 4 * 7 * 7 + 4 * 5 * 7 * 10,
    }
    parts = roofline.memory_parts(make(DecoderOnly), batch=5, context_length=7, beam_size=3)
    assert (parts["caches"], parts["caches of the beams"]) == (kv, 3 * kv)
    assert parts["prefill"] == 3 * 4 * 5 * 4 * 7 * 7 + 4 * 5 * 7 * 10
    parts = roofline.memory_parts(make(DecoderOnly, vocab_size=997), 5, 7, beam_size=3)
    assert parts["steps"] == 3 * 4 * 5 * 3 * 997


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_xla_needs_no_more_memory_than_we_think(dtype, num_kv_heads):
    model = make(EncoderDecoder, max_length=257, num_kv_heads=num_kv_heads, dtype=dtype)
    graphdef, params = nnx.split(model)
    cache, cross = roofline.abstract_caches(model, 3, 257)
    tokens_BC = jax.ShapeDtypeStruct((3, 257), jnp.int32)

    def encode(params, tokens_BC):
        return nnx.merge(graphdef, params).init_cross_cache(tokens_BC)

    def prefill(params, tokens_BC, cache, cross):
        return nnx.merge(graphdef, params).prefill(tokens_BC, cache, cross)[1]

    encode_program = jax.jit(encode).lower(params, tokens_BC).compile()
    prefill_program = (
        jax.jit(prefill, donate_argnums=2).lower(params, tokens_BC, cache, cross).compile()
    )
    expected = roofline.memory_parts(model, 3, 257)["encoding"]
    for program in (encode_program, prefill_program):
        # Small things besides do not matter, a fourth array of logits would.
        assert 0.5 < program.memory_analysis().temp_size_in_bytes / expected < 1.1


def test_what_does_not_fit_is_refused_with_the_arithmetic(monkeypatch):
    model = make(DecoderOnly, max_length=100_000)
    monkeypatch.setattr(roofline, "memory_limit", lambda: 1e9)
    roofline.check_memory("any", model, 1, 10_000)
    # 3 * 4 bytes * 4 heads * 512 queries at a time * 50_000 = 1.2 GB
    with pytest.raises(ValueError, match=r"any at batch 1, context length 50000.*has 1\.0 GB") as e:
        roofline.check_memory("any", model, 1, 50_000)
    assert "weights 0.0 GB + caches 0.0 GB + prefill 1.2 GB = 1.2 GB" in str(e.value)


def test_the_memory_of_an_accelerator_is_what_it_says(monkeypatch):
    assert roofline.memory_limit() > 1e8
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1234})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert roofline.memory_limit() == 1234
