"""Runs that keep their best checkpoint, and end when nothing gets better, killed or not."""

import signal

import pytest
from final_bytes import final_bytes
from running import Running, checkpoints, losses, records, train
from test_stops import BAD_BATCHES, IN_EVALUATION

# At a rate of 0 the first evaluation is the best, and no other is better.
LEVEL = [
    "--config.train.learning_rate=0",
    "--config.train.steps=100",
    "--config.train.evaluate_every=3",
    "--config.train.keep_checkpoints=1",
    "--config.train.best=loss",
    "--config.train.patience=2",
]
# As soon as a step is being saved, or is saved.
KILL = (
    "__import__('glob').glob('patient_killed/checkpoints/STEP*')"
    " and os.kill(os.getpid(), signal.SIGKILL)"
)


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_the_same_killed_or_not(project):
    result = train(project, "patient", *LEVEL)
    assert "ends at step 9: the best loss is that of step 3" in result.stdout
    assert checkpoints(project / "patient") == [3, 9]
    with Running(project, "patient_killed", *LEVEL) as running:
        running.until_step(5)
        running.send(signal.SIGKILL)
        assert running.exit_codes() == [-signal.SIGKILL], running.output()
    # Between a save and the figures.
    for step in (6, 9):
        kill = IN_EVALUATION % KILL.replace("STEP", str(step))
        with Running(project, "patient_killed", *LEVEL, setup=kill) as running:
            assert running.exit_codes() == [-signal.SIGKILL], running.output()
    train(project, "patient_killed", *LEVEL)
    assert final_bytes(running.workdir) == final_bytes(project / "patient")
    assert losses(running.workdir) == losses(project / "patient")
    assert checkpoints(running.workdir) == [3, 9]
    assert {r["step"] for r in records(running.workdir, "validation")} == {3, 6, 9}

    before = (project / "patient/metrics.jsonl").read_text()
    again = train(project, "patient", *LEVEL)
    assert "nothing is left to train" in again.stdout and "of step 3" in again.stdout
    assert (project / "patient/metrics.jsonl").read_text() == before
    # Both fields are free: with more patience it goes on.
    more = train(project, "patient", *LEVEL, "--config.train.patience=4")
    assert "config.train.patience: 2 there, 4 asked" in more.stdout
    assert checkpoints(project / "patient") == [3, 15]


@pytest.mark.slow
def test_a_run_that_ends_behind_a_skipped_step_has_nothing_left(project):
    with Running(project, "skipping", *LEVEL, setup=BAD_BATCHES % {7, 8}) as running:
        assert running.exit_codes() == [0], running.output()
    assert "ends at step 9" in running.output() and checkpoints(running.workdir) == [3, 9]
    assert "nothing is left to train" in train(project, "skipping", *LEVEL).stdout
