"""Paths and JSON of users."""

import os
from pathlib import Path

import pytest

from mqa_jax.core.paths import local_path, new_directory, read_json, write_whole


@pytest.mark.parametrize(
    "value",
    ["runs/a", "/runs/a", "../a", "a/", "./gs:b/c", "a [b]{c}*?%20#ü", "C:/runs", "a:b", "-"],
)
def test_a_path_stays_what_it_is(value):
    assert local_path("--workdir", value) == Path(value)
    assert local_path("--workdir", Path(value)) == Path(value)


def test_a_leading_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("--workdir", "~/runs") == Path("/home/me/runs")
    assert local_path("--workdir", "a~/~") == Path("a~/~")
    for value in ("./~", "./gs:/b", "~nobody-of-that-name"):
        assert local_path("--workdir", value) == Path(value)


@pytest.mark.parametrize(
    "value", ["gs://bucket/run", "s3://b", "gs:/bucket", "file:///tmp", "hdfs+x://h", "GS://b"]
)
def test_an_address_is_refused_with_the_way_out(value):
    for given in (value, Path(value)):
        with pytest.raises(ValueError, match=r"--workdir '.*' is an address.*gcsfuse"):
            local_path("--workdir", given)


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_what_is_no_path(value):
    with pytest.raises(ValueError, match="--input must be a path, not "):
        local_path("--input", value)


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"[1]", b"3", b'{"a": "\xff"}', b"null", b"\0" * 9]
)
def test_json_that_is_none_names_its_file(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is (cut short|not what was written)"):
        read_json(path)
    path.write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_json(path) == {"ä": [1, None]}


def test_where_nothing_can_be_made_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    for value, reason in {
        "file/x": f"{tmp_path}/file is a file, no directory",
        "file/x/y": f"{tmp_path}/file is a file, no directory",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(ValueError, match=f"--output .*: {reason}: give another"):
            new_directory("--output", tmp_path / value)
    assert new_directory("--output", tmp_path / "a/b") == tmp_path / "a/b"
    monkeypatch.setattr(os, "access", lambda *_: False)  # Who runs the tests may write everywhere.
    with pytest.raises(ValueError, match=f"nothing can be written into {tmp_path}: give"):
        new_directory("--output", tmp_path / "a/b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_text_that_cannot_be_written_leaves_nothing_and_names_its_file(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_whole(path, "old")

    def full(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*figures.json'"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
