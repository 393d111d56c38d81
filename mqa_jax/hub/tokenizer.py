"""The tokenizers of the hub: text to ids, by each one's own rules, and back.

Their files are made by anyone: a broken one is a ValueError that names it.
"""

import abc
import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    "chat_template.jinja",
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

# An id, None for the next that is free, and how the text is told from what is around it.
_Added = tuple[int | None, tokenizers.AddedToken]
_KINDS = ("single_word", "lstrip", "rstrip", "normalized", "special")


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
    """A SentencePiece model, whose ids are the model's, and tokens beside it."""

    def __init__(
        self,
        model: sentencepiece.SentencePieceProcessor,
        files: Mapping[str, bytes],
        added: Mapping[str, _Added],
        *,
        has_begin: bool,
        has_end: bool,
        sentinels: int = 0,
    ):
        """Args:
        added: tokens that are looked for in a text before it is taken to pieces.
        has_begin: whether a text begins with the model's id for that.
        has_end: likewise at its end.
        sentinels: ids behind the model's, `<extra_id_0>` being the last.
        """
        self._model, self.files = model, files
        size = model.vocab_size()
        # Its own that are of no text, `</s>` say, are no pieces of one either.
        self._added = {
            model.id_to_piece(id): id
            for id in range(size)
            if model.is_control(id) or model.is_unknown(id)
        }
        self._added |= {f"<extra_id_{i}>": size + sentinels - 1 - i for i in range(sentinels)}
        self._shown: dict[int, str] = {}
        around = dict.fromkeys(self._added, ("", ""))
        for text, (number, token) in added.items():
            self._added[text] = self._added.get(text, self.vocab_size) if number is None else number
            around[text] = (r"\s*" * token.lstrip, r"\s*" * token.rstrip)
            if not token.special:
                self._shown[self._added[text]] = text
        longest_first = sorted(self._added, key=len, reverse=True)
        pattern = "|".join(around[t][0] + re.escape(t) + around[t][1] for t in longest_first)
        self._of_added = re.compile(f"({pattern})") if pattern else None
        self.begin_ids = (model.bos_id(),) if has_begin and model.bos_id() >= 0 else ()
        self.end_ids = (model.eos_id(),) if has_end and model.eos_id() >= 0 else ()

    @property
    def vocab_size(self) -> int:
        return max([self._model.vocab_size() - 1, *self._added.values()]) + 1

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        # Every other part is of a token that was added.
        for i, part in enumerate(self._of_added.split(text) if self._of_added else [text]):
            if i % 2:
                ids.append(self._added[part if part in self._added else part.strip()])
            elif part:
                ids += self._model.encode(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        # SentencePiece gives its control ids no text; those that were added are not its own.
        text, part = "", list[int]()
        for id in [*ids, None]:
            if id is not None and id < self._model.vocab_size() and id not in self._shown:
                part.append(id)
            elif id is None or id in self._shown:
                # In front of a text it leaves a space out, which within one it does not.
                inner = bool(text) and bool(part) and self._model.id_to_piece(part[0])[:1] == "▁"
                text += " " * inner + self._model.decode(part)
                text += "" if id is None else self._shown[id]
                part = []
        return text


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
    added = _added_tokens(directory, options)
    if model_type == "marian":
        if {"source.spm", "target.spm", "vocab.json"} <= files.keys():
            return _marian(directory, files)
    elif "tokenizer.json" in files:
        path = directory / "tokenizer.json"
        read = functools.partial(tokenizers.Tokenizer.from_buffer, files[path.name])
        return _fast(path, read, options, added, files)
    elif "spiece.model" in files:
        sentinels = options.get("extra_ids", 100)
        if type(sentinels) is not int or not 0 <= sentinels <= 10_000:
            raise ValueError(f"{path}: extra_ids is {sentinels!r}, not a number up to 10000")
        model = _pieces(directory / "spiece.model")
        return PieceTokenizer(
            model, files, added, has_begin=False, has_end=True, sentinels=sentinels
        )
    elif "tokenizer.model" in files:
        return PieceTokenizer(
            _pieces(directory / "tokenizer.model"),
            files,
            added,
            has_begin=options.get("add_bos_token", True) is not False,
            has_end=options.get("add_eos_token", False) is True,
        )
    elif model_type == "gpt2" and {"vocab.json", "merges.txt"} <= files.keys():
        read = functools.partial(_byte_level, directory, options)
        return _fast(directory / "merges.txt", read, options, added, files)
    return None


def _added_tokens(directory: Path, options: Mapping[str, Any]) -> dict[str, _Added]:
    """Tokens that stand beside the vocabulary, by their texts, as transformers finds them: in
    `tokenizer_config.json`, or of old directories in `added_tokens.json`.

    Raises:
      ValueError: something in there is no token.
    """
    path, found = directory / "tokenizer_config.json", dict[str, _Added]()
    extra = options.get("extra_special_tokens") or options.get("additional_special_tokens") or []
    extra = [_text(token) for token in extra] if isinstance(extra, list) else []
    if isinstance(by_id := options.get("added_tokens_decoder"), dict):
        for id, fields in by_id.items():
            text = _text(fields) if isinstance(fields, dict) and id.isdecimal() else None
            if not text:
                raise ValueError(
                    f"{path}: added_tokens_decoder has {fields!r:.60} at {id!r:.20}: it is no token"
                )
            kind = {name: fields[name] is True for name in _KINDS if name in fields}
            found[text] = int(id), tokenizers.AddedToken(text, **kind)
    elif (path := directory / "added_tokens.json").is_file():
        own = directory / "special_tokens_map.json"
        named = {**options, **(json_object(own) if own.is_file() else {})}
        special = {_text(named[key]) for key in named if key.endswith("_token")} | {*extra}
        for text, id in json_object(path).items():
            if type(id) is not int or id < 0 or not text:
                raise ValueError(f"{path}: the id of {text!r:.60} is {id!r:.20}: it is none")
            kind = dict(normalized=text not in special, special=text in special)
            found[text] = id, tokenizers.AddedToken(text, **kind)
    for text in filter(None, extra):
        token = tokenizers.AddedToken(text, normalized=False, special=True)
        found.setdefault(text, (None, token))
    return found


def _text(token: Any) -> str | None:
    """Of a token as the files have it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """What the library raises is a ValueError of `what`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # It raises no narrower ones; a panic is no Exception.
        raise ValueError(f"{what}: {error}") from error


def _fast(
    path: Path,
    read: Callable[[], tokenizers.Tokenizer],
    options: Mapping[str, Any],
    added: Mapping[str, _Added],
    files: Mapping[str, bytes],
) -> FastTokenizer:
    with _told(f"{path} is no tokenizer that can be read"):
        tokenizer = read()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        new = [token for text, (_, token) in _by_id(added) if text not in known]
        for token in new:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        # transformers' GPT-2 alone takes it from there.
        is_gpt2 = str(options.get("tokenizer_class")).startswith("GPT2Tokenizer")
        has_space, splits = options.get("add_prefix_space"), tokenizer.pre_tokenizer
        is_bytes = isinstance(splits, tokenizers.pre_tokenizers.ByteLevel)
        if is_gpt2 and is_bytes and isinstance(has_space, bool):
            splits.add_prefix_space = has_space
            tokenizer.pre_tokenizer = splits
        for text, (id, _) in added.items():
            if id is not None and tokenizer.token_to_id(text) != id:
                raise ValueError(
                    f"{text!r:.60} is said to have the id {id} in another file, and has "
                    f"{tokenizer.token_to_id(text)}"
                )
        return FastTokenizer(tokenizer, files)


def _by_id(added: Mapping[str, _Added]) -> list[tuple[str, _Added]]:
    """Those without an id behind the others."""
    return sorted(added.items(), key=lambda item: (item[1][0] is None, item[1][0] or 0))


def _byte_level(directory: Path, options: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's own, of its two files."""
    files = [str(directory / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    bos = _text(options.get("bos_token", "<|endoftext|>"))
    if options.get("add_bos_token") is True and bos and tokenizer.token_to_id(bos) is not None:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
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
