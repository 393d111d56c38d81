"""Runs of more steps than were planned at first, killed on the way or not."""

import shutil
import signal

import pytest
from final_bytes import final_bytes
from running import Running, losses, records, run, train, train_args

DECAY = "--config.train.decay_steps=4"
LONGER = "--config.train.steps=16"


@pytest.mark.slow
def test_a_run_that_is_extended_is_the_same_killed_or_not(project):
    train(project, "longer", DECAY)
    shutil.copytree(project / "longer", project / "longer_killed")
    result = train(project, "longer", DECAY, LONGER)
    change = "config.train.steps: 8 there, 16 asked; the learning rate now falls over steps 12 to"
    assert f"changed since the last start: {change}" in result.stdout
    # Before and behind the first checkpoint of the new steps.
    for step in (9, 13):
        with Running(project, "longer_killed", DECAY, LONGER) as running:
            running.until_step(step)
            running.send(signal.SIGKILL)
            assert running.exit_codes() == [-signal.SIGKILL], running.output()
    train(project, "longer_killed", DECAY, LONGER)
    assert final_bytes(running.workdir) == final_bytes(project / "longer")
    assert losses(running.workdir) == losses(project / "longer")
    assert sorted(losses(running.workdir)) == list(range(1, 17))
    rates = {r["step"]: r["learning_rate"] for r in records(running.workdir)}
    # A warm-up of 400 steps all along.
    assert rates[8] < rates[5] < rates[9] < rates[12] and rates[16] < rates[12] / 2

    # No fewer than are done; as many as are done are all.
    args = train_args(project, "longer", DECAY, "--config.train.steps=15")
    result = run(*args, cwd=project)
    assert result.returncode == 2
    assert "--config.train.steps 15 is less than the 16 of the newest" in result.stderr
    assert "nothing is left to train" in train(project, "longer", DECAY, LONGER).stdout
