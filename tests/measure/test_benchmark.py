"""The benchmark measures what it says, and nothing else."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig
from mqa_jax.measure import benchmark, roofline, timing
from mqa_jax.measure.cost import Precision
from mqa_jax.measure.roofline import Roofline

CONFIG = TransformerConfig(
    vocab_size=11,
    d_model=6,
    d_ff=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    max_length=16,  # more positions are added
)
TRANSLATE, CONTINUE = {"translate": (EncoderDecoder, CONFIG)}, {"continue": (DecoderOnly, CONFIG)}
LIMITS = Roofline(gb_per_s=17.0, gflop_per_s=190.0)


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    monkeypatch.setattr(benchmark, "probe", lambda dtype: LIMITS)


def sweep(models, **options):
    sizes = dict(batch_sizes=[3], context_lengths=[5], repeats=1)
    return list(benchmark.sweep(models, **sizes | options))


@pytest.fixture(scope="module")
def costs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "probe", lambda dtype: LIMITS)
        return sweep(
            TRANSLATE | CONTINUE, context_lengths=[37], searches=["greedy", "beam"], repeats=3
        )


def test_a_row_for_each_variant_and_search(costs):
    assert [(cost.variant, cost.search) for cost in costs] == list(
        itertools.product(["translate", "continue"], ["greedy", "beam"])
    )


def test_times_follow_from_one_another(costs):
    for cost in costs:
        assert cost.compile_seconds > 0 and cost.prefill_ms > 0
        assert 0 < cost.step_ms_min <= cost.step_ms <= cost.step_ms_max
        assert cost.step_us_per_token == pytest.approx(1000 * cost.step_ms / 3)
        assert (cost.reorder_ms is None) == (cost.search == "greedy")
        assert (cost.step_alone_ms is None) == (cost.search == "beam")
    for cost in costs[:2]:
        assert cost.encode_us_per_token == pytest.approx(1000 * cost.encode_ms / (3 * 37))
    for cost in costs[2:]:
        assert cost.encode_ms is None and cost.encode_us_per_token is None


def test_encoding_and_prefill_are_measured_once_for_all_searches(costs):
    for one, other in (costs[:2], costs[2:]):
        assert (one.encode_ms, one.prefill_ms) == (other.encode_ms, other.prefill_ms)


def test_traffic_and_arithmetic_of_a_step(costs):
    greedy, beam, alone, beam_alone = costs
    row = 2 * 2 * 4 * 3 * 2 * 3  # two layers, keys and values, 4 bytes, B, K, H
    assert (greedy.kv_bytes, alone.kv_bytes) == (row * (37 + 37), row * 37)
    # The hypotheses of a sentence share its source.
    assert (beam.kv_bytes, beam_alone.kv_bytes) == (row * (4 * 37 + 37), row * 4 * 37)
    assert beam.flops == 4 * greedy.flops and beam_alone.flops == 4 * alone.flops
    for cost in costs:
        num_bytes = cost.weight_bytes + cost.kv_bytes
        assert cost.gb_per_s == pytest.approx(num_bytes / 1e9 / (cost.step_ms / 1000))
        assert (cost.probe_gb_per_s, cost.probe_gflop_per_s) == (17, 190)
        assert cost.roofline_ms == pytest.approx(1000 * num_bytes / 17e9)
        assert cost.roofline_fraction == pytest.approx(cost.roofline_ms / cost.step_ms)


def test_parameters_of_the_whole_model(costs):
    attention, feed_forward, norm = 6 * 3 * (4 + 2 + 2 + 4), 2 * 6 * 10, 6
    layer, positions = attention + feed_forward + 2 * norm, 37 * 6
    encoder, decoder = 2 * layer + norm, 2 * layer + norm
    cross = 2 * (attention + norm)
    assert costs[0].parameters == encoder + decoder + cross + 2 * positions + 11 * 6
    assert costs[2].parameters == decoder + positions + 2 * 11 * 6


def test_steps_fill_the_cache_up_to_its_end(monkeypatch, costs):
    assert {cost.steps for cost in costs if cost.search == "greedy"} == {32}
    benches = []
    original = benchmark._Bench.cost
    monkeypatch.setattr(
        benchmark._Bench, "cost", lambda self, *args: benches.append(self) or original(self, *args)
    )
    (short,) = sweep(CONTINUE, repeats=2)
    assert short.steps == 4
    for layer in benches[0].cache:
        assert layer.length.tolist() == [5, 5, 5]
        assert np.abs(layer.key).min() > 0


def test_a_step_alone_is_one_of_as_many_calls(monkeypatch):
    times_ms = iter([7.0, 10.0, 12.0])  # prefill, the loop, as many calls

    def milliseconds(run, repeats, once_if_long=False):
        run()
        return [next(times_ms)]

    calls = []
    original = benchmark._Bench._compile

    def compiled(self, function, *args, **options):
        program = original(self, function, *args, **options)
        return lambda *args: calls.append(function.__name__) or program(*args)

    monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
    monkeypatch.setattr(benchmark._Bench, "_compile", compiled)
    (cost,) = sweep(CONTINUE)
    assert (cost.step_ms, cost.step_alone_ms) == (10 / 4, 12 / 4)
    assert calls == ["prefill", "decode", *["step"] * 4]


@pytest.mark.slow
def test_dtypes_are_those_of_the_configs_or_those_asked_for():
    local = dataclasses.replace(CONFIG, dtype="bfloat16", window=3)
    models = CONTINUE | {"local": (DecoderOnly, local)}
    by_config = sweep(models)
    assert [cost.dtype for cost in by_config] == ["float32", "bfloat16"]
    assert by_config[0].weight_bytes == 2 * by_config[1].weight_bytes
    assert by_config[1].kv_bytes == 2 * 2 * 2 * 3 * 2 * 3 * 3
    (asked,) = sweep(CONTINUE, dtypes=["bfloat16"])
    assert asked.dtype == "bfloat16"
    assert asked.weight_bytes == by_config[1].weight_bytes
    assert 2 * asked.kv_bytes == by_config[0].kv_bytes


@pytest.mark.parametrize(("expand_ms", "step_ms"), [(2.0, (10 - 2) / 4), (99.0, (10 - 5) / 4)])
def test_expanding_the_caches_is_no_part_of_a_beam_step(monkeypatch, expand_ms, step_ms):
    """Nor does noise in it, which may be more than all of a small search, make a step negative."""
    times_ms = iter([7.0, 10.0, expand_ms, 13.0])  # prefill, search, expanding, reordering

    def milliseconds(run, repeats, once_if_long=False):
        run()
        return [next(times_ms)]

    monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
    many_words = {"any": (DecoderOnly, dataclasses.replace(CONFIG, vocab_size=997))}
    (cost,) = sweep(many_words, searches=["beam"])
    assert cost.steps == 4
    assert cost.step_ms == pytest.approx(step_ms)
    assert cost.reorder_ms == pytest.approx(13 / 4)


def test_the_first_run_does_not_count_but_a_long_one_is_the_only_one():
    seconds = iter([4.0, 0.5, 0.25])
    assert timing.milliseconds(lambda: next(seconds), 2, once_if_long=True) == [500, 250]
    assert timing.milliseconds(lambda: 5.0, 3) == [5000, 5000, 5000]
    seconds = iter([5.0])
    assert timing.milliseconds(lambda: next(seconds), 2, once_if_long=True) == [5000]


def test_compiling_while_measuring_is_an_error(monkeypatch):
    def square(x):
        return x * x

    program, x = jax.jit(square), np.ones(3, np.float32)
    program(x)
    with timing.no_compilation():
        program(x)
    with pytest.raises(RuntimeError, match="compiled while measuring: .*square"):
        timing.milliseconds(lambda: program(np.ones(5, np.float32)).sum() and 0.0, 1)

    def with_length(cache, length, original=benchmark._with_length):
        jax.jit(lambda x: x + length)(np.ones(2, np.float32))
        return original(cache, length)

    monkeypatch.setattr(benchmark, "_with_length", with_length)
    with pytest.raises(RuntimeError, match="compiled while measuring"):
        sweep(CONTINUE)


def test_a_size_that_does_not_fit_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(roofline, "memory_limit", lambda: 1e6)
    rows = benchmark.sweep(TRANSLATE, batch_sizes=[3], context_lengths=[5, 1_000])
    with pytest.raises(
        ValueError, match="length 1000 needs .*encoding .* GB, but the device has 0.0 GB"
    ):
        next(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_sizes=[2, 0]), "a batch size must be from 1 to .*, not 0"),
        (dict(batch_sizes=[-3]), "a batch size must be from 1 to .*, not -3"),
        (dict(batch_sizes=[2.0]), "a batch size must be an integer, not 2.0"),
        (dict(batch_sizes=[True]), "a batch size must be an integer, not True"),
        (dict(batch_sizes=[2**31]), "a batch size must be from 1 to .*, not 2147483648"),
        (dict(batch_sizes=[2**31 - 1]), "batch 2147483647, .* GB, but the device has"),
        (
            dict(batch_sizes=[2**31 - 1], context_lengths=[2**31 - 1]),
            "GB, but the device has",
        ),
        (dict(repeats=0), "repeats must be at least 1, not 0"),
        (dict(repeats=1.5), "repeats must be an integer, not 1.5"),
        (dict(context_lengths=[5, 1]), "a context length must be from 2 to .*, not 1"),
        (dict(context_lengths=[float("nan")]), "a context length must be an integer, not nan"),
        (dict(context_lengths=[10**30]), "a context length must be from 2 to .*, not 1000"),
        (dict(context_lengths=[]), "nothing to measure"),
        (dict(searches=["sample"]), r"'sample' is not one of \['greedy', 'beam'\]"),
        (dict(dtypes=["int8"]), "'int8' is not one of float32, bfloat16, float16"),
        (dict(schemes=["int4"]), "quantize 'int4' is not one of none, int8, int8_weights, fp8"),
        (dict(cache_dtypes=["int4"]), "cache_dtype 'int4' is not one of none, float32, "),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sweep(TRANSLATE, **options)


def test_rows_of_eight_bits_count_what_is_read():
    options = dict(schemes=[None, "int8"], cache_dtypes=[None, "int8"], searches=["greedy", "beam"])
    rows = sweep(CONTINUE, **options)
    names = ["float32", "float32 int8-caches", "float32 int8", "float32 int8 int8-caches"]
    assert [row.dtype for row in rows[::2]] == names
    assert [(row.search, row.dtype) for row in rows[1::2]] == [("beam", name) for name in names]
    wide, caches, weights, both = rows[::2]
    # A scale for each output, and for each token's key and value.
    assert wide.kv_bytes == weights.kv_bytes and caches.kv_bytes == both.kv_bytes
    head_dim = CONFIG.head_dim
    assert caches.kv_bytes * 4 * head_dim == wide.kv_bytes * (head_dim + 4)
    assert weights.weight_bytes == both.weight_bytes
    assert 0.25 < weights.weight_bytes / wide.weight_bytes < 0.6
    for name in ("parameters", "flops"):
        assert len({getattr(row, name) for row in rows[::2]}) == 1, name
    # What a config asks for is what it is measured in.
    small = {"small": (DecoderOnly, dataclasses.replace(CONFIG, quantized="int8_weights"))}
    assert [row.dtype for row in sweep(small)] == ["float32 int8_weights"]
    assert sweep(small, schemes=[None])[0].dtype == "float32"


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        (Precision("bfloat16"), "bfloat16"),
        (Precision("bfloat16", "int8"), "bfloat16 int8"),
        (Precision("float32", None, "fp8"), "float32 fp8-caches"),
        (Precision("float32", "int8_weights", "int8"), "float32 int8_weights int8-caches"),
    ],
)
def test_a_precision_is_its_name(precision, name):
    assert str(precision) == name and Precision.of(name) == precision


def test_a_run_says_what_it_was_made_on():
    assert benchmark.describe().keys() - {"cache_bytes"} == {
        *("date", "device", "machine", "python", "jax", "jaxlib", "flax")
    }


def test_the_largest_caches_of_all_processors_count_once_each(tmp_path):
    caches = [
        (0, 1, "0", "48K"),
        (0, 3, "0-1", "4096K"),
        (1, 3, "0-1", "4096K"),
        (2, 3, "2", "512K"),
    ]
    for cpu, level, cores, size in caches:
        folder = tmp_path / f"cpu{cpu}/cache/index{level}"
        folder.mkdir(parents=True)
        for name, value in dict(level=level, shared_cpu_list=cores, size=size).items():
            (folder / name).write_text(f"{value}\n")
    assert benchmark._cache_bytes(tmp_path) == (4096 + 512) * 1024
    assert benchmark._cache_bytes(tmp_path / "nowhere") == 0
