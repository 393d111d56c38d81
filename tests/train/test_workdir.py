"""The working directory: one run's, with whole files."""

import json
import os

import pytest
from ml_collections import ConfigDict, config_dict

from mqa_jax.train import workdir


def make_config(**changes):
    config = ConfigDict(
        {
            "task": "translation",
            "train": {"steps": 70, "learning_rate": 0.25, "mesh": {"data": -1, "fsdp": 1}},
            "sizes": (3, 5),
            "window": None,
            "limit": config_dict.placeholder(int),
            "words": "für",
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_same_config_may_claim_again(tmp_path):
    path = tmp_path / "deep" / "run"
    assert workdir.claim(str(path), make_config()) == path
    first = (path / "config.json").read_bytes()
    assert workdir.claim(path, make_config()) == path
    assert (path / "config.json").read_bytes() == first
    assert files(path) == ["config.json"]


def test_every_difference_is_listed(tmp_path):
    workdir.claim(tmp_path, make_config())
    first = (tmp_path / "config.json").read_bytes()
    other = make_config(**{"train.steps": 71, "train.mesh.fsdp": 2, "window": 7, "limit": 9})
    del other.task
    other.sizes = (3, 5, 7)
    other.extra = ConfigDict({"a": True})
    with pytest.raises(ValueError) as error:
        workdir.claim(tmp_path, other)
    head, *lines, advice = str(error.value).splitlines()
    assert str(tmp_path) in head and "--workdir" in advice
    assert [line.strip() for line in lines] == [
        "config.extra: 'nothing' there, {'a': True} asked",
        "config.limit: None there, 9 asked",
        "config.sizes: [3, 5] there, [3, 5, 7] asked",
        "config.task: 'translation' there, 'nothing' asked",
        "config.train.mesh.fsdp: 1 there, 2 asked",
        "config.train.steps: 70 there, 71 asked",
        "config.window: None there, 7 asked",
    ]
    assert (tmp_path / "config.json").read_bytes() == first


def test_the_config_comes_back(tmp_path):
    config = make_config()
    workdir.claim(tmp_path, config)
    loaded = workdir.load_config(str(tmp_path))
    assert isinstance(loaded, ConfigDict) and isinstance(loaded.train.mesh, ConfigDict)
    assert loaded.to_dict() == config.to_dict() | {"sizes": [3, 5], "limit": None}
    assert loaded.train.steps == 70 and loaded.train.learning_rate == 0.25
    assert loaded.window is None and loaded.words == "für"
    # What was loaded claims the directory too, as a resumed run may.
    workdir.claim(tmp_path, loaded)


@pytest.mark.parametrize("limit", [4, None])
def test_a_placeholder_is_its_value(tmp_path, limit):
    config = make_config()
    config.limit = limit
    config.train.limit = config.get_ref("limit")
    workdir.claim(tmp_path, config)
    loaded = workdir.load_config(tmp_path)
    assert loaded.limit == loaded.train.limit == limit
    assert json.loads((tmp_path / "config.json").read_text())["limit"] == limit


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"no .*config.json: .* not the --workdir"):
        workdir.load_config(tmp_path)


def test_the_tokenizer_is_kept(tmp_path):
    first, other, run = tmp_path / "first.model", tmp_path / "other.model", tmp_path / "run"
    first.write_bytes(bytes(range(256)))
    other.write_bytes(b"other")
    run.mkdir()
    path = workdir.keep_tokenizer(str(run), first)
    assert path == run / "tokenizer.model" and path.read_bytes() == first.read_bytes()
    assert workdir.keep_tokenizer(run, str(first)) == path
    with pytest.raises(ValueError, match="run/tokenizer.model and .*other.model differ"):
        workdir.keep_tokenizer(run, other)
    assert path.read_bytes() == first.read_bytes()
    assert files(run) == ["tokenizer.model"]


def killed(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_run_that_is_killed_leaves_no_half_written_file(tmp_path, monkeypatch, name):
    """Killed when all is written but the name: the file is not there, and the next try makes it."""
    source, run = tmp_path / "source.model", tmp_path / "run"
    source.write_bytes(b"model")
    run.mkdir()

    def write():
        if name == "config.json":
            workdir.claim(run, make_config())
        else:
            workdir.keep_tokenizer(run, source)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert name not in files(run)
    write()
    assert files(run) == [name]
