"""What a prepared directory holds, and the `manifest.json` in it that says so.

manifest.json                       written last: a directory without it is not whole
tokenizer.model                     `mqa_jax.data.tokenizer`
<split>.array_record                one record a row: the tokens of `packing.to_tokens`, as RECORD
validation.<side>.txt, test....     raw text, one example a line, in the order of the source data
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
RECORD = "<i4"  # NumPy's name of the integers of a record


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
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
      request: all that decides the contents: fields of `config.data`, and hashes of the user's
        files.
      tokenizer_sha256: of `tokenizer.model`.
      splits: "train", "validation", perhaps "test".
    """

    request: dict[str, Any]
    tokenizer_sha256: str
    splits: dict[str, SplitStats]

    @classmethod
    def read(cls, directory: str | Path) -> "Manifest":
        """Reads the manifest of a prepared directory.

        Raises:
          ValueError: there is none.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"there is no {path}: make the data with `python -m mqa_jax.data.prepare "
                f"--config=CONFIG --config.data.dir={directory}`"
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: SplitStats(**stats) for name, stats in fields.pop("splits").items()}
        return cls(**fields, splits=splits)

    def write(self, directory: str | Path) -> None:
        """Writes it into a directory."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
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


def records_path(directory: str | Path, split: str) -> Path:
    """The file of a split's rows."""
    return Path(directory) / f"{split}.array_record"


def text_path(directory: str | Path, split: str, side: str) -> Path:
    """The file of a split's raw text, such as `validation.en.txt`."""
    return Path(directory) / f"{split}.{side}.txt"
