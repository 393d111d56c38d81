"""The tokenizer of a model of the hub, for text that the model is trained on further."""

import hashlib
import io
import math
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from mqa_jax.data import SpecialIds
from mqa_jax.data.manifest import HUB_TOKENIZER
from mqa_jax.hub.families import read_options
from mqa_jax.hub.files import CONFIG, GENERATION, Directory
from mqa_jax.hub.generation import Generation, read_generation
from mqa_jax.hub.tokenizer import FILES, Tokenizer, load_tokenizer


class HubRowTokenizer:
    """A `mqa_jax.data.tokenizer.RowTokenizer`, of all that a directory holds but the weights.

    Each sentence is its text's ids and the end behind them, whatever a tokenizer puts around a
    text by itself; what a target begins with is in front of a language model's too.

    Args:
      content: of a zip file, with the names and the contents of the directory's files.

    Attributes:
      tokenizer: as the directory has it.
      generation: how its authors mean the model to be decoded.
      family: its `model_type`.
      Others: as `RowTokenizer` has them.

    Raises:
      ValueError: it is none, or of a directory without a tokenizer, or without an id that ends a
        text.
    """

    begin_ids: tuple[int, ...] = ()
    file_name = HUB_TOKENIZER
    max_characters: float = math.inf

    def __init__(self, content: bytes):
        self.content, self.sha256 = content, hashlib.sha256(content).hexdigest()
        with tempfile.TemporaryDirectory() as name:
            try:
                zipfile.ZipFile(io.BytesIO(content)).extractall(name)
            except Exception as error:  # Of zipfile, zlib and the decoders of names.
                raise ValueError(f"{len(content)} bytes that are no zip file: {error}") from None
            try:
                files = Directory(name)
                family, options = read_options(files.config, CONFIG)
                is_translation = family.task == "translation"
                self.family = family.model_type
                self.generation = read_generation(files, options["vocab_size"], is_translation)
                tokenizer = load_tokenizer(files.path, family.model_type)
            except ValueError as error:
                raise ValueError(str(error).replace(f"{name}/", "")) from error
        if tokenizer is None:
            raise ValueError("there is no tokenizer that can be read")
        self.tokenizer: Tokenizer = tokenizer
        self.ids = _special_ids(self.generation, tokenizer, is_translation)
        self.end_ids: tuple[int, ...] = (self.ids.eos,)

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> "HubRowTokenizer":
        """That of a directory of the hub.

        Raises:
          ValueError: there is none; the message names the directory.
        """
        path, packed = Path(directory), io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name in sorted((CONFIG, GENERATION, *FILES)):
                if (path / name).is_file():
                    # Without a time, so that the same files are the same bytes.
                    archive.writestr(zipfile.ZipInfo(name), (path / name).read_bytes())
        return cls._named(packed.getvalue(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HubRowTokenizer":
        """Reads a file that holds one.

        Raises:
          ValueError: it does not; the message names the file.
        """
        return cls._named(Path(path).read_bytes(), Path(path))

    @classmethod
    def _named(cls, content: bytes, path: Path) -> "HubRowTokenizer":
        try:
            return cls(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """The number of ids; the model's table may be larger."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids of a text, and the end."""
        return self._ended(self.tokenizer.encode(text))

    def encode_target(self, text: str) -> list[int]:
        """As `encode`, of a translation's output."""
        return self._ended(self.tokenizer.encode_target(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end.

        Raises:
          ValueError: an id before it is not in the vocabulary.
        """
        kept = list(map(int, ids))
        if self.ids.eos in kept:
            kept = kept[: kept.index(self.ids.eos)]
        return self.tokenizer.decode(kept)

    def _ended(self, ids: list[int]) -> list[int]:
        begins, ends = len(self.tokenizer.begin_ids), len(self.tokenizer.end_ids)
        return [*ids[begins : len(ids) - ends], self.ids.eos]


def _special_ids(generation: Generation, tokenizer: Tokenizer, is_translation: bool) -> SpecialIds:
    if not (ends := generation.eos_ids or tokenizer.end_ids):
        raise ValueError(
            f"neither {GENERATION} nor {CONFIG} has an eos_token_id, and the tokenizer ends no "
            "text: set it, since text is trained on sentence by sentence"
        )
    bos = generation.decoder_start_id if is_translation else generation.bos_id
    if bos is None:
        bos = tokenizer.begin_ids[-1] if tokenizer.begin_ids else ends[0]
    return SpecialIds(pad=-1, bos=bos, eos=ends[0])
