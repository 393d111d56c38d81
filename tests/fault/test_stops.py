"""Runs that are stopped: by a signal, by a full disk, by losses that are no numbers."""

import json
import signal
import time

import pytest
from running import (
    WITH_BLEU,
    Running,
    behind,
    checkpoints,
    losses,
    records,
    run,
    train,
    train_args,
)

# Time for a signal to arrive between two steps.
SLOWLY = """
import time, mqa_jax.data.loader as loader
all_batches = loader.train_batches
def train_batches(*args, **kwargs):
    for i, batch in enumerate(all_batches(*args, **kwargs)):
        time.sleep(0.3)
        yield batch
loader.train_batches = train_batches
"""

# Ids outside the vocabulary embed as NaN.
BAD_BATCHES = """
import mqa_jax.data.loader as loader
all_batches = loader.train_batches
def train_batches(*args, start, **kwargs):
    for i, batch in enumerate(all_batches(*args, start=start, **kwargs), start=start):
        yield batch | {"target_tokens": batch["target_tokens"] + 9999 * (i in %s)}
loader.train_batches = train_batches
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)], ids=["one", "two"]
)
def test_a_signal_leaves_a_checkpoint_of_the_last_step(project, number, processes):
    """To one process, and all of them stop behind the same step."""
    workdir = f"{number.name}_{processes}"
    with Running(project, workdir, processes=processes, setup=SLOWLY) as stopped:
        stopped.until_step(4)
        stopped.send(number)
        assert stopped.exit_codes() == [75] * processes, stopped.output()
    assert processes > 1 or f"{number.name}: stopping behind this step" in stopped.output()
    (last,) = checkpoints(stopped.workdir)[-1:]
    assert 4 <= last < 8 and last == max(losses(stopped.workdir))
    assert f"the checkpoint of step {last} is saved" in stopped.output()
    result = train(project, workdir)
    assert f"step {last} to 8" in result.stdout
    # Two processes may add in another order than one.
    assert losses(stopped.workdir) == pytest.approx(
        losses(project / "run"), rel=0 if processes == 1 else 1e-5, abs=0
    )


@pytest.mark.slow
def test_a_second_interrupt_kills_at_once(project):
    """As when the step, or the checkpoint, takes longer than one would wait."""
    with Running(project, "twice", setup=SLOWLY.replace("0.3", "i > 0 and 3600")) as killed:
        killed.until_step(1)
        for _ in range(100):
            killed.send(signal.SIGINT)
            time.sleep(0.1)
            if killed.processes[0].poll() is not None:
                break
        assert killed.processes[0].poll() == -signal.SIGINT, killed.output()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_nothing_claims_to_be_saved(project):
    limit = 16_384  # bytes a file: enough for all but a checkpoint's arrays
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    failed = run("-c", behind(full), *train_args(project, "full"), cwd=project)
    assert failed.returncode == 1
    # Behind all that Orbax has to say of what it dropped.
    reason = failed.stderr.splitlines()[-1]
    assert "checkpoint.SaveError: checkpoint 3 could not be written" in reason
    assert "File too large" in reason and "The newest one there is of step None" in reason
    assert checkpoints(project / "full") == []
    train(project, "full")
    assert losses(project / "full") == losses(project / "run")


@pytest.mark.slow
def test_a_skipped_step_is_logged_and_the_run_goes_on(project):
    with Running(project, "skipped", setup=BAD_BATCHES % {1, 2, 4}) as skipped:
        assert skipped.exit_codes() == [0], skipped.output()
    seen = [
        (record["step"], record["batch"], record["in_a_row"])
        for record in records(skipped.workdir, "skipped")
    ]
    assert seen == [(2, 1, 1), (3, 2, 2), (5, 4, 1)]
    causes = [record["cause"] for record in records(skipped.workdir, "skipped")]
    for cause in causes:
        assert "target_tokens of rows 0 (" in cause and "have ids outside of 288" in cause
        assert "the loss of rows 0 (sentence 1), 1 (sentence 1)" in cause
        assert "the gradients of decoder/" in cause and " more" in cause
        assert cause in skipped.output()
    assert sorted(losses(skipped.workdir)) == [1, 4, 6, 7, 8]
    assert [record["skipped"] for record in records(skipped.workdir)] == [0, 1, 1, 0, 1, 0, 0, 0]
    # The rate follows the step, as if none had been skipped.
    rates, expected = (
        [record["learning_rate"] for record in records(workdir)]
        for workdir in (skipped.workdir, project / "run")
    )
    assert rates == expected and len({*rates}) > 1
    # Not of step 3, which was skipped.
    assert checkpoints(skipped.workdir) == [6, 8]


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_end_the_run_before_them(project):
    """At once, though metrics are fetched late; with good batches it then goes on as ever."""
    options = ["--config.train.max_skipped_steps=3", "--config.train.log_every=8"]
    for _ in range(2):
        with Running(project, "bad", *options, setup=BAD_BATCHES % set(range(4, 8))) as bad:
            assert bad.exit_codes() == [1]
        assert "3 steps in a row, 5 to 7, was not finite; of the last: target_" in bad.output()
        assert checkpoints(bad.workdir) == [3, 4]
    train(project, "bad", *options)
    (ours,), (theirs,) = (records(project / name, "validation") for name in ("bad", "run"))
    assert ours["loss"] == theirs["loss"]


@pytest.mark.slow
def test_a_run_whose_steps_are_all_skipped_does_not_end_well(project):
    """Though there are fewer of them than may be skipped in a row."""
    with Running(project, "nothing", setup=BAD_BATCHES % set(range(8))) as nothing:
        assert nothing.exit_codes() == [1]
    assert "8 steps in a row, 1 to 8, was not finite" in nothing.output()
    assert checkpoints(nothing.workdir) == [0]


# The evaluation at a step's end meets a kill, or ids that are no vector's.
IN_EVALUATION = """
import os, signal, mqa_jax.data.loader as loader
all_batches = loader.eval_batches
def eval_batches(*args, **kwargs):
    for batch in all_batches(*args, **kwargs):
        %s
        yield batch
