"""Processes that train as one, and what becomes of one when another dies or hangs."""

import signal

import pytest
from running import WITH_BLEU, Running, checkpoints, losses, records

MESHES = {
    "rows_apart": ["--config.mesh.data=2", "--config.mesh.fsdp=2"],
    # Both of two processes hold parts of the same rows.
    "rows_together": ["--config.mesh.data=1", "--config.mesh.tensor=4"],
}

# As a process begins to decode the lines of an evaluation.
IN_DECODING = """
import os, signal, mqa_jax.train.evaluate as evaluate
class LineDecoder(evaluate.LineDecoder):
    def texts(self, params, lines):
        print(f"decodes {len(lines)} lines", flush=True)
        %s
        return super().texts(params, lines)
evaluate.LineDecoder = LineDecoder
"""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_processes_train_as_one(project, mesh):
    """As one device does, to rounding, as sums are made in another order; on the same batches."""
    options = [*MESHES[mesh], WITH_BLEU]
    with Running(
        project, mesh, *options, processes=2, devices=2, setup=IN_DECODING % "pass"
    ) as running:
        assert running.exit_codes() == [0, 0], running.output()
    # Each of them its share.
    assert [running.output().count(f"decodes {lines} lines") for lines in (3, 2)] == [1, 1]
    for kind in ("train", "validation"):
        ours, theirs = records(running.workdir, kind), records(project / "run", kind)
        assert len(ours) == len(theirs) == (8 if kind == "train" else 1)
        for our, their in zip(ours, theirs, strict=True):
            for figures in (our, their):
                for name in ("kind", "time", "tokens_per_second", "tflop_per_second"):
                    figures.pop(name, None)
            assert our == pytest.approx(their, rel=1e-5)
    # One log, by the first process, and what both wrote is one checkpoint for any number of them.
    assert len(list(running.workdir.glob("events.*"))) == 1
    assert running.output().count("step 0 to 8") == 1


@pytest.mark.slow
def test_when_one_process_is_gone_the_other_ends_and_both_resume(project):
    """A process that is stopped still holds its connections open: only the heartbeat tells."""
    # Long enough that they cannot finish.
    options = ["--config.mesh.fsdp=2", "--peer_timeout=10", "--config.train.steps=100000"]
    for number, victim in ((signal.SIGKILL, 0), (signal.SIGSTOP, 1)):
        last = max(checkpoints(project / "gone"), default=0)
        done = max(losses(project / "gone"), default=0)
        with Running(project, "gone", *options, processes=2) as running:
            # By then the first checkpoint is complete, as the second is begun.
            running.until_step(done + 7)
            running.processes[victim].send_signal(number)
            assert running.processes[1 - victim].wait(timeout=120) not in (0, 75), running.output()
        assert f"step {last:,} to 100,000" in running.output()
    assert last >= 3
    # What was done twice was the same twice.
    seen = {}
    for record in records(running.workdir):
        assert seen.setdefault(record["step"], record["loss"]) == record["loss"]
    assert sorted(seen) == list(range(1, len(seen) + 1))


@pytest.mark.slow
def test_a_process_that_dies_as_it_decodes_leaves_none_waiting(project):
    kill = "os.environ['JAX_PROCESS_ID'] == '1' and os.kill(os.getpid(), signal.SIGKILL)"
    options = ["--config.mesh.fsdp=2", "--peer_timeout=10", WITH_BLEU]
    with Running(project, "alone", *options, processes=2, setup=IN_DECODING % kill) as running:
        assert running.processes[1].wait(timeout=600) == -signal.SIGKILL, running.output()
        assert running.processes[0].wait(timeout=120) not in (0, 75), running.output()
    assert records(running.workdir, "validation") == []
    # The evaluation is made up for.
    with Running(project, "alone", *options, processes=2) as running:
        assert running.exit_codes() == [0, 0], running.output()
    (ours,), (theirs,) = (records(project / run, "validation") for run in ("alone", "run"))
    for name in ("bleu", "chrf", "exact_match"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
