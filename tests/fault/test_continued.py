"""Runs that begin with another run's optimizer, killed on the way or not."""

import signal

import jax
import numpy as np
import pytest
from final_bytes import final_bytes
from running import Running, losses, train

from mqa_jax.core.sharding import make_mesh
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.setup import set_up
from mqa_jax.train.start import find_start
from mqa_jax.train.workdir import load_config


def test_the_state_is_the_run_s_and_the_step_the_first(project):
    config = load_config(project / "run")
    config.update(init_from=str(project / "run"), init_optimizer="continued")
    begin = find_start(config)
    _, state, _, _ = set_up(begin.config, make_mesh(data=1, devices=jax.devices()[:1]))
    with Checkpoints(project / "run/checkpoints") as checkpoints:
        saved = checkpoints.read(state)
    continued = begin.continued(state)
    assert int(continued.step) == 0 and int(saved.step) == 8
    moments = False
    for found, kept, drawn in zip(
        *(jax.tree.leaves((s.params, s.opt_state)) for s in (continued, saved, state)), strict=True
    ):
        np.testing.assert_array_equal(found, kept)
        moments |= not np.array_equal(found, drawn)
    assert moments


@pytest.mark.slow
def test_a_continued_run_that_is_killed_is_the_same(project):
    """Before its first checkpoint, where it begins again as it began, and behind it.

    With a teacher, which is read again at each start.
    """
    start = ["--config.init_from=run", "--config.init_optimizer=continued"]
    start += ["--config.train.teacher=run", "--config.train.distillation=0.5"]
    start += ["--config.train.batch_size=8", "--config.train.learning_rate=0.5"]
    start += ["--config.train.warmup_steps=0", "--config.train.decay_steps=0"]
    result = train(project, "continued", *start)
    assert "begins with the weights and the optimizer of run" in result.stdout
    for step in (1, 4):
        with Running(project, "continued_killed", *start) as running:
            running.until_step(step)
            running.send(signal.SIGKILL)
            assert running.exit_codes() == [-signal.SIGKILL], running.output()
        assert "begins with the weights and the optimizer of run" in running.output()
    train(project, "continued_killed", *start)
    assert final_bytes(running.workdir) == final_bytes(project / "continued")
    assert losses(running.workdir) == losses(project / "continued")

    # With fresh moments it is another one.
    start[1] = "--config.init_optimizer=fresh"
    train(project, "fresh", *start)
    fresh, continued = (losses(project / name) for name in ("fresh", "continued"))
    assert fresh[1] == continued[1] and fresh[3] != continued[3]
