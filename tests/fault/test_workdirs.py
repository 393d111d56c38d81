"""One working directory, many ways to start a run in it: by mistake, twice, on other devices."""

import json
import os
import shutil
import signal

import pytest
from running import (
    ROOT,
    Running,
    checkpoints,
    losses,
    prepared,
    run,
    run_well,
    train,
    train_args,
    write_text,
)

from configs import quickstart
from mqa_jax.core.lock import locked
from mqa_jax.train import loop

# A batch comes when the file "go" is there, but for the first ones.
GATE = """
import os, time, mqa_jax.data.loader as loader
all_batches = loader.train_batches
def train_batches(*args, start, **kwargs):
    for i, batch in enumerate(all_batches(*args, start=start, **kwargs), start=start):
        while i >= %d and not os.path.exists("go"):
            time.sleep(0.01)
        yield batch
loader.train_batches = train_batches
"""


@pytest.fixture
def gate(tmp_path):
    """Where the first batch is that waits -> a setup; touching `go` lets it through."""
    return lambda first: GATE.replace('"go"', repr(f"{tmp_path}/go")) % first


def refused(directory, workdir, *overrides, reason, devices=1):
    result = run(*train_args(directory, workdir, *overrides), cwd=directory, devices=devices)
    assert result.returncode not in (0, 75) and reason in result.stderr, result.stderr[-3000:]
    return result


@pytest.mark.slow
def test_a_start_that_fails_may_be_tried_again_in_another_way(project):
    """Before there is data, and in the first step: each with another config than the last."""
    other = ["--config.data.vocab_size=3000", "--config.model.vocab_size=3000"]
    refused(project, "tried", *other, reason="--config.data.vocab_size")
    # Out of memory, say.
    setup = "import mqa_jax.train.loop as loop; loop.put_batch = lambda *_: 1 / 0"
    with Running(project, "tried", "--config.model.d_ff=48", setup=setup) as running:
        assert running.exit_codes() == [1] and "ZeroDivisionError" in running.output()
    assert not (project / "tried/config.json").exists()
    train(project, "tried")
    assert losses(project / "tried") == losses(project / "run")


@pytest.mark.slow
def test_what_decides_nothing_may_change_on_the_way(project, tmp_path, gate):
    """Logs, checkpoints, evaluation, mesh, and where the same data lies. Meanwhile it is locked."""
    workdir = project / "changed"
    with Running(project, "changed", setup=gate(4)) as stopped:
        stopped.until_step(3)
        holder = f"in use by process {stopped.processes[0].pid} on host .*, which is training"
        with pytest.raises(ValueError, match=holder), locked(workdir, "training"):
            pass
        stopped.send(signal.SIGTERM)
        (tmp_path / "go").touch()
        assert stopped.exit_codes() == [75], stopped.output()
    shutil.copytree(prepared(project), project / "moved data")
    options = ["--config.train.log_every=1", "--config.train.keep_checkpoints=1"]
    options += ["--config.evaluate.lines=2", "--config.data.dir=moved data"]
    options += ["--config.train.evaluate_every=4", "--config.train.max_skipped_steps=3"]
    options += ["--config.evaluate.batch_size=2", "--config.train.checkpoint_every=5"]
    result = train(project, "changed", *options)
    assert "config.evaluate.lines: 0 there, 2 asked" in result.stdout
    assert losses(workdir) == losses(project / "run") and checkpoints(workdir) == [8]
    assert json.loads((workdir / "config.json").read_text())["data"]["dir"] == "moved data"


def test_a_second_run_in_a_workdir_is_refused(project):
    with locked(project / "locked", "training"):
        refused(project, "locked", reason=f"in use by process {os.getpid()} on host")
    assert os.listdir(project / "locked") == [".lock"]


@pytest.mark.slow
def test_a_run_keeps_to_the_data_it_began_with(tmp_path, gate):
    """Its directory is replaced under it, and it neither trains nor validates on the other's."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name)
    lines = (tmp_path / "other/val.en").read_text().splitlines()
    (tmp_path / "other/val.en").write_text("\n".join(lines[::-1]) + "\n")
    other = [f"--config.data.path={tmp_path}/other", f"--config.data.dir={tmp_path}/new"]
    prepare = ["-m", "mqa_jax.data.prepare", *train_args(tmp_path, "")[1:-2]]
    run_well(*prepare, *other, cwd=tmp_path)
    data = [f"--config.data.dir={tmp_path}/data", "--config.train.evaluate_every=2"]
    with Running(tmp_path / "one", "run", *data, setup=gate(1)) as running:
        running.until(lambda: (running.workdir / "config.json").exists())
        (tmp_path / "data").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "data")
        (tmp_path / "go").touch()
        assert running.exit_codes() not in ([0], [75])
    reason = running.output().splitlines()[-1]
    assert f"{tmp_path}/data holds other data than this run began with" in reason
    again = [*data, f"--config.data.path={tmp_path}/other"]
    result = refused(tmp_path / "one", "run", *again, reason="holds a run on other data")
    assert "data.manifest.request.files" in result.stderr
    # Back again, the run goes on.
    (tmp_path / "data").rename(tmp_path / "new")
    (tmp_path / "old").rename(tmp_path / "data")
    train(tmp_path / "one", "run", *data)


REPLACED = """
import dataclasses, mqa_jax.train.loop as loop
set_up = loop.set_up
def set_up_meanwhile(config, *args, **kwargs):
    manifest = loop.Manifest.read(config.data.dir)
    request = manifest.request | {"on_invalid": "drop"}
    dataclasses.replace(manifest, request=request).write(config.data.dir)
    return set_up(config, *args, **kwargs)
