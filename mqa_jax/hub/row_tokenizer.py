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

WHOLE = "tokenizer.json"
# Files of a tokenizer whose words change from model to model, and no id with them.
ABOUT = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class HubRowTokenizer:
    """A `mqa_jax.data.tokenizer.RowTokenizer`, of all that a directory holds but the weights.

    Each sentence is what the model is given of a text when it decodes, and the end. What a language
    model's tokenizer puts in front of a text is in front of it in training, nothing where that is
    nothing; a translation begins with what the directory says.

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
        # Of a language model the first is `ids.bos`, which is in no row.
        self.begin_ids: tuple[int, ...] = tokenizer.begin_ids[0 if is_translation else 1 :]
        self.end_ids: tuple[int, ...] = (self.ids.eos,)
        self._target_begins = () if is_translation else self.begin_ids

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
    def ids_sha256(self) -> str:
        """Of what decides which text an id stands for: models of other sizes, and converted ones,
        have another config.json, and the same ids."""
        files = self.tokenizer.files
        # It says everything, where it is there.
        names = [name for name in (WHOLE,) if name in files] or sorted({*files} - {*ABOUT})
        digests = [f"{name} {hashlib.sha256(files[name]).hexdigest()}" for name in names]
        said = repr((self.ids, self.begin_ids, self.vocab_size))
        return hashlib.sha256("\n".join([said, *digests]).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The number of ids; the model's table may be larger."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids of a text, `begin_ids` in front, and the end."""
        return self._between(self.begin_ids, self.tokenizer.encode(text))

    def encode_target(self, text: str) -> list[int]:
        """As `encode`, of a translation's output, which begins with `ids.bos` alone."""
        return self._between(self._target_begins, self.tokenizer.encode_target(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end.

        Raises:
          ValueError: an id before it is not in the vocabulary.
        """
        kept = list(map(int, ids))
        if self.ids.eos in kept:
            kept = kept[: kept.index(self.ids.eos)]
        return self.tokenizer.decode(kept)

    def _between(self, begin_ids: tuple[int, ...], ids: list[int]) -> list[int]:
        begins, ends = len(self.tokenizer.begin_ids), len(self.tokenizer.end_ids)
        return [*begin_ids, *ids[begins : len(ids) - ends], self.ids.eos]


def _special_ids(generation: Generation, tokenizer: Tokenizer, is_translation: bool) -> SpecialIds:
    if not (ends := generation.eos_ids or tokenizer.end_ids):
        raise ValueError(
            f"neither {GENERATION} nor {CONFIG} has an eos_token_id, and the tokenizer ends no "
            "text: set it, since text is trained on sentence by sentence"
        )
    bos = tokenizer.begin_ids[0] if tokenizer.begin_ids else None
    if is_translation:
        bos = ends[0] if generation.decoder_start_id is None else generation.decoder_start_id
    return SpecialIds(pad=-1, bos=bos, eos=ends[0])
