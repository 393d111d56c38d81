"""A converted run: it is read as a run, trained further, and not gone on with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import quickstart
from mqa_jax.convert import convert_heads
from mqa_jax.core.sharding import make_mesh
from mqa_jax.data.manifest import FORMAT, FileStats, Manifest, SplitStats
from mqa_jax.data.tokenizer import Tokenizer
from mqa_jax.model.transformer import build_model
from mqa_jax.train import workdir
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.converted import save_converted
from mqa_jax.train.optimizer import build_optimizer
from mqa_jax.train.start import find_start
from mqa_jax.train.state import TrainState, init_state

RECORD = {"from": "run", "merge": "mean", "kv_heads": {"before": {}, "after": {}}}
HEADS = dict(num_kv_heads=1, encoder_kv_heads=4, cross_kv_heads=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few weights, as training would leave it."""
    directory = tmp_path_factory.mktemp("run")
    config = quickstart.get_config("multi_head")
    config.model.update(d_model=12, d_ff=7, num_layers=1, head_dim=3, vocab_size=300)
    data = directory / "data"
    data.mkdir()
    Tokenizer.train(["one two three"] * 9, data / "tokenizer.model", 269)
    splits = {"train": SplitStats(7, 5, 3, 2, 0.5, 0.25, {})}
    files = {"tokenizer.model": FileStats.of(data / "tokenizer.model")}
    Manifest({"format": FORMAT, "vocab_size": 269}, splits, files).write(data)
    about = workdir.describe(config, Manifest.read(data))
    workdir.claim(directory / "run", about, data)
    params = nnx.as_pure(
        nnx.state(build_model(config.task, config.model.to_dict(), rngs=nnx.Rngs(0)))
    )
    optimizer = build_optimizer("adamw", 0.1)
    with Checkpoints(directory / "run/checkpoints", run=about) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(7), params, optimizer.init(params)))
    return directory / "run"


@pytest.fixture
def converted(run, tmp_path):
    loaded = workdir.load_run(run)
    model = nnx.merge(nnx.graphdef(loaded.model), loaded.params)
    model = convert_heads(model, 1, cross_kv_heads=2)
    save_converted(tmp_path / "converted", loaded, model, RECORD)
    return tmp_path / "converted", model


def check_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(a), nnx.as_pure(b))


def test_it_is_read_as_a_run(run, converted):
    path, model = converted
    found, was = workdir.load_run(path), workdir.load_run(run)
    check_equal(found.params, nnx.state(model))
    assert found.step == was.step == 7
    assert found.tokenizer.sha256 == was.tokenizer.sha256
    # All else of the config is as it was.
    expected = was.config.to_dict()
    expected["model"] |= HEADS
    assert found.config.to_dict() == expected | {"converted": RECORD}
    # Signed, of the weights alone.
    assert {p.name for p in path.iterdir()} == {
        *("config.json", "data.json", "tokenizer.model", "checkpoints")
    }
    folder = path / "checkpoints/7"
    assert (folder / "params").is_dir() and not (folder / "optimizer").exists()
    signed = json.loads((folder / "run.json").read_text())
    assert signed["config"] == json.loads((path / "config.json").read_text())
    assert signed["data"] == json.loads((run / "data.json").read_text()) == found.data
    assert "run.json" in json.loads((folder / "manifest.json").read_text())


def test_what_is_damaged_of_it_is_named(converted):
    path, _ = converted
    config = json.loads((path / "config.json").read_text())
    config["model"]["encoder_kv_heads"] = 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.model.encoder_kv_heads: 4 there, 2 asked"):
        workdir.load_run(path)


def test_it_is_trained_further(converted):
    path, model = converted
    config = quickstart.get_config("multi_query")
    config.init_from = str(path)
    start = find_start(config)
    assert {name: start.config.model[name] for name in HEADS} == HEADS
    assert "converted" not in start.config
    build = lambda rngs: build_model("translation", start.config.model.to_dict(), rngs=rngs)  # noqa: E731
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    optimizer = build_optimizer("adamw", 0.1)
    _, state = init_state(build, optimizer, mesh, 0, params=start.params)
    check_equal(state.params, nnx.state(model))


def test_it_is_not_gone_on_with(converted):
    path, _ = converted
    config = workdir.load_config(path)
    with pytest.raises(ValueError, match="is a converted model, no run to go on with: .*init_from"):
        workdir.check(path, workdir.describe(config))


def test_it_is_there_whole_or_not_at_all(run, tmp_path, monkeypatch):
    loaded = workdir.load_run(run)
    model = nnx.merge(nnx.graphdef(loaded.model), loaded.params)
    with pytest.raises(ValueError, match="run is there already"):
        save_converted(run, loaded, model, RECORD)
    (tmp_path / "empty").mkdir()
    save_converted(tmp_path / "empty", loaded, model, RECORD)
    assert ConfigDict(workdir.load_config(tmp_path / "empty")).converted.merge == "mean"

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("mqa_jax.train.converted.write_json", full)
    with pytest.raises(OSError, match="no space"):
        save_converted(tmp_path / "new", loaded, model, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
