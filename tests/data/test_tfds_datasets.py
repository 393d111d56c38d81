"""The paper's data sets: the builders of TFDS themselves, over small archives of the same format.

Only downloading and unpacking are replaced (the latter, in TFDS, takes TensorFlow); what finds,
parses and writes is what makes the real ones.
"""

import glob
import importlib.util
import io
import itertools
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import lm1b, wmt14
from mqa_jax.data import EOS_ID
from mqa_jax.data import raw as raw_module
from mqa_jax.data.loader import train_batches
from mqa_jax.data.manifest import Manifest
from mqa_jax.data.prepare import prepare
from mqa_jax.data.text import read_lines

THINGS = dict(house="Haus", tree="Baum", river="Fluss", street="Strasse", window="Fenster")
PAIRS = [
    (f"the {first} stands behind a {second} {i}", f"{THINGS[first]} vor {THINGS[second]} {i}")
    for i, (first, second) in enumerate(itertools.permutations(list(THINGS) * 2, 2))
][:40]


def sgm(lines, kind):
    segments = "".join(f'<seg id="{i}">{line}</seg>\n' for i, line in enumerate(lines, 1))
    return (
        f'<{kind} setid="newstest2014">\n<doc docid="1">\n<p>\n{segments}</p>\n</doc>\n</{kind}>\n'
    )


def text(pairs, side):
    return "".join(pair[side] + "\n" for pair in pairs)


def parallel(stem, pairs):
    return {f"{stem}.en": text(pairs, 0), f"{stem}.de": text(pairs, 1)}


WMT14 = {
    "training-parallel-europarl-v7.tgz": parallel("training/europarl-v7.de-en", PAIRS[:20]),
    "training-parallel-commoncrawl.tgz": parallel("commoncrawl.de-en", PAIRS[20:25]),
    "training-parallel-nc-v9.tgz": parallel("training/news-commentary-v9.de-en", PAIRS[25:30]),
    "dev.tgz": parallel("dev/newstest2013", PAIRS[30:34])
    | {
        "dev/newstest2014-deen-src.de.sgm": sgm([de for _, de in PAIRS[34:37]], "srcset"),
        "dev/newstest2014-deen-ref.en.sgm": sgm([en for en, _ in PAIRS[34:37]], "refset"),
    },
}
TOP = "1-billion-word-language-modeling-benchmark-r13output"
LM1B = {
    f"{TOP}.tar.gz": {
        f"{TOP}/training-monolingual.tokenized.shuffled/news.en-00001-of-00100": text(
            PAIRS[:15], 0
        ),
        f"{TOP}/training-monolingual.tokenized.shuffled/news.en-00002-of-00100": text(
            PAIRS[15:30], 0
        ),
        f"{TOP}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": text(
            PAIRS[30:], 0
        ),
    }
}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Makes archives, which TFDS then finds where it would download."""

    def make(archives):
        for name, files in archives.items():
            with tarfile.open(tmp_path / name, "w:gz") as archive:
                for path, content in files.items():
                    member = tarfile.TarInfo(path)
                    member.size = len(content.encode())
                    archive.addfile(member, io.BytesIO(content.encode()))

        def download_and_extract(manager, urls):
            if isinstance(urls, dict):
                return {name: download_and_extract(manager, each) for name, each in urls.items()}
            if isinstance(urls, list):
                return [download_and_extract(manager, each) for each in urls]
            name = Path(urls).name
            with tarfile.open(tmp_path / name) as archive:
                archive.extractall(tmp_path / "extracted" / name, filter="data")
            return tmp_path / "extracted" / name

        monkeypatch.setattr(
            tfds.download.DownloadManager, "download_and_extract", download_and_extract
        )

    if importlib.util.find_spec("tensorflow") is None:
        # The little of it that these builders use, so that this is tested everywhere.
        from tensorflow_datasets.datasets.lm1b import lm1b_dataset_builder

        tensorflow = types.SimpleNamespace(
            io=types.SimpleNamespace(gfile=types.SimpleNamespace(glob=glob.glob))
        )
        monkeypatch.setattr(lm1b_dataset_builder, "tf", tensorflow)
        monkeypatch.setattr(raw_module.importlib.util, "find_spec", lambda name: True)
    return make


def small(config, tmp_path, vocab_size):
    with config.unlocked():
        config.data.update(dir=str(tmp_path / "data"), tfds_dir=str(tmp_path / "tfds"))
        config.data.vocab_size = vocab_size
        for side in ("source_length", "target_length"):
            config.data[side] = config.data[side] and 128
    return config.data


def test_wmt14(mirror, tmp_path):
    mirror(WMT14)
    data = small(wmt14.get_config(), tmp_path, 300)
    directory = prepare(data)
    counts = {split: stats.examples for split, stats in Manifest.read(directory).splits.items()}
    assert counts == dict(train=30, validation=4, test=3)
    english, german = (read_lines(directory / f"test.{side}.txt") for side in ("en", "de"))
    assert sorted(zip(english, german, strict=True)) == sorted(PAIRS[34:37])
    batch = next(train_batches(directory, batch_size=2, seed=0, start=0))
    assert batch["source_tokens"].shape == (2, 128) and np.sum(batch["target_tokens"] == EOS_ID) > 2


def test_lm1b(mirror, tmp_path):
    mirror(LM1B)
    data = small(lm1b.get_config(), tmp_path, 290)
    directory = prepare(data)
    counts = {split: stats.examples for split, stats in Manifest.read(directory).splits.items()}
    assert counts == dict(train=30, validation=10)
    assert sorted(read_lines(directory / "validation.text.txt")) == sorted(
        en for en, _ in PAIRS[30:]
    )
    batch = next(train_batches(directory, batch_size=2, seed=0, start=0))
    assert batch["target_tokens"].shape == (2, 128) and "source_tokens" not in batch
