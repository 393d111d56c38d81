"""The benchmark's arithmetic on cases small enough to count by hand."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from flax import nnx

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig, benchmark

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
SELF = QUERY + KEY + VALUE + OUT + NORM
CROSS = QUERY + OUT + NORM  # its keys and values are not projected in a step


@pytest.mark.parametrize(
    ("model_type", "weights"),
    [
        (EncoderDecoder, 2 * (SELF + CROSS + FEED_FORWARD + NORM) + NORM + 11 * 6),
        (DecoderOnly, 2 * (SELF + FEED_FORWARD + NORM) + NORM + 6 * 11),
    ],
)
def test_weight_bytes_of_a_step(model_type, weights):
    assert benchmark.step_weight_bytes(model_type(CONFIG, rngs=nnx.Rngs(0))) == 4 * weights
    half = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    assert benchmark.step_weight_bytes(model_type(half, rngs=nnx.Rngs(0))) == 2 * weights


@pytest.mark.parametrize(("window", "slots"), [(None, 7), (3, 3)])
def test_kv_bytes_of_a_step(window, slots):
    config = dataclasses.replace(CONFIG, window=window)
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    cache = model.init_cache(5, 7)
    cross = model.init_cross_cache(jnp.zeros((5, 4), jnp.int32))
    layers, keys_and_values, float32 = 2, 2, 4
    rows = layers * keys_and_values * float32 * 5 * 2 * 3
    assert benchmark.kv_bytes(cache) == rows * slots
    assert benchmark.kv_bytes((cache, cross)) == rows * (slots + 4)


@pytest.fixture(scope="module")
def costs():
    long = dataclasses.replace(CONFIG, max_length=16)  # more positions are added
    sizes = dict(batch=3, context_length=30, repeats=2)
    return [
        benchmark.measure("translate", EncoderDecoder, long, **sizes),
        benchmark.measure("continue", DecoderOnly, long, **sizes),
    ]


def test_figures_follow_from_one_another(costs):
    for cost in costs:
        assert cost.compile_seconds > 0
        assert cost.step_ms_min <= cost.step_ms <= cost.step_ms_max
        assert cost.step_us_per_token == pytest.approx(1000 * cost.step_ms / 3)
    translate, proceed = costs
    assert translate.encode_us_per_token == pytest.approx(1000 * translate.encode_ms / (3 * 30))
    assert proceed.encode_ms is None and proceed.encode_us_per_token is None
    rows = 2 * 2 * 4 * 3 * 2 * 3
    assert (translate.kv_bytes, proceed.kv_bytes) == (rows * (30 + 30), rows * 30)


def test_figures_are_saved_with_what_they_were_measured_on(costs, tmp_path):
    benchmark.save(costs, tmp_path / "costs.json")
    assert benchmark.load(tmp_path / "costs.json") == costs
    record = json.loads((tmp_path / "costs.json").read_text())
    assert {"date", "device", "machine", "python", "jax"} <= record.keys()


def test_the_table_names_every_variant(costs, capsys):
    benchmark.print_table(costs)
    printed = capsys.readouterr().out
    assert "translate" in printed and "continue" in printed


def test_a_picture_is_of_one_batch_size(costs, tmp_path):
    benchmark.plot(costs, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 0
    other = dataclasses.replace(costs[0], batch=4)
    with pytest.raises(ValueError, match=r"\(3, 'float32'\), \(4, 'float32'\)"):
        benchmark.plot([*costs, other], tmp_path / "costs.png")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(batch=0, context_length=40), "not 0 and 5"),
        (dict(batch=1, context_length=40, repeats=0), "not 1 and 0"),
        (dict(batch=1, context_length=28), "context_length=28 is too short: 28 steps"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        benchmark.measure("any", EncoderDecoder, CONFIG, **sizes)
