"""What a prepared directory holds, and the `manifest.json` in it that says so.

manifest.json                       written last: a directory without it is not whole
tokenizer.model                     `mqa_jax.data.tokenizer`; or tokenizer.zip, one of the hub's
<split>.array_record                one record a row: the tokens of `packing.to_tokens`, as RECORD
validation.<side>.txt, test....     raw text, one example a line, in the order of the source data

The manifest has the hash of every file, and one of itself: what was edited, exchanged or cut short
is named, and never read as something else.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from mqa_jax.core.paths import read_json
from mqa_jax.data import OWN_IDS, SpecialIds

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
HUB_TOKENIZER = "tokenizer.zip"
RECORD = "<i4"  # NumPy's name of the integers of a record

# Raised when the same request comes to give other files.
FORMAT = 3


@dataclasses.dataclass(frozen=True)
class SplitStats:
    """What a split holds.

    Attributes:
      examples: pairs of sentences, or sentences of a language model.
      rows: rows that they were packed into; as many as there are records.
      source_tokens: tokens, EOS included, padding not.
      target_tokens: likewise.
      source_fill: the part of the rows' source side that is not padding, 0 to 1; 0 for a language
        model.
      target_fill: likewise.
      dropped: reason -> number of examples left out for it.
    """

    examples: int
    rows: int
    source_tokens: int
    target_tokens: int
    source_fill: float
    target_fill: float
    dropped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class FileStats:
    """What a file was when it was written.

    Attributes:
      size: its bytes.
      sha256: of them, in hexadecimal digits.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> "FileStats":
        """Those of a file; it is read once."""
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(file.tell(), sha256)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
      request: all that decides the contents: fields of `config.data`, and hashes of the user's
        files.
      splits: "train", "validation", perhaps "test".
      files: name -> what it was when it was written, for every other file of the directory.
    """

    request: dict[str, Any]
    splits: dict[str, SplitStats]
    files: dict[str, FileStats]

    @property
    def sha256(self) -> str:
        """Of all of the contents, the files' included: the same for the same data."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer's file."""
        return TOKENIZER if TOKENIZER in self.files else HUB_TOKENIZER

    @property
    def tokenizer_sha256(self) -> str:
        """Of the tokenizer's file."""
        return self.files[self.tokenizer].sha256

    @property
    def ids(self) -> SpecialIds:
        """What begins and ends the sentences of the rows, and fills these up."""
        return SpecialIds(*self.request.get("ids", OWN_IDS))

    @classmethod
    def read(cls, directory: str | Path) -> "Manifest":
        """Reads the manifest of a prepared directory.

        Raises:
          ValueError: there is none, it is of another version, or not as it was written.
        """
        path = Path(directory).absolute() / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"there is no {path}: make the data with `python -m mqa_jax.data.prepare "
                f"--config=CONFIG --config.data.dir={directory}`"
            )
        fields = read_json(path)
        anew = f"delete {path} and prepare the data anew"
        request = fields.get("request")
        made_by = request.get("format") if isinstance(request, dict) else None
        if made_by is not None and made_by != FORMAT:
            raise ValueError(
                f"{path} is of format {made_by!r}, and this version reads {FORMAT}: {anew}"
            )
        try:
            sha256 = fields.pop("sha256")
            splits = {name: SplitStats(**stats) for name, stats in fields.pop("splits").items()}
            files = {name: FileStats(**stats) for name, stats in fields.pop("files").items()}
            manifest = cls(**fields, splits=splits, files=files)
            is_as_written = manifest.sha256 == sha256 and manifest.tokenizer in files
        except (KeyError, TypeError, AttributeError):
            is_as_written = False
        if not is_as_written:
            raise ValueError(f"{path} is not as it was written, so nothing it says holds: {anew}")
        return manifest

    def write(self, directory: str | Path) -> None:
        """Writes it into a directory."""
        fields = {"sha256": self.sha256} | dataclasses.asdict(self)
        text = json.dumps(fields, indent=2, ensure_ascii=False)
        (Path(directory) / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def split(self, name: str) -> SplitStats:
        """The stats of a split.

        Raises:
          ValueError: there is no such split.
        """
        if name not in self.splits:
            raise ValueError(
                f"there is no split {name!r}, only {sorted(self.splits)}: name one of them, or set "
                f"--config.data.splits.{name} and prepare the data into another directory"
            )
        return self.splits[name]

    def check_files(self, directory: str | Path, *names: str, contents: bool = True) -> None:
        """Finds the files of a prepared directory as they were written.

        Args:
          directory: that this is the manifest of.
          names: of the files; none for all of them.
          contents: their hashes too, not only their sizes: a gigabyte takes about a second.

        Raises:
          ValueError: some are not; the message names them all.
        """
        found = []
        for name in names or self.files:
            path, was = Path(directory) / name, self.files[name]
            if not path.is_file():
                found.append(f"{name} is missing")
            elif (size := path.stat().st_size) != was.size:
                found.append(f"{name} has {size:,} bytes, and had {was.size:,}")
            elif contents and FileStats.of(path) != was:
                found.append(f"{name} has other contents")
        if found:
            raise ValueError(
                f"{Path(directory).absolute()} is not as it was prepared: {'; '.join(found)}. "
                f"Delete {Path(directory) / MANIFEST} and prepare the data anew, or copy it again"
            )


def records_path(directory: str | Path, split: str) -> Path:
    """The file of a split's rows."""
    return Path(directory) / f"{split}.array_record"


def text_path(directory: str | Path, split: str, side: str) -> Path:
    """The file of a split's raw text, such as `validation.en.txt`."""
    return Path(directory) / f"{split}.{side}.txt"