loop.set_up = set_up_meanwhile
"""


@pytest.mark.slow
def test_data_that_is_replaced_while_the_model_is_built_is_not_trained_on(project, tmp_path):
    shutil.copytree(prepared(project), tmp_path / "data")
    data = f"--config.data.dir={tmp_path}/data"
    with Running(project, "replaced", data, setup=REPLACED) as running:
        assert running.exit_codes() not in ([0], [75])
    reason = running.output().splitlines()[-1]
    assert f"{tmp_path}/data holds other data than this run began with" in reason
    assert losses(running.workdir) == {} and not (running.workdir / "config.json").exists()


@pytest.mark.slow
def test_trained_on_two_gone_on_with_on_eight_decoded_on_one(project, tmp_path, gate):
    """The same batches and parameters, and sums to rounding."""
    with Running(project, "meshes", "--config.mesh.fsdp=2", devices=2, setup=gate(5)) as stopped:
        stopped.until(lambda: checkpoints(stopped.workdir))
        stopped.send(signal.SIGTERM)
        (tmp_path / "go").touch()
        assert stopped.exit_codes() == [75], stopped.output()
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    run_well(*train_args(project, "meshes", *mesh), cwd=project, devices=8)
    assert losses(project / "meshes") == pytest.approx(losses(project / "run"), rel=1e-5)
    decode = [ROOT / "decode.py", "--workdir=meshes", "--input=val.en", "--max_new_tokens=9"]
    outputs = [run_well(*decode, cwd=project, devices=devices).stdout for devices in (1, 8)]
    assert outputs[0].count("\n") == 7 and outputs[0] == outputs[1]


@pytest.mark.slow
def test_any_folder_will_do(tmp_path):
    """Brackets, which are patterns, blanks, and what is no ASCII, in a parent's name too."""
    project = tmp_path / "my [new] project* {ü} 100%"
    project.mkdir()
    write_text(project)
    train(project, "run [1]/", "--config.train.evaluate_every=99")
    kept = sorted((project / "run [1]/checkpoints").iterdir())
    assert [path.name for path in kept] == ["6", "8"]
    result = run_well(ROOT / "decode.py", "--workdir=./run [1]", "--input=val.en", cwd=project)
    assert result.stdout.count("\n") == 7


def test_decoding_with_other_files_than_was_trained_with_is_refused(project, tmp_path):
    shutil.copytree(project / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["model"]["window"] = 3
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with (tmp_path / "run/tokenizer.model").open("ab") as file:
        file.write(b"\n")
    args = [ROOT / "decode.py", "--workdir=run", f"--input={project}/val.en"]
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    for reason in ("config.model.window: None there, 3 asked", "data.tokenizer_sha256: '"):
        assert reason in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("error", ["a damaged record", "an evaluation"])
def test_an_error_keeps_the_checkpoint_under_way_and_is_the_last_word(project, error):
    where = {
        "a damaged record": """
import mqa_jax.data.loader as loader
all_batches = loader.train_batches
def train_batches(*args, start, **kwargs):
    for i, batch in enumerate(all_batches(*args, start=start, **kwargs), start=start):
        if i == 3:
            raise ValueError("the reason")
        yield batch
loader.train_batches = train_batches
""",
        "an evaluation": """
import mqa_jax.train.loop as loop
def evaluate(*args):
    raise ValueError("the reason")
loop.make_evaluate = lambda *args: evaluate
""",
    }[error]
    # A save takes its time.
    slow = """
import time, mqa_jax.train.checkpoint as checkpoint
hashes = checkpoint._hashes
checkpoint._hashes = lambda folder: time.sleep(3) or hashes(folder)
"""
    workdir = error.split()[-1]
    with Running(project, workdir, "--config.train.evaluate_every=3", setup=where + slow) as failed:
        assert failed.exit_codes() not in ([0], [75])
    assert checkpoints(failed.workdir) == [3]
    assert "the reason" in failed.output().splitlines()[-1], failed.output()[-2000:]
    assert "interpreter shutdown" not in failed.output()


def test_a_run_does_not_go_on_from_a_checkpoint_of_another(project):
    """Though its own config.json says the same as the command line."""
    shutil.copytree(project / "run", project / "mixed")
    config = json.loads((project / "mixed/config.json").read_text())
    config["train"]["seed"] = 5
    (project / "mixed/config.json").write_text(json.dumps(config))
    result = refused(
        project, "mixed", "--config.train.seed=5", reason="config.train.seed: 0 there, 5 asked"
    )
    assert "not what the checkpoint was trained with" in result.stderr


def test_a_workdir_that_cannot_be_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = quickstart.get_config()
    with pytest.raises(ValueError, match="--workdir 'gs://bucket/run' is an address"):
        loop.train(config, "gs://bucket/run")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        loop.train(config, "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    with pytest.raises(ValueError, match="run/checkpoints is a file"):
        loop.train(config, "run")
    assert sorted(os.listdir(tmp_path)) == ["file", "run"]
