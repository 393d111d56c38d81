"""`export` as a user types it: a run's model for others, whole or not at all."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import write, write_words
from flax import nnx

from mqa_jax import hub
from mqa_jax.cli import main
from mqa_jax.train.npz import save_npz
from mqa_jax.train.workdir import Run, load_run

GUIDE = Path(__file__).parents[2] / "docs/guides/training.md"

# The flag of a config reads its file in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def same(one, other):
    for x, y in zip(*(jax.tree.leaves(nnx.as_pure(z)) for z in (one, other)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def export(*flags):
    return main(["export", *map(str, flags)])


def test_a_file_is_read_back_as_the_guide_says(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert export(f"--workdir={project}/run", "--output=new/model.npz", "--step=6") == 0
    assert "new/model.npz is written" in capfd.readouterr().out
    (tmp_path / "new/model.npz").rename("model.npz")
    (block,) = re.findall(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    found = {}
    exec(block, found)
    run = load_run(project / "run", step=6)
    same(nnx.state(found["model"]), run.params)
    assert found["config"] == {"task": "translation", "model": run.config.model.to_dict()}
    names = set(np.load("model.npz").files)
    assert {"config", "embedding.table", "decoder.layers.0.attention.query"} <= names
    assert [path.name for path in tmp_path.glob("**/*") if path.is_file()] == ["model.npz"]


def test_bfloat16_becomes_float32(project, tmp_path):
    run = load_run(project / "run")
    narrow = jax.tree.map(lambda x: x.astype("bfloat16"), run.params)
    save_npz(tmp_path / "model.npz", run._replace(params=narrow))
    file = np.load(tmp_path / "model.npz")
    assert file["embedding.table"].dtype == np.float32
    np.testing.assert_array_equal(
        file["embedding.table"], np.asarray(run.params["embedding"]["table"].astype("bfloat16"))
    )


def test_what_fails_leaves_nothing(project, tmp_path, monkeypatch):
    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save_npz(tmp_path / "model.npz", load_run(project / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def of_hub(tmp_path, monkeypatch):
    """A directory of the hub, and a run of one step that began from it."""
    monkeypatch.chdir(tmp_path)
    directory = write_words(write(tmp_path / "llama", "llama_linear", eos_token_id=4))
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"text/{split}.txt").write_text("w3 w17 w5\nw29 w0\n" * 32)
    train = ["--config=own_language_model", f"--config.init_from={directory}"]
    train += ["--config.data.path=text", "--config.data.target_length=11"]
    train += ["--config.train.steps=1", "--config.train.batch_size=8", "--workdir=run"]
    train += ["--config.train.warmup_steps=0", "--config.train.decay_steps=0"]
    train += ["--config.evaluate.batch_size=8", "--config.train.learning_rate=1"]
    assert main(["train", *train]) == 0
    return directory


@pytest.mark.slow
def test_a_run_that_began_from_the_hub_goes_back(of_hub, tmp_path):
    assert export("--workdir=run", "--output=back") == 0
    back, was = hub.load(tmp_path / "back"), hub.load(of_hub)
    same(nnx.state(back.model), load_run(tmp_path / "run").params)
    assert not np.array_equal(back.model.embedding.table[...], was.model.embedding.table[...])
    assert back.tokenizer.encode("w3 w0") == was.tokenizer.encode("w3 w0")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "llama"


def test_a_model_alone_where_a_family_has_what_it_does(tmp_path, monkeypatch, capfd, project):
    monkeypatch.chdir(project)
    refused = ["--workdir=run", f"--output={tmp_path}/out"]
    assert export(*refused) == 2
    assert "did not begin from a directory of the hub: give --family" in capfd.readouterr().err
    # Learned positions are none of a T5's.
    assert export(*refused, "--family=t5") == 2
    assert "t5" in capfd.readouterr().err and not (tmp_path / "out").exists()
    model = hub.load(write(tmp_path / "llama", "llama_linear")).model
    own = shutil.copytree(project / "run", tmp_path / "own")
    config, params = load_run(own).config, nnx.state(model)
    config.update(task="language_model")
    run = Run(config, None, model, params, 0, {})
    monkeypatch.setattr("mqa_jax.train.workdir.load_run", lambda *_, **__: run)
    assert export(f"--workdir={own}", f"--output={tmp_path}/out", "--family=llama") == 0
    same(nnx.state(hub.load(tmp_path / "out").model), params)


def test_what_cannot_be_written_is_refused_before_a_weight_is_read(
    project, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("mqa_jax.train.workdir.load_run", None)
    (tmp_path / "there.npz").touch()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text('{"model_type": "gpt2"}')
    workdir = f"--workdir={project}/run"
    for flags, reason in {
        ("--output=x",): "give --workdir",
        (workdir,): "give --output",
        (workdir, f"--output={tmp_path}/there.npz"): "there.npz is there already",
        (workdir, f"--output={tmp_path}"): "is there already",
        (workdir, f"--output={tmp_path}/there.npz/x.npz"): "there.npz is a file, no directory",
        (workdir, "--output=x.npz", "--family=t5"): "--family: of no effect for a file",
        (workdir, "--output=x", "--family=bert"): "'bert' is not a supported model type",
        (workdir, "--output=x", "--step=last"): "--step must be the number of a step",
        (f"--workdir={tmp_path}/hub", "--output=x.npz"): "--model, to a command that has that flag",
        (f"--workdir={tmp_path}", "--output=x"): "is not the --workdir of a training run",
    }.items():
        assert export(*flags) == 2
        assert reason in capfd.readouterr().err
