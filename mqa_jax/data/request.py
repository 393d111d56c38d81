"""What is asked for, `config.data`: checked in one place, named by its hash, and compared.

builder        "number_phrases", "parallel_text" (your own files), or a TFDS dataset such as
               "wmt14_translate/de-en" or "lm1b"; to build the latter takes the extra [prepare]
path           the directory of your own files; "" with any other builder
source, target sides: suffixes of your files, or features of the dataset; source "" makes a
               language model's data
splits         train, validation and perhaps test -> stem of your files, or TFDS split; of either
               a part, such as book[:95%] and book[95%:]
dir            where to write; "" for a directory under data/ that is named by the contents, so
               that other text or other fields go to another
tfds_dir       where TFDS keeps the raw data; "" for `<dir>/tfds`, data/tfds if dir is ""
source_length  tokens a row, EOS included; 0 for a language model
target_length  likewise
pack           several sentences a row, or one
on_invalid     blank lines and sentences longer than a row: "error", or "drop" and count them
vocab_size     of the tokenizer, both languages jointly; of the model, where its tokenizer is used
subword_samples, subword_alpha
               how often the training text is written, each time cut into pieces that are drawn, and
               how evenly: near 0 all ways to cut a text are alike (Kudo 2018, section 3.3); with 0
               samples it is written once, in the likeliest pieces
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.paths import local_path
from mqa_jax.data.manifest import FORMAT, MANIFEST, Manifest
from mqa_jax.data.tokenizer import RowTokenizer

SPLITS = ("train", "validation", "test")
OWN_TEXT = "parallel_text"
DEFAULT_ROOT = Path("data")

# Fields that decide the contents, and those that say where things are.
CONTENTS = (
    *("builder", "source", "target", "source_length", "target_length"),
    *("pack", "on_invalid", "vocab_size"),
)
PLACES = ("path", "dir", "tfds_dir")

# Fields that came later, which a config need not have, and what they are without.
LATER = dict(subword_samples=0, subword_alpha=0.3)

# No row and no vocabulary is larger; with more, numbers of bytes would come to be terabytes.
LARGEST = 2**24

# What the prepared directory needs for itself, or `parallel_text`.
RESERVED_SIDES = ("line", "gz")


def check(data: ConfigDict) -> None:
    """Raises a ValueError that names everything that makes no sense in `config.data`."""
    found = list(problems(data))
    if len(found) > 1:
        raise ValueError("\n  ".join([f"{len(found)} settings of the data make no sense:", *found]))
    if found:
        raise ValueError(found[0])


def problems(data: ConfigDict) -> Iterator[str]:
    """What is wrong with `config.data`, field by field, each with the way out."""
    values = {name: _value(data, name) for name in (*CONTENTS, *PLACES, *LATER, "splits")}
    unknown = sorted(set(data) - values.keys())
    if unknown:
        yield f"config.data has no fields {unknown}, only {sorted(values)}"
    if absent := [name for name, value in values.items() if value is None]:
        yield "nothing is given for " + ", ".join(f"--config.data.{name}" for name in absent)
    numbers = dict(source_length=0, target_length=1, vocab_size=1, subword_samples=0)
    typed = {name: str for name in values} | {"pack": bool, "splits": ConfigDict}
    typed |= dict.fromkeys([*numbers, "subword_alpha"], object)
    wrong = set(absent)
    for name, value in values.items():
        if name not in wrong and not isinstance(value, typed[name]):
            wrong.add(name)
            kind = {str: "text", bool: "True or False"}.get(typed[name], "a dict")
            yield f"--config.data.{name} must be {kind}, not {value!r}"
    for name, least in numbers.items():
        try:
            if name not in wrong:
                check_integer(f"--config.data.{name}", values[name], least=least, most=LARGEST)
        except ValueError as error:
            wrong.add(name)
            yield str(error)
    try:
        if "subword_alpha" not in wrong:
            check_number("--config.data.subword_alpha", values["subword_alpha"], above=0, most=1)
    except ValueError as error:
        yield str(error)
    right = {name: value for name, value in values.items() if name not in wrong}
    yield from _problems_of_sides(right)
    yield from _problems_of_places(right)
    if (choice := right.get("on_invalid", "drop")) not in ("error", "drop"):
        yield f'--config.data.on_invalid must be "error" or "drop", not {choice!r}'
    if right.get("builder", OWN_TEXT) == "":
        yield f"--config.data.builder must name a dataset, or {OWN_TEXT!r} for your own files"
    if "splits" in right:
        yield from _problems_of_splits(right["splits"])


def _value(data: ConfigDict, name: str) -> Any:
    try:
        return data.get(name, LATER.get(name))
    except RequiredValueError:
        return None


def _problems_of_sides(right: dict[str, Any]) -> Iterator[str]:
    source, target = right.get("source"), right.get("target")
    if target == "":
        yield "--config.data.target must name a side, not ''"
    if source and source == target:
        yield f"--config.data.source and .target are both {source!r}: name two different sides"
    if {"source", "source_length"} <= right.keys() and bool(source) != (right["source_length"] > 0):
        yield (
            f"--config.data.source {source!r} with source_length {right['source_length']}: a "
            "translation has a name and a positive length, a language model an empty name and 0"
        )
    for name, side in (("source", source), ("target", target)):
        # It becomes a part of file names and of a feature's name.
        if side and (re.search(r"[/\\\0\n]", side) or side in RESERVED_SIDES):
            yield (
                f"--config.data.{name} {side!r} cannot be the name of a side: without slashes and "
                f"line breaks, and none of {RESERVED_SIDES}"
            )


def _problems_of_places(right: dict[str, Any]) -> Iterator[str]:
    for name in PLACES:
        if text := right.get(name):
            try:
                place = local_path(f"--config.data.{name}", text)
                existing = next(p for p in (place, *place.absolute().parents) if p.exists())
            except (ValueError, OSError) as error:
                yield str(error)
                continue
            if not existing.is_dir():
                yield f"--config.data.{name} {text!r}: {existing} is a file, not a directory"
    path, builder = right.get("path"), right.get("builder")
    if path is not None and builder and bool(path) != (builder == OWN_TEXT):
        yield (
            f"--config.data.path {path!r} with builder {builder!r}: {OWN_TEXT}, and no other, "
            "reads the files of a path"
        )


def _problems_of_splits(splits: ConfigDict) -> Iterator[str]:
    names = splits.to_dict()
    if wrong := [name for name, value in names.items() if not isinstance(value, str | None)]:
        yield f"--config.data.splits.{wrong[0]} must be text, not {names[wrong[0]]!r}"
        return
    wanted = wanted_splits(splits)
    if not {"train", "validation"} <= wanted.keys() or set(names) - set(SPLITS):
        yield (
            f"splits {names}: --config.data.splits.train and .validation have to be named, .test "
            "may be, and there are no others"
        )
    if len(set(wanted.values())) < len(wanted):
        yield (
            f"splits {names}: two are the same text, so that what was learnt by heart would count "
            "as known; name a split of its own for each, or set --config.data.splits.test="
        )
    if any("\0" in name or "\n" in name for name in wanted.values()):
        yield f"splits {names}: a name has no line breaks"


def wanted_splits(splits: ConfigDict) -> dict[str, str]:
    """Our name of a split -> the name of it in the raw data; an empty one is not wanted."""
    return {name: splits[name] for name in SPLITS if splits.get(name)}


def place(data: ConfigDict, name: str) -> Path:
    """The path in a field of PLACES."""
    return local_path(f"--config.data.{name}", data[name])


def requested(
    data: ConfigDict, files: dict[str, str], tokenizer: RowTokenizer | None = None
) -> dict[str, Any]:
    """All that decides the contents, in the form that the manifest holds it in.

    Args:
      data: as `check` finds it right.
      files: the hashes of the user's own files; empty with any other builder.
      tokenizer: one that is given, not trained.
    """
    fields = {name: data[name] for name in CONTENTS}
    if data.get("subword_samples"):
        fields |= {name: data.get(name, value) for name, value in LATER.items()}
    if tokenizer is not None:
        fields |= {"tokenizer": tokenizer.sha256, "ids": list(tokenizer.ids)}
    return {"format": FORMAT} | fields | {"splits": wanted_splits(data.splits), "files": files}


def directory_of(data: ConfigDict, request: dict[str, Any]) -> Path:
    """Where the data goes: `data.dir`, or a directory whose name tells what is in it."""
    if data.dir:
        return place(data, "dir")
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join([data.builder, *filter(None, (data.source, data.target)), digest])
    return DEFAULT_ROOT / re.sub(r"[^\w.-]", "_", name)


def check_same(directory: Path, manifest: Manifest, asked: dict[str, Any]) -> None:
    """Raises a ValueError, field by field, if the directory holds what was not asked for."""
    was, asked = _flat(manifest.request), _flat(asked)
    differences = [
        f"  {field}: was {was.get(field)!r}, asked {asked.get(field)!r}"
        for field in sorted(was.keys() | asked.keys())
        if was.get(field) != asked.get(field)
    ]
    if differences:
        raise ValueError(
            "\n".join([f"{directory.absolute()} holds data made otherwise:", *differences])
            + "\nname another --config.data.dir (--config.data.dir= picks a new one), or delete "
            + f"{directory / MANIFEST} to make it anew"
        )


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    """Its dicts' entries as fields of their own, such as `splits.train`."""
    flat: dict[str, Any] = {}
    for field, value in request.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{field}.{name}".rstrip("."): entry for name, entry in entries}
    return flat
