"""The tokenizers of the hub: text to ids, by each one's own rules, and back.

Their files are made by anyone: a broken one is a ValueError that names it.
"""

import abc
import contextlib
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from mqa_jax.hub.files import json_object

# What a tokenizer may consist of; `save` copies what there is of it.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "merges.txt",
)

# A language code in front of a text, which is one token of Marian's.
_LANGUAGE = re.compile(r">>[^<>\s]+<<")
_SENTINEL = re.compile(r"(<extra_id_\d{1,5}>)")  # There are 10,000 at most.


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      files: what it was read from, by name, as `save` writes it again.
      begin_ids: what `encode` puts in front of every text.
      end_ids: what `encode` puts behind it.
    """

    files: Mapping[str, bytes]
    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """The number of ids, from 0; a model's table may be larger, padded to a round number."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    def _encode_target(self, text: str) -> list[int]:
        return self._encode(text)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @property
    def sha256(self) -> str:
        """Of all files together."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with `begin_ids` in front and `end_ids` behind.

        Raises:
          ValueError: half of a surrogate pair, which is no text.
        """
        return [*self.begin_ids, *self._encode(_checked(text)), *self.end_ids]

    def encode_target(self, text: str) -> list[int]:
        """As `encode`, of what comes out of a translation, which may be in another language."""
        return [*self.begin_ids, *self._encode_target(_checked(text)), *self.end_ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; those that stand for no text (begin, end, padding) are left out.

        Raises:
          ValueError: an id that is not in the vocabulary.
        """
        ids = [int(id) for id in ids]
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(
                    f"id {id} is not in the vocabulary, 0 to {self.vocab_size - 1}: it was made "
                    "with another tokenizer, or is of the padding of the model's table"
                )
        return self._decode(ids)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r:.60} is no text: {error}") from None
    return text


class FastTokenizer(Tokenizer):
    """One of the `tokenizers` library, which `tokenizer.json` says everything of."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, files: Mapping[str, bytes]):
        self._tokenizer, self.files = tokenizer, files
        # They are about batches, which are made elsewhere.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.begin_ids, self.end_ids = self._around()

    @functools.cached_property
    def vocab_size(self) -> int:  # The library makes a dict to tell.
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is put in front of a text, and behind it."""
        for text in self._texts():
            try:
                whole = self._tokenizer.encode(text)
            except Exception:  # It has no id for a letter, nor one for what is unknown.
                continue
            # An id that is put there may be one of text, too: what an unknown letter has, say.
            added = whole.special_tokens_mask
            if of_text := [i for i, is_added in enumerate(added) if not is_added]:
                return tuple(whole.ids[: of_text[0]]), tuple(whole.ids[of_text[-1] + 1 :])
        raise ValueError("no text has an id")

    def _texts(self) -> Iterator[str]:
        """Of which one has ids; nearly always the first, since the others take long to list."""
        yield "a"
        for id in self._tokenizer.get_vocab().values():
            yield self._tokenizer.decode([id])

    def _encode(self, text: str) -> list[int]:
        with _told(f"the tokenizer fails at the text {text!r:.60}"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        with _told(f"the tokenizer fails at the ids {str(ids):.60}"):
            return self._tokenizer.decode(ids, skip_special_tokens=True)


class PieceTokenizer(Tokenizer):
    """A SentencePiece model, whose ids are the model's."""

    def __init__(
        self,
        model: sentencepiece.SentencePieceProcessor,
        files: Mapping[str, bytes],
        *,
        has_begin: bool,
        has_end: bool,
        sentinels: int = 0,
    ):
        """Args:
        has_begin: whether a text begins with the model's id for that.
        has_end: likewise at its end.
        sentinels: ids behind the model's, `<extra_id_0>` being the last.
        """
        self._model, self.files, self._sentinels = model, files, sentinels
        self.begin_ids = (model.bos_id(),) if has_begin and model.bos_id() >= 0 else ()
        self.end_ids = (model.eos_id(),) if has_end and model.eos_id() >= 0 else ()

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size() + self._sentinels

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _SENTINEL.split(text) if self._sentinels else [text]:
            number = int(part[10:-1]) if _SENTINEL.fullmatch(part) else self._sentinels
            if number < self._sentinels:
                ids.append(self.vocab_size - 1 - number)
            elif part:
                ids += self._model.encode(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        # SentencePiece gives its control ids no text; the sentinels are not its own.
        return self._model.decode([id for id in ids if id < self._model.vocab_size()])


class MarianTokenizer(Tokenizer):
    """Marian's: pieces of a text's language, and ids of a vocabulary that both languages share."""

    def __init__(
        self,
        source: sentencepiece.SentencePieceProcessor,
        target: sentencepiece.SentencePieceProcessor,
        vocabulary: Mapping[str, int],
        files: Mapping[str, bytes],
    ):
        self._source, self._target, self._ids, self.files = source, target, vocabulary, files
        self._pieces = {id: piece for piece, id in vocabulary.items()}
        self._unknown = vocabulary["<unk>"]
        self._silent = {vocabulary.get(piece) for piece in ("<unk>", "<pad>", "</s>")}
        self.end_ids = (vocabulary["</s>"],)

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._pieces) + 1

    def _encode_target(self, text: str) -> list[int]:
        return self._ids_of(self._target.encode(text, out_type=str))

    def _encode(self, text: str) -> list[int]:
        ids = []
        code = _LANGUAGE.match(text)
        if code and code[0] in self._ids:
            ids, text = [self._ids[code[0]]], text[code.end() :]
        return ids + self._ids_of(self._source.encode(text, out_type=str))

    def _ids_of(self, pieces: list[str]) -> list[int]:
        return [self._ids.get(piece, self._unknown) for piece in pieces]

    def _decode(self, ids: list[int]) -> str:
        return self._target.decode(
            [self._pieces[id] for id in ids if id in self._pieces and id not in self._silent]
        )


def load_tokenizer(directory: Path, model_type: str) -> Tokenizer | None:
    """The tokenizer of a directory; None where it has none, or one of files that say too little.

    Args:
      model_type: of its `config.json`.

    Raises:
      ValueError: a file is broken; the message names it.
    """
    paths = [directory / name for name in FILES if (directory / name).is_file()]
    files = {path.name: path.read_bytes() for path in paths}
    path = directory / "tokenizer_config.json"
    options = json_object(path) if path.is_file() else {}
    if model_type == "marian":
        if {"source.spm", "target.spm", "vocab.json"} <= files.keys():
            return _marian(directory, files)
    elif "tokenizer.json" in files:
        path = directory / "tokenizer.json"
        return _fast(path, lambda: tokenizers.Tokenizer.from_buffer(files[path.name]), files)
    elif "spiece.model" in files:
        sentinels = options.get("extra_ids", 100)
        if type(sentinels) is not int or not 0 <= sentinels <= 10_000:
            raise ValueError(f"{path}: extra_ids is {sentinels!r}, not a number up to 10000")
        model = _pieces(directory / "spiece.model")
        return PieceTokenizer(model, files, has_begin=False, has_end=True, sentinels=sentinels)
    elif "tokenizer.model" in files:
        return PieceTokenizer(
            _pieces(directory / "tokenizer.model"),
            files,
            has_begin=options.get("add_bos_token", True) is not False,
            has_end=options.get("add_eos_token", False) is True,
        )
    elif model_type == "gpt2" and {"vocab.json", "merges.txt"} <= files.keys():
        return _fast(directory / "merges.txt", lambda: _byte_level(directory), files)
    return None


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """What the library raises is a ValueError of `what`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # It raises no narrower ones; a panic is no Exception.
        raise ValueError(f"{what}: {error}") from error


def _fast(path: Path, read: Any, files: Mapping[str, bytes]) -> FastTokenizer:
    with _told(f"{path} is no tokenizer that can be read"):
        return FastTokenizer(read(), files)


def _byte_level(directory: Path) -> tokenizers.Tokenizer:
    """GPT-2's own, of its two files."""
    files = [str(directory / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    content = path.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        if content and model.vocab_size() > 0:
            return model
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    raise ValueError(f"{path} is no SentencePiece model: it has no pieces")


def _marian(directory: Path, files: Mapping[str, bytes]) -> MarianTokenizer:
    path = directory / "vocab.json"
    vocabulary = json_object(path)
    ids = vocabulary.values()
    if not all(type(id) is int and id >= 0 for id in ids) or len({*ids}) < len(vocabulary):
        raise ValueError(f"{path} is no vocabulary, an id for each piece: {vocabulary!r:.60}")
    if lacking := {"<unk>", "</s>"} - vocabulary.keys():
        raise ValueError(f"{path} is no vocabulary of Marian's: it lacks {sorted(lacking)}")
    source, target = (_pieces(directory / f"{side}.spm") for side in ("source", "target"))
    return MarianTokenizer(source, target, vocabulary, files)
