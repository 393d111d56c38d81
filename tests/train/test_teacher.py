"""The model that a run learns from too: how it is found, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mqa_jax.core.sharding import make_mesh
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.config import check_config
from mqa_jax.train.setup import set_up
from mqa_jax.train.start import find_start
from mqa_jax.train.teacher import find_teacher
from mqa_jax.train.workdir import load_config, load_run


def config_with(teacher, **changes):
    config = load_config(changes.pop("of", teacher))
    config.train.update(teacher=str(teacher), distillation=0.5)
    config.update_from_flattened_dict(changes)
    check_config(config)
    return config


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_run_teaches_with_the_weights_it_has(project, sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    config = config_with(project / "run")
    teacher, run = find_teacher(config, mesh), load_run(project / "run")
    teacher.check_tokenizer(run.tokenizer.ids_sha256)
    with pytest.raises(ValueError, match="another tokenizer than the data"):
        teacher.check_tokenizer("0" * 64)
    jax.tree.map(np.testing.assert_array_equal, teacher.params, run.params)
    abstract = find_teacher(config, mesh, is_abstract=True)
    for found, shape in zip(*map(jax.tree.leaves, (teacher.params, abstract.params)), strict=True):
        assert found.sharding == shape.sharding and found.shape == shape.shape
        assert found.sharding.mesh == mesh


def test_another_teacher_has_another_hash(project, tmp_path):
    """Of the weights, wherever it lies."""
    found = set()
    for name in ("same", "moved", "step"):
        run = shutil.copytree(project / "run", tmp_path / name)
        if name == "step":
            shutil.rmtree(run / "checkpoints/8")
        found.add(find_teacher(config_with(run), one_device()).sha256)
        assert len(found) == dict(same=1, moved=1, step=2)[name]


def test_none_is_none(project):
    assert find_teacher(load_config(project / "run"), one_device()) is None


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("nowhere", {}, "train.teacher '.*nowhere' has no config.json: give a directory"),
        ("train.en", {}, "train.teacher '.*train.en' is a file: give the directory"),
        ("run", {"model.vocab_size": 300}, "predicts 288 ids, --config.model.vocab_size is 300"),
        (
            "run",
            {"model.max_length": 41, "data.target_length": 41},
            "has 40 positions, and rows of the data are of 41: lower",
        ),
        (
            "run",
            {"task": "language_model", "data.source": "", "data.source_length": 0},
            "is a translation, and the config's task is 'language_model'",
        ),
    ],
)
def test_who_cannot_teach(project, name, changes, reason):
    config = config_with(project / name, of=project / "run", **changes)
    with pytest.raises(ValueError, match=reason):
        find_teacher(config, one_device())


def test_a_damaged_teacher_is_named(project, tmp_path):
    run = shutil.copytree(project / "run", tmp_path / "run")
    for folder in run.glob("checkpoints/*/params"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is whole. Not what was written are"):
        find_teacher(config_with(run), one_device())


def test_a_config_that_the_teacher_was_not_trained_with_is_named(project, tmp_path):
    run = shutil.copytree(project / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["norm_epsilon"] = 1e-3
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.norm_epsilon: 1e-06 there, 0.001 asked"):
        find_teacher(config_with(run), one_device())
    # Nor does anything begin from it.
    config = load_config(project / "run")
    config.init_from = str(run)
    begin = find_start(config)
    with pytest.raises(ValueError, match="model.norm_epsilon: 1e-06 there, 0.001 asked"):
        set_up(begin.config, one_device(), params=begin.params)


def test_weights_that_are_not_finite_teach_nobody(project, monkeypatch):
    def restored(self, like):
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype, device=x.sharding), like)

    monkeypatch.setattr(Checkpoints, "restore_params", restored)
    with pytest.raises(ValueError, match="/run' has weights that are not finite in float32"):
        find_teacher(config_with(project / "run"), one_device())
