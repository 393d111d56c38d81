"""`parallel_text`: a user's own text, one sentence a line, as a TFDS dataset.

For translation a split is two files whose lines belong together, `<stem>.<source>` and
`<stem>.<target>`; for a language model it is one, `<stem>.<target>`. Each may be gzipped, and is
then called `<name>.gz`.

    config = parallel_text_config("my/text", "en", "de", {"train": "train", "validation": "dev"})
    builder = ParallelText(config=config, data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    builder.as_data_source("train")[0]  # {"en": b"Hello.", "de": b"Hallo.", "line": 1}

Blank lines are kept: what is to be done about them is not for this file to say.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mqa_jax.data.text import iterate_lines, open_text

LINE = "line"


@dataclasses.dataclass(kw_only=True, eq=False)
class ParallelTextConfig(tfds.core.BuilderConfig):
    """Which files a dataset is made of; made by `parallel_text_config`.

    Attributes:
      files: split -> side (such as "en") -> file.
      hashes: file name, without ".gz" -> sha256 of the text in it.
    """

    files: dict[str, dict[str, Path]]
    hashes: dict[str, str]


def parallel_text_config(
    path: str | Path, source: str, target: str, splits: Mapping[str, str]
) -> ParallelTextConfig:
    """Finds and hashes the files of a dataset.

    The name of the config holds a hash of all the text, so that TFDS, which keeps what it has built
    under that name, builds anew when a file has changed.

    Args:
      path: the directory that the files are in.
      source: suffix of the source files; "" for a language model.
      target: suffix of the target files.
      splits: split -> stem of its files.

    Raises:
      ValueError: files are missing, are there twice, are empty, or cannot be read, all of which are
        named; or both sides have one suffix.
    """
    if source == target:
        raise ValueError(f"source and target are both {target!r}: name two different suffixes")
    sides = [side for side in (source, target) if side]
    wanted = {
        split: {side: Path(path) / f"{stem}.{side}" for side in sides}
        for split, stem in splits.items()
    }
    files = {
        split: {side: _found(file) for side, file in of_side.items()}
        for split, of_side in wanted.items()
    }
    _refuse(Path(path), wanted, files)
    hashes: dict[str, str] = {}
    unreadable = []
    for split, of_side in files.items():
        for side, file in of_side.items():
            try:
                hashes[f"{splits[split]}.{side}"] = _sha256(file)
            except ValueError as error:
                unreadable.append(str(error))
    if unreadable:
        raise ValueError("\n".join(unreadable))
    everything = json.dumps([sides, dict(splits), hashes], sort_keys=True)
    digest = hashlib.sha256(everything.encode()).hexdigest()[:16]
    # A suffix can hold what TFDS takes for a pattern; the digest tells such suffixes apart.
    name = re.sub(r"[^\w.-]", "_", "-".join([*sides, digest]))
    return ParallelTextConfig(name=name, files=files, hashes=hashes)


def _found(plain: Path) -> Path:
    """The file, or its gzipped form if only that is there."""
    zipped = plain.with_name(f"{plain.name}.gz")
    return zipped if zipped.is_file() and not plain.is_file() else plain


def _refuse(
    directory: Path, wanted: dict[str, dict[str, Path]], files: dict[str, dict[str, Path]]
) -> None:
    """Names, at once, all files that are missing and all that are there twice."""
    plain = [file for of_side in wanted.values() for file in of_side.values()]
    found = [file for of_side in files.values() for file in of_side.values()]
    twice = [f for f in plain if f in found and f.is_file() and Path(f"{f}.gz").is_file()]
    if twice:
        raise ValueError(
            "\n".join(f"{file.absolute()} and {file.name}.gz are both there" for file in twice)
            + "\nremove one of each two"
        )
    missing = [str(file.absolute()) for file in found if not file.is_file()]
    if not missing:
        return
    if directory.is_dir():
        names = sorted(file.name for file in directory.iterdir())
        more = f", ... ({len(names)} in all)" if names[12:] else ""
        there = f"the directory holds {', '.join(names[:12]) + more or 'nothing'}"
    else:
        there = (
            "there is no such directory (to go on with data that was prepared elsewhere, name it "
            "by --config.data.dir)"
        )
    raise ValueError(
        "\n  ".join(
            ["files of your text are missing, plain and with .gz behind their names:", *missing]
        )
        + f"\n{there}: check --config.data.path, .splits (the names up to the suffix), .source and "
        ".target (the suffixes; source is empty for a language model)"
    )


def _sha256(file: Path) -> str:
    try:
        with open_text(file) as text:
            if not text.peek(1):
                raise ValueError(f"{file} is empty: remove its split, or put text into it")
            return hashlib.file_digest(text, "sha256").hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read ({error}): copy it here again") from error


class ParallelText(tfds.core.GeneratorBasedBuilder):
    """Text files whose lines belong together, or of one language alone."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {
        "1.0.0": "First release.",
        "1.1.0": "A byte order mark in front of a file is no text.",
    }

    builder_config: ParallelTextConfig

    def _info(self) -> tfds.core.DatasetInfo:
        sides = next(iter(self.builder_config.files.values()))
        return tfds.core.DatasetInfo(
            builder=self,
            description="Lines of text files, in the order and number that they have there.",
            features=tfds.features.FeaturesDict(
                {LINE: tfds.features.Scalar(np.int64)}
                | {side: tfds.features.Text() for side in sides}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # there is nothing to download
        return {
            split: self._generate_examples(files)
            for split, files in self.builder_config.files.items()
        }

    def _generate_examples(self, files: Mapping[str, Path]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, texts in enumerate(
            itertools.zip_longest(*map(iterate_lines, files.values())), 1
        ):
            if None in texts:
                counts = [
                    f"{file} has {sum(1 for _ in iterate_lines(file))}" for file in files.values()
                ]
                raise ValueError(
                    f"unequal numbers of lines: {' and '.join(counts)}; line N of the one has to "
                    "be the translation of line N of the other"
                )
            yield number, {LINE: number} | dict(zip(files, texts, strict=True))