loader.eval_batches = eval_batches
"""


@pytest.mark.slow
def test_an_evaluation_that_was_killed_is_made_up_for(project):
    """Of the last step too, whose checkpoint says that the run is done; and not twice."""
    kill = IN_EVALUATION % "os.kill(os.getpid(), signal.SIGKILL)"
    options = ["--config.train.evaluate_every=3", WITH_BLEU]
    with Running(project, "unevaluated", *options, setup=kill) as killed:
        assert killed.exit_codes() == [-signal.SIGKILL], killed.output()
    # The save of step 3 went on meanwhile; if it was not done, the step is done again.
    train(project, "unevaluated", *options)
    assert [r["step"] for r in records(killed.workdir, "validation")] == [3, 6, 8]
    metrics = killed.workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    (last,) = (line for line in lines if '"validation", "step": 8,' in line)
    metrics.write_text("".join(line for line in lines if line != last))
    for _ in range(2):
        train(project, "unevaluated", *options)
    made_up, before = records(killed.workdir, "validation")[-1], json.loads(last)
    assert [r["step"] for r in records(killed.workdir, "validation")] == [3, 6, 8]
    assert {**made_up, "time": 0} == {**before, "time": 0}


@pytest.mark.slow
def test_a_run_whose_validation_is_not_finite_does_not_end_well(project):
    bad = IN_EVALUATION % "batch = batch | {'target_tokens': batch['target_tokens'] + 9999}"
    for _ in range(2):  # The second time, all steps are done.
        with Running(project, "invalid", "--config.train.steps=2", setup=bad) as invalid:
            assert invalid.exit_codes() == [1]
        assert "the validation loss of the last step, 2, is nan" in invalid.output()
        assert "the first of rows 0 to 3" in invalid.output()


# XLA compiles for an hour, holding the main thread and no lock of Python's.
COMPILING = """
import ctypes, threading, jax
def device_get(x):
    print("compiling", flush=True)
    ctypes.CDLL(None).sleep(3600)
import mqa_jax.train.meter as meter
meter.jax.device_get = device_get
"""


def test_an_interrupt_gets_a_word_at_once_though_xla_compiles(project):
    """Python's own handlers would run when the compiler returns; a second one kills, then too."""
    with Running(project, "compiling", setup=COMPILING) as running:
        running.until(lambda: "compiling" in running.output())
        running.send(signal.SIGINT)
        running.until(lambda: "SIGINT: stopping behind this step" in running.output())
        running.send(signal.SIGINT)
        assert running.exit_codes() == [-signal.SIGINT], running.output()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("--config.train.batch_size=6", "config.train.batch_size 6 cannot be split over the 4"),
        ("--config.evaluate.batch_size=2", "config.evaluate.batch_size 2 cannot be split"),
        (
            "--config.train.max_skipped_steps=0",
            "--config.train.max_skipped_steps must be at least 1, not 0",
        ),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused_at_once(project, override, reason):
    args = train_args(project, "refused", override)
    result = run(*args, cwd=project, devices=4)
    assert result.returncode == 2 and reason in result.stderr
    assert not (project / "refused").exists()
