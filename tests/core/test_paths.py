"""Paths and JSON of users."""

from pathlib import Path

import pytest

from mqa_jax.core.paths import local_path, read_json


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
