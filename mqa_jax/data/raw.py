"""Raw text: the splits of any TFDS dataset, as examples that know where they come from."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from mqa_jax.data.number_phrases import NumberPhrases
from mqa_jax.data.parallel_text import LINE, ParallelText, ParallelTextConfig, parallel_text_config

SPLITS = ("train", "validation", "test")

# One by one, examples take ten times as long to read.
READ_AT_ONCE = 1024


class Example(NamedTuple):
    """An example of a split.

    Attributes:
      number: its line, from 1, in a user's file; else its index, from 0, in the split.
      texts: side (such as "en") -> text.
    """

    number: int
    texts: dict[str, str]


class RawText:
    """The text that a config asks for, built by TFDS first if it is not there yet.

    Attributes:
      hashes: name -> sha256 of the user's own files; empty for any other dataset.
    """

    def __init__(self, data: ConfigDict):
        """Args:
          data: `config.data`; see `mqa_jax.data.prepare`.

        Raises:
          ValueError: there is no such dataset or side, or it cannot be built.
        """
        self._sides = [side for side in (data.source, data.target) if side]
        self._builder = _builder(data)
        self._names = wanted_splits(data)
        self.hashes: dict[str, str] = {}
        if isinstance(self._builder, ParallelText):
            self._names = {split: split for split in self._names}
            self.hashes = self._builder.builder_config.hashes
        if not self._builder.is_prepared():
            _build(self._builder)
        if missing := set(self._sides) - set(self._builder.info.features):
            raise ValueError(
                f"{data.builder} has no {sorted(missing)}, only "
                f"{sorted(self._builder.info.features)}: set --config.data.source and "
                "--config.data.target to two of these"
            )

    def count(self, split: str) -> int:
        """How many examples "train", "validation" or "test" has."""
        return len(self._builder.as_data_source(self._names[split]))

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split in their order."""
        source = self._builder.as_data_source(self._names[split])
        for start in range(0, len(source), READ_AT_ONCE):
            block = range(start, min(start + READ_AT_ONCE, len(source)))
            for index, features in zip(block, source.__getitems__(block), strict=True):
                texts = {side: features[side].decode("utf-8") for side in self._sides}
                yield Example(int(features.get(LINE, index)), texts)

    def where(self, split: str, side: str, example: Example) -> str:
        """Where a user finds one side of an example, for messages."""
        if isinstance(self._builder, ParallelText):
            return f"{self._builder.builder_config.files[split][side]}:{example.number}"
        return f"{self._builder.info.full_name}, {self._names[split]}[{example.number}], {side!r}"


def _builder(data: ConfigDict) -> tfds.core.DatasetBuilder:
    options = {"data_dir": data.tfds_dir or str(Path(data.dir) / "tfds")}
    options["file_format"] = "array_record"
    if data.builder == ParallelText.name:
        return ParallelText(config=own_files(data), **options)
    if data.builder == NumberPhrases.name:
        return NumberPhrases(**options)
    # TFDS looks for its datasets by importing them all, and quietly ends at the first of them that
    # lacks a package, before it comes to these.
    for group in ("text", "translate"):
        importlib.import_module(f"tensorflow_datasets.{group}")
    return tfds.builder(data.builder, **options)


def _build(builder: tfds.core.DatasetBuilder) -> None:
    # Else this would show only when the download, of gigabytes, has ended.
    needs_tensorflow = not isinstance(builder, ParallelText | NumberPhrases)
    if needs_tensorflow and importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"to build {builder.info.full_name} takes TensorFlow: `pip install mqa_jax[prepare]`, "
            f"or copy it, built elsewhere as array_record, to {builder.data_dir}"
        )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder.download_and_prepare()


def own_files(data: ConfigDict) -> ParallelTextConfig:
    """The user's own files that a config asks for; raises as `parallel_text_config` does."""
    return parallel_text_config(data.path, data.source, data.target, wanted_splits(data))


def wanted_splits(data: ConfigDict) -> dict[str, str]:
    """Our name of a split -> the name of it in the raw data; an empty one is not wanted.

    Raises:
      ValueError: there is no train or no validation split, or an unknown one.
    """
    splits = {name: data.splits[name] for name in SPLITS if data.splits.get(name)}
    if not {"train", "validation"} <= splits.keys() or set(data.splits) - set(SPLITS):
        raise ValueError(
            f"splits {data.splits.to_dict()}: --config.data.splits.train and .validation have to "
            "be named, .test may be, and there are no others"
        )
    return splits
