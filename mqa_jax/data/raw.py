"""Raw text: the splits of any TFDS dataset, as examples that know where they come from."""

import contextlib
import importlib.util
import io
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from absl import logging
from ml_collections import ConfigDict

from mqa_jax.core.lock import locked
from mqa_jax.data.number_phrases import NumberPhrases
from mqa_jax.data.parallel_text import LINE, ParallelText, ParallelTextConfig, parallel_text_config
from mqa_jax.data.request import DEFAULT_ROOT, place, wanted_splits

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
    """The text that a config asks for, built by TFDS first if it is not there yet."""

    def __init__(self, data: ConfigDict, files: ParallelTextConfig | None):
        """Args:
          data: `config.data`; see `mqa_jax.data.request`.
          files: the user's own, as `own_files` finds them; None with any other builder.

        Raises:
          ValueError: there is no such dataset or side, or it cannot be built.
        """
        self._sides = [side for side in (data.source, data.target) if side]
        with _quiet_tfds():
            self._builder = _builder(data, files)
            _build(self._builder)
        wanted = wanted_splits(data.splits)
        self._names = parts_of_files(wanted)[1] if files else wanted
        features = self._builder.info.features.items()
        texts = [name for name, feature in features if isinstance(feature, tfds.features.Text)]
        if missing := set(self._sides) - set(texts):
            raise ValueError(
                f"{data.builder} has no texts {sorted(missing)}, only {sorted(texts)}: set "
                "--config.data.source and --config.data.target to two of these"
            )
        self._check_apart(wanted)

    def _check_apart(self, wanted: Mapping[str, str]) -> None:
        """Whether all splits are there, and no example is in two of them."""
        infos = self._builder.info.splits
        spans: list[tuple[str, str, int, int]] = []
        for split, name in self._names.items():
            flag = f"--config.data.splits.{split} {wanted[split]!r}"
            try:
                parts = tfds.core.ReadInstruction.from_spec(name).to_absolute(infos)
            except (ValueError, KeyError) as error:
                reason = str(error).partition(" See format at")[0]
                raise ValueError(
                    f"{flag}: {reason} Give a split, of {sorted(infos)}, or a part of one such as "
                    "train[:95%]"
                ) from None
            for part in parts:
                last = infos[part.splitname].num_examples
                span = part.from_ or 0, last if part.to is None else part.to
                for other, where, first, end in spans:
                    if where == part.splitname and max(first, span[0]) < min(end, span[1]):
                        raise ValueError(
                            f"{flag} and .{other} {wanted[other]!r} have examples in common, which "
                            "learnt by heart would count as known: give parts that do not overlap"
                        )
                spans.append((split, part.splitname, *span))

    def count(self, split: str) -> int:
        """How many examples "train", "validation" or "test" has."""
        return len(self._builder.as_data_source(self._names[split]))

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split in their order.

        Raises:
          ValueError: what TFDS has built cannot be read.
        """
        source = self._builder.as_data_source(self._names[split])
        for start in range(0, len(source), READ_AT_ONCE):
            block = range(start, min(start + READ_AT_ONCE, len(source)))
            try:
                examples = source.__getitems__(block)
            except RuntimeError as error:
                raise ValueError(
                    f"a record of {self._names[split]}[{block.start}:{block.stop}] in "
                    f"{self._builder.data_dir} is damaged ({error}): delete that directory, and "
                    "what it was built of is read again"
                ) from error
            for index, features in zip(block, examples, strict=True):
                texts = {side: features[side].decode("utf-8") for side in self._sides}
                yield Example(int(features.get(LINE, index)), texts)

    def where(self, split: str, side: str, example: Example) -> str:
        """Where a user finds one side of an example, for messages."""
        if isinstance(self._builder, ParallelText):
            name = self._names[split].partition("[")[0]
            return f"{self._builder.builder_config.files[name][side]}:{example.number}"
        return f"{self._builder.info.full_name}, {self._names[split]}[{example.number}], {side!r}"


def _builder(data: ConfigDict, files: ParallelTextConfig | None) -> tfds.core.DatasetBuilder:
    if data.tfds_dir:
        directory = place(data, "tfds_dir")
    else:
        directory = (place(data, "dir") if data.dir else DEFAULT_ROOT) / "tfds"
    options = {"data_dir": str(directory), "file_format": "array_record"}
    if files:
        return ParallelText(config=files, **options)
    if data.builder == NumberPhrases.name:
        return NumberPhrases(**options)
    # TFDS looks for its datasets by importing them all, and quietly ends at the first of them that
    # lacks a package, before it comes to these.
    for group in ("text", "translate"):
        importlib.import_module(f"tensorflow_datasets.{group}")
    return tfds.builder(data.builder, **options)


def _build(builder: tfds.core.DatasetBuilder) -> None:
    if builder.is_prepared():
        return
    # Else this would show only when the download, of gigabytes, has ended.
    needs_tensorflow = not isinstance(builder, ParallelText | NumberPhrases)
    if needs_tensorflow and importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f'to build {builder.info.full_name} takes TensorFlow: pip install "mqa_jax[prepare]", '
            f"or copy it, built elsewhere as array_record, to {builder.data_dir}"
        )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # Other data may be prepared of the same raw text at once.
    parent = Path(builder.data_dir).parent
    with locked(parent, f"building {builder.info.full_name}", wait=True):
        # What a killed process has left; under the lock nobody else is building there.
        for left in parent.glob("incomplete.*"):
            shutil.rmtree(left)
        if not builder.is_prepared():
            told: contextlib.AbstractContextManager = contextlib.nullcontext()
            if isinstance(builder, ParallelText | NumberPhrases):
                told = contextlib.redirect_stdout(io.StringIO())  # That it downloads; it does not.
            with told:
                builder.download_and_prepare()


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Leaves out the warnings of TFDS, which are that a dataset, or a config, is new to it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def own_files(data: ConfigDict) -> ParallelTextConfig:
    """The user's own files that a config asks for; raises as `parallel_text_config` does."""
    stems, _ = parts_of_files(wanted_splits(data.splits))
    return parallel_text_config(place(data, "path"), data.source, data.target, stems)


def parts_of_files(wanted: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Splits that may be parts of a file, such as "book[:95%]" and "book[95%:]", as TFDS has them.

    Returns:
      for each file, by the first split that is of it, its stem; and for each split the part of that
      one that it is.
    """
    stems: dict[str, str] = {}
    names: dict[str, str] = {}
    for split, name in wanted.items():
        stem, bracket, part = name.partition("[")
        first = next((other for other in stems if stems[other] == stem), split)
        stems[first] = stem
        names[split] = f"{first}{bracket}{part}"
    return stems, names
