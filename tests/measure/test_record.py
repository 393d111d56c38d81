"""The record of a run, saved and loaded."""

import dataclasses
import gc
import json
import os
import signal

import pytest
from costs import ABOUT, COST, cost, run
from running import ROOT

from mqa_jax.measure.cost import FIELDS, Cost
from mqa_jax.measure.record import Run, load, record, save


def test_every_field_is_documented():
    assert list(FIELDS) == [field.name for field in dataclasses.fields(Cost)]
    assert FIELDS["step_ms"] == "one step inside the on-device loop, median of the runs."
    assert FIELDS["reorder_ms"].endswith("median of the runs, measured alone.")  # a third line


def test_json_comes_back_as_it_was(tmp_path):
    rows = [cost(), cost("multi_query", search="beam", encode_ms=None, reorder_ms=0.25)]
    saved = run(*rows, probe_behind={"float32": dict(gb_per_s=29.0, gflop_per_s=170.0)})
    save(saved, tmp_path / "benchmark.json")
    assert load(tmp_path / "benchmark.json") == saved
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["fields"] == FIELDS and content["machine"] == "a laptop, 2 cores"
    assert content["costs"][0].keys() == FIELDS.keys()


def test_json_of_another_version_is_refused(tmp_path):
    path = tmp_path / "benchmark.json"
    row = dataclasses.asdict(COST)
    del row["steps"]
    path.write_text(json.dumps({**ABOUT, "costs": [row | {"speed": 1}]}))
    with pytest.raises(ValueError, match="json is of another version, its rows differ in speed, s"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-100], "is not whole, or no JSON"),
        (lambda text: "", "is not whole, or no JSON"),
        (lambda text: "[1]", "is no record of the benchmark"),
        (lambda text: '{"costs": [7]}', "is no record of the benchmark"),
        (lambda text: text.replace('"is_complete"', '"done"'), "without is_complete"),
        (lambda text: text.replace('"gb_per_s": 29', '"speed": 29'), "float32 has gflop.*, speed"),
    ],
)
def test_a_file_that_is_no_record_is_named(change, message, tmp_path):
    path = tmp_path / "benchmark.json"
    save(run(cost(), probe_behind={"float32": dict(gb_per_s=29.0, gflop_per_s=170.0)}), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        load(path)


def test_files_that_are_kept_still_load():
    """Those of 0.1 have no limits behind the run."""
    for name in ("benchmark", "h200_batch_1024", "h200_context_8192", "multi_query_local"):
        kept = load(ROOT / f"docs/{name}.json")
        assert kept.costs and kept.about["model"] in ("wmt14", "lm1b")
        assert kept.fraction_behind(kept.costs[0]) is None


def test_limits_are_measured_again_behind_the_rows(tmp_path):
    path, probed = tmp_path / "benchmark.json", []

    def probe(dtype):
        assert len(load(path).costs) == 3  # all of them are there
        probed.append(dtype)
        return dict(gb_per_s=60.0, gflop_per_s=80.0)

    rows = [cost(), cost(dtype="bfloat16"), cost(batch=1)]
    measured = record(rows, ABOUT, path, probe=probe)
    assert probed == ["float32", "bfloat16"] and load(path) == measured
    # 600 MB at 60 GB/s are 10 ms; 2 GFLOP at 80 GFLOP/s are 25 ms, of 40.
    assert measured.fraction_behind(rows[0]) == pytest.approx(25 / 40)
    assert run(cost()).fraction_behind(rows[0]) is None


def test_each_row_is_saved_at_once_and_an_interrupt_keeps_them(tmp_path, capsys):
    path, rows = tmp_path / "benchmark.json", [cost(batch=2), cost(batch=3)]

    def measure(is_interrupted):
        yield rows[0]
        assert load(path) == Run(ABOUT, rows[:1], is_complete=False)
        yield rows[1]
        if is_interrupted:
            raise KeyboardInterrupt

    assert record(measure(False), ABOUT, path) == run(*rows) == load(path)
    kept = record(measure(True), ABOUT, path)
    assert kept == load(path) == Run(ABOUT, rows, is_complete=False)
    assert "interrupted: 2 rows are kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_ends_it_though_what_it_raises_is_swallowed(tmp_path):
    """As in the callback that JAX has the garbage collector call."""
    rows = [cost(batch=2), cost(batch=3)]

    def interrupted(phase, _):
        if phase == "start":
            os.kill(os.getpid(), signal.SIGINT)

    def measure():
        yield rows[0]
        gc.callbacks.append(interrupted)
        gc.collect()
        gc.callbacks.remove(interrupted)
        yield rows[1]
        raise AssertionError("it goes on")

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        kept = record(measure(), ABOUT, tmp_path / "benchmark.json")
    finally:
        handler = signal.signal(signal.SIGINT, previous)
    assert kept == Run(ABOUT, rows, is_complete=False)
    assert handler is signal.default_int_handler
