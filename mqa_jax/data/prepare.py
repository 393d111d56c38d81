"""Raw text to tokenized, packed rows on disk, once:

    python -m mqa_jax.data.prepare --config=configs/multi30k.py [--config.data.dir=DIR ...]

It reads `config.data` only:

    builder        "number_phrases", "parallel_text" (your own files), or a TFDS dataset such as
                   "wmt14_translate/de-en" or "lm1b"; to build the latter takes the extra [prepare]
    path           the directory of your own files; "" with any other builder
    source, target sides: suffixes of your files, or features of the dataset; source "" makes a
                   language model's data
    splits         train, validation and perhaps test -> stem of your files, or TFDS split
    dir            where to write; see `manifest.py` for what
    tfds_dir       where TFDS keeps the raw data; "" for `<dir>/tfds`
    source_length  tokens a row, EOS included; 0 for a language model
    target_length  likewise
    pack           several sentences a row, or one
    on_invalid     blank lines and sentences longer than a row: "error", or "drop" and count them
    vocab_size     of the tokenizer, both languages jointly
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mqa_jax.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
)
from mqa_jax.data.parallel_text import parallel_text_config
from mqa_jax.data.raw import Example, RawText, wanted_splits
from mqa_jax.data.tokenizer import Tokenizer

# Raised when the same fields come to give other files.
FORMAT = 1


def prepare(data: ConfigDict) -> Path:
    """Makes the directory `data.dir`, or finds that it already is what is asked for.

    Args:
      data: the fields above.

    Returns:
      the directory.

    Raises:
      ValueError: the directory holds something else, a field makes no sense, the raw text cannot be
        had, or an example is invalid and `on_invalid` is "error".
    """
    directory = Path(data.dir)
    request = _request(data)
    if (directory / MANIFEST).exists():
        _check_same(directory, Manifest.read(directory).request, request)
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    raw = RawText(data)
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=directory) as name:
        incomplete = Path(name)
        train = (
            text
            for example in _valid(raw, data, "train", Counter())
            for text in example.texts.values()
        )
        tokenizer = Tokenizer.train(train, incomplete / TOKENIZER, data.vocab_size)
        manifest = Manifest(
            request=request,
            tokenizer_sha256=tokenizer.sha256,
            splits={
                split: _write_split(raw, tokenizer, data, split, incomplete)
                for split in request["splits"]
            },
        )
        manifest.write(incomplete)
        # The manifest comes last: whatever interrupts this, a directory with one is whole.
        for file in sorted(incomplete.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(directory / file.name)
    print(_report(directory, manifest))
    return directory


def _request(data: ConfigDict) -> dict[str, Any]:
    """All that decides the contents, in the form that the manifest holds it in."""
    if data.on_invalid not in ("error", "drop"):
        raise ValueError(f'on_invalid {data.on_invalid!r} is neither "error" nor "drop"')
    if bool(data.source) != bool(data.source_length) or data.source_length < 0:
        raise ValueError(
            f"source {data.source!r} with source_length {data.source_length}: a translation has a "
            "name and a positive length, a language model an empty name and 0"
        )
    if not data.target or data.target_length < 1:
        raise ValueError(
            f"target {data.target!r} with target_length {data.target_length}: give a name and a "
            "positive length"
        )
    if bool(data.path) != (data.builder == "parallel_text"):
        raise ValueError(
            f"path {data.path!r} with builder {data.builder!r}: parallel_text, and no other, reads "
            "the files of a path"
        )
    fields = ("builder", "source", "target", "source_length", "target_length")
    fields += ("pack", "on_invalid", "vocab_size")
    splits = wanted_splits(data)
    files = {}
    if data.path:
        files = parallel_text_config(data.path, data.source, data.target, splits).hashes
    request = {field: data[field] for field in fields}
    return {"format": FORMAT} | request | {"splits": splits, "files": files}


def _check_same(directory: Path, was: dict[str, Any], asked: dict[str, Any]) -> None:
    differences = [
        f"  {field}: was {was.get(field)!r}, asked {asked.get(field)!r}"
        for field in sorted(was.keys() | asked.keys())
        if was.get(field) != asked.get(field)
    ]
    if differences:
        raise ValueError(
            "\n".join([f"{directory} holds data made otherwise:", *differences])
            + f"\nname another --config.data.dir, or delete {directory}"
        )


def _valid(raw: RawText, data: ConfigDict, split: str, dropped: Counter) -> Iterator[Example]:
    """The examples with text on every side."""
    name = wanted_splits(data)[split]
    examples = raw.examples(name)
    ...
