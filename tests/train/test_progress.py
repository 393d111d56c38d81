"""The best evaluation of a run, as its log has it."""

import json
import math

import pytest
from ml_collections import ConfigDict

from mqa_jax.train.progress import Best, best_steps

NAN = math.nan


@pytest.fixture
def log(tmp_path):
    """Figures by step, in the order of the log, into a working directory."""

    def write(name, *figures, skipped=()):
        records = [dict(kind="validation", step=step, **{name: x}) for step, x in figures]
        records += [dict(kind="skipped", step=step) for step in skipped]
        records += [dict(kind="train", step=7, loss=-9.0), dict(kind="validation", step=8, other=1)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "metrics.jsonl").write_text(lines)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("name", "figures", "expected"),
    [
        ("loss", [], ((), 0)),
        ("loss", [(2, 5.0), (4, 3.0), (6, 4.0), (8, 3.5)], ((4,), 2)),
        ("accuracy", [(2, 0.1), (4, 0.3), (6, 0.2)], ((4,), 1)),
        ("bleu", [(2, 7.0), (4, 9.0)], ((4,), 0)),
        # Of equal ones the first; none that is no number, in any place.
        ("loss", [(2, 3.0), (4, 3.0), (6, 3.0)], ((2,), 2)),
        ("loss", [(2, NAN), (4, 3.0), (6, NAN), (8, -math.inf)], ((4,), 2)),
        ("bleu", [(2, 4.0), (4, math.inf), (6, NAN)], ((2,), 2)),
        ("loss", [(2, NAN), (4, NAN)], ((), 2)),
        # What is done twice counts once, as it was the second time.
        ("loss", [(2, 3.0), (4, 1.0), (4, 5.0), (6, 4.0)], ((2,), 2)),
    ],
)
def test_the_best_and_how_many_came_since(log, name, figures, expected):
    assert best_steps(log(name, *figures), name) == expected


def test_what_is_not_done_yet_does_not_count(log):
    workdir = log("loss", (2, 5.0), (4, 6.0), (6, 1.0))
    assert best_steps(workdir, "loss", 4) == ((2,), 1)
    assert best_steps(workdir, "loss", 1) == ((), 0)


def test_weights_of_skipped_steps_are_saved_as_those_of_the_step_before(log):
    workdir = log("loss", (2, 5.0), (6, 4.0), (8, 4.5), skipped=[1, 5, 6, 8])
    assert best_steps(workdir, "loss") == ((6, 5, 4), 1)


@pytest.mark.parametrize(("patience", "is_over"), [(0, False), (1, True), (2, True), (3, False)])
def test_patience(log, patience, is_over):
    workdir = log("loss", (2, 5.0), (4, 6.0), (6, 5.5))
    best = Best(workdir, ConfigDict(dict(train=dict(best="loss", patience=patience))))
    assert best.look(6) == is_over and best.steps == (2,)
    # The way on, for who has raised the number of steps.
    assert f"step 2, and --config.train.patience={patience} ends a run" in str(best)
    off = Best(workdir, ConfigDict(dict(train=dict(best="", patience=0))))
    assert not off.look(6) and off.steps == ()
