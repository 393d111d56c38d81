"""Kills at random moments, until the run is done: it ends with the bytes of one never disturbed.

MQA_JAX_KILLS is how many (4), MQA_JAX_SEED what they are drawn from (0).
"""

import os
import random
import signal
import time

import pytest
from final_bytes import final_bytes
from running import Running, checkpoints, losses, train

KILLS = int(os.environ.get("MQA_JAX_KILLS", 4))
SEED = int(os.environ.get("MQA_JAX_SEED", 0))
# A step with its share of a checkpoint takes a sixth of a second on two cores; at most a second of
# them is done between two kills.
OPTIONS = [
    f"--config.train.steps={20 * KILLS}",
    "--config.train.checkpoint_every=2",
    f"--config.train.evaluate_every={20 * KILLS}",
]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(project):
    rng = random.Random(SEED)
    train(project, "undisturbed", *OPTIONS)
    done, progress = 0, []
    for kill in range(KILLS):
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        with Running(project, "disturbed", *OPTIONS) as running:
            # Now and then before the first step, mostly behind it: in a step, in a save, between.
            if kill % 5:
                running.until_step(done + 2)
            time.sleep(rng.uniform(0, 1 if kill % 5 else 6))
            assert running.processes[0].poll() is None, running.output()
            running.send(number)
            (code,) = running.exit_codes()
        # Before the loop, SIGTERM has nothing to save.
        assert code in {-number, 75 if number == signal.SIGTERM else -number}, running.output()
        assert "damaged" not in running.output()
        kept = checkpoints(running.workdir)
        if code == 75:
            assert kept[-1] == max(losses(running.workdir))
        done = max(losses(running.workdir), default=0)
        progress.append(kept[-1] if kept else 0)
    assert progress == sorted(progress) and len(set(progress)) > KILLS // 3, progress
    train(project, "disturbed", *OPTIONS)
    assert final_bytes(running.workdir) == final_bytes(project / "undisturbed")
    assert losses(running.workdir) == losses(project / "undisturbed")
