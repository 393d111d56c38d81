"""What is asked for is checked as a whole, and before anything is made."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder

from mqa_jax.data import prepare as prepare_module
from mqa_jax.data import raw as raw_module
from mqa_jax.data.manifest import Manifest
from mqa_jax.data.prepare import prepare
from mqa_jax.data.request import LARGEST, check


def changed(config, changes):
    fields = config.to_dict()
    fields["splits"] |= changes.pop("splits", {}) if isinstance(changes.get("splits"), dict) else {}
    return ConfigDict(fields | changes)


WRONG = [
    *((dict(vocab_size=value), "data.vocab_size must be") for value in (0, -1, True, 2.0, "8")),
    *((dict(vocab_size=value), "data.vocab_size must be") for value in (math.nan, math.inf, 1e9)),
    (dict(vocab_size=LARGEST + 1), f"data.vocab_size must be from 1 to {LARGEST}, not {LARGEST+1}"),
    (dict(vocab_size=[8]), "data.vocab_size must be an integer"),
    (dict(vocab_size=None), "nothing is given for --config.data.vocab_size"),
    (dict(subword_samples=-1), "data.subword_samples must be from 0"),
    (dict(subword_samples=True), "data.subword_samples must be an integer"),
    *((dict(subword_alpha=x), "data.subword_alpha must be") for x in (0, 1.5, math.nan, "1")),
    (dict(source_length=-1), "data.source_length must be from 0"),
    (dict(source_length=10**12), "data.source_length must be from 0"),
    (dict(target_length=0), "data.target_length must be from 1"),
    (dict(target_length=False), "data.target_length must be an integer, not False"),
    (dict(source=""), "source '' with source_length 37"),
    (dict(source_length=0), "source 'en' with source_length 0"),
    (dict(target=""), "data.target must name a side"),
    (dict(target="en"), "source and .target are both 'en'"),
    (dict(target="line"), "data.target 'line' cannot be the name of a side"),
    (dict(source="a/en"), "data.source 'a/en' cannot be the name of a side"),
    (dict(source=3), "data.source must be text, not 3"),
    (dict(pack=1), "data.pack must be True or False, not 1"),
    (dict(pack="no"), "data.pack must be True or False, not 'no'"),
    (dict(on_invalid="truncate"), "data.on_invalid must be .*, not 'truncate'"),
    (dict(builder=""), "data.builder must name a dataset"),
    (dict(path=""), "path '' with builder 'parallel_text'"),
    (dict(builder="number_phrases"), "path .* with builder 'number_phrases'"),
    (dict(path=placeholder(str)), "nothing is given for --config.data.path"),
    (dict(path=required_placeholder(str)), "nothing is given for --config.data.path"),
    (dict(path="gs://bucket/text"), "data.path 'gs://bucket/text' is an address"),
    (dict(dir="s3://bucket/data"), "data.dir 's3://bucket/data' is an address"),
    (dict(tfds_dir="gs://tfds-data/datasets"), "data.tfds_dir .* is an address"),
    (dict(dir="a\0b"), "data.dir must be a path"),
    (dict(dir=__file__), "data.dir .*test_request.py is a file, not a directory"),
    (dict(path=f"{__file__}/text"), "data.path .*test_request.py is a file, not a directory"),
    (dict(tfds_dir=__file__), "data.tfds_dir .*test_request.py is a file, not a directory"),
    (dict(splits=dict(validation="")), r"splits {.*}: --config\.data\.splits\.train and"),
    (dict(splits=dict(dev="dev")), r"splits {.*}: --config\.data\.splits\.train and"),
    (dict(splits=dict(validation="train")), "splits {.*}: two are the same text"),
    (dict(splits=dict(test="val")), "splits {.*}: two are the same text"),
    (dict(splits=dict(test=3)), "data.splits.test must be text, not 3"),
    (dict(splits="train"), "data.splits must be a dict, not 'train'"),
    (dict(splits=None), "nothing is given for --config.data.splits"),
    (dict(vocabulary=3), r"config.data has no fields \['vocabulary'\], only"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", WRONG)
def test_senseless_fields_are_refused_before_anything_is_made(config, changes, message):
    data = changed(config, dict(changes))
    with pytest.raises(ValueError, match=message) as error:
        prepare(data)
    assert "\n" not in str(error.value)
    assert not Path(config.dir).exists()


@pytest.mark.parametrize("field", ["builder", "source", "splits", "tfds_dir", "target_length"])
def test_a_field_that_is_not_there_is_named(config, field):
    del config[field]
    with pytest.raises(ValueError, match=f"nothing is given for --config.data.{field}"):
        check(config)


def test_all_that_makes_no_sense_is_named_at_once(config):
    data = changed(config, dict(vocab_size=-3, target="en", pack=2, on_invalid="", path="", dir=7))
    with pytest.raises(ValueError, match="6 settings of the data make no sense") as error:
        check(data)
    for part in ("vocab_size must", "both 'en'", "pack must", "on_invalid must", "path ''", "dir"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(vocab_size=np.int64(300)),
        dict(source="", source_length=0),
        dict(splits=dict(test="")),
        dict(splits=dict(test=None)),
        dict(builder="wmt14_translate/de-en", path=""),
        dict(dir="", tfds_dir="~/tfds"),
        dict(dir="some/new [directory]/of *"),
    ],
)
def test_what_makes_sense_passes(config, changes):
    check(changed(config, changes))


def test_all_missing_files_are_named_with_where_they_were_looked_for(config, text_dir, monkeypatch):
    monkeypatch.chdir(text_dir.parent)
    config.update(path="text", target="fr")
    (text_dir / "val.en").unlink()
    with pytest.raises(ValueError) as error:
        prepare(config)
    message = str(error.value)
    for name in ("train.fr", "val.en", "val.fr", "test.fr"):
        assert f"\n  {text_dir / name}\n" in message
    assert f"{text_dir / 'train.en'}\n" not in message
    assert "the directory holds test.de, test.en, train.de, train.en, val.de: check" in message
    config.path = "elsewhere"
    with pytest.raises(ValueError, match="no such directory .* by --config.data.dir") as error:
        prepare(config)
    assert str(error.value).count(f"\n  {text_dir.parent}/elsewhere/") == 6


def test_all_unreadable_files_are_named(config, text_dir):
    (text_dir / "val.en").write_text("")
    (text_dir / "test.de").rename(text_dir / "test.de.gz")
    with pytest.raises(ValueError, match=r"(?s)val\.en is empty.*test\.de\.gz cannot be read"):
        prepare(config)


def test_a_second_corpus_just_works(config, text_dir, tmp_path, monkeypatch):
    """Without a directory of its own for each: the contents name it."""
    monkeypatch.chdir(tmp_path)
    config.dir = ""
    first = prepare(config)
    assert first.parent == Path("data") and first.name.startswith("parallel_text-en-de-")
    assert prepare(config) == first
    config.pack = False
    second = prepare(config)
    config.update(path=str(text_dir.rename(tmp_path / "moved")), pack=True)
    assert prepare(config) == first
    other = tmp_path / "moved" / "train.de"
    other.write_text(other.read_text().replace("eins", "uno"))
    third = prepare(config)
    assert len({first, second, third}) == 3
    assert [Manifest.read(path).request["pack"] for path in (first, second, third)] == [
        True, False, True,
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "tfds", first.name, second.name, third.name,
    }  # fmt: skip


def test_paths_with_odd_names(config, tmp_path, text_dir, monkeypatch):
    """Some of these are patterns to somebody, or parts of records to ArrayRecord."""
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / "a [0:5] *?{x} %# é"
    odd.mkdir()
    config.update(path=str(text_dir.rename(odd / "text")), dir="~/" + odd.name + "/prepared")
    directory = prepare(config)
    assert directory == odd / "prepared"
    assert Manifest.read(directory).split("train").examples == 211
    assert prepare(config) == directory
    assert not os.path.exists("~")


def test_nothing_is_read_before_the_fields_are_right(config, monkeypatch):
    monkeypatch.setattr(prepare_module, "own_files", None)
    monkeypatch.setattr(raw_module.tfds, "builder", None)
    config.vocab_size = 0
    with pytest.raises(ValueError, match="vocab_size"):
        prepare(config)
