"""Text to token ids and back, without loss: SentencePiece, its ids 0 to 3 fixed.

Rows of text may be made with another tokenizer, that of a model they train; `RowTokenizer` is what
is asked of it.
"""

import hashlib
import io
import logging
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece

from mqa_jax.data import BOS_ID, EOS_ID, OWN_IDS, PAD_ID, UNK_ID, SpecialIds
from mqa_jax.data.manifest import TOKENIZER

# The longest piece: SentencePiece's own limit.
MAX_PIECE_CHARACTERS = 16

# Beyond this the pieces hardly change, and training takes much memory and time.
MAX_TRAINING_SENTENCES = 2_000_000


class RowTokenizer(Protocol):
    """A tokenizer that rows of text can be made with: it says what begins, ends and fills them.

    Attributes:
      ids: those that stand for no text.
      begin_ids: what `encode` puts in front of every text; `ids.bos` is not among them.
      end_ids: what it puts behind it, `ids.eos`.
      file_name: of the one file that holds it.
      content: of that file.
      sha256: of `content`, in hexadecimal digits.
      ids_sha256: of what decides which text an id stands for, and that alone.
      max_characters: of a token; infinite where it is not known.
    """

    ids: SpecialIds
    begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    file_name: str
    content: bytes
    sha256: str
    max_characters: float

    @property
    def ids_sha256(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_target(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Tokenizer:
    """A SentencePiece unigram model that keeps every character.

    Characters it did not learn become their UTF-8 bytes, and neither letters nor spaces are
    normalized, so `decode(encode(text)) == text`. The one exception is U+2581 (a low block), which
    is SentencePiece's own mark for a space and comes back as one.
    """

    def __init__(self, model: bytes):
        """Args:
          model: a serialized SentencePiece model, as `train` writes it.

        Raises:
          ValueError: it is none, or not one with the ids of `mqa_jax.data`.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{len(model)} bytes that are no SentencePiece model") from error
        ids = (
            self._model.pad_id(),
            self._model.bos_id(),
            self._model.eos_id(),
            self._model.unk_id(),
        )
        if ids != (PAD_ID, BOS_ID, EOS_ID, UNK_ID):
            raise ValueError(
                f"the model's ids of pad, bos, eos and unk are {ids}, not "
                f"{(PAD_ID, BOS_ID, EOS_ID, UNK_ID)}: use one that Tokenizer.train made"
            )
        self.content, self.sha256 = model, hashlib.sha256(model).hexdigest()

    @classmethod
    def train(cls, sentences: Iterable[str], path: str | Path, vocab_size: int) -> "Tokenizer":
        """Trains a tokenizer and writes it to the file `path`.

        The same sentences give the same file, byte for byte. Of more than
        `MAX_TRAINING_SENTENCES` a random sample of that many is used, and a warning says so.

        Args:
          sentences: read once.
          path: where to write the model.
          vocab_size: the number of ids, exactly.

        Raises:
          ValueError: there are no sentences, or too few for that many ids, or the alphabet alone
            takes more ids.
        """
        sample = _sample(sentences, MAX_TRAINING_SENTENCES)
        longest = max((len(sentence.encode()) for sentence in sample), default=0)
        if not longest:
            raise ValueError("there is no text to train a tokenizer on: all sentences are empty")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="unigram",
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                pad_id=PAD_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                # Longer sentences would be left out without a word.
                max_sentence_length=max(longest + 1, 10),  # the least that it takes
                # The sums of its threads are added in their order, so their number is fixed.
                num_threads=16,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explained(error, vocab_size) from error
        Path(path).write_bytes(model.getvalue())
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads what `train` wrote.

        Raises:
          ValueError: there is no such file, or it is no model of this kind.
        """
        if not os.path.isfile(path):
            raise ValueError(f"there is no tokenizer at {path}: prepare the data first")
        try:
            return cls(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # As `RowTokenizer` has them.
    ids = OWN_IDS
    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = (EOS_ID,)
    file_name = TOKENIZER
    max_characters: float = MAX_PIECE_CHARACTERS

    @property
    def ids_sha256(self) -> str:
        """Of what decides which text an id stands for: all of it."""
        return self.sha256

    @property
    def vocab_size(self) -> int:
        """The number of ids; they are 0 to `vocab_size - 1`."""
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no BOS in front, EOS at the end."""
        return [*self._model.encode(text), EOS_ID]

    def sample(self, text: str, alpha: float) -> list[int]:
        """As `encode`, cut into pieces that are drawn (subword regularization, Kudo 2018).

        Args:
          alpha: what probabilities are raised to: the lower, the more all ways are alike.
        """
        drawn = self._model.encode(text, enable_sampling=True, nbest_size=-1, alpha=alpha)
        return [*drawn, EOS_ID]

    def encode_target(self, text: str) -> list[int]:
        """As `encode`: both languages have one vocabulary."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first EOS, padding and BOS left out.

        Raises:
          ValueError: an id before EOS is not in the vocabulary.
        """
        kept = []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"id {token} is not in the vocabulary, 0 to {self.vocab_size - 1}: it was made "
                    "with another tokenizer"
                )
            if token == EOS_ID:
                break
            kept.append(token)
        # SentencePiece gives its control ids, padding and BOS among them, no text.
        return self._model.decode(kept)


def _sample(sentences: Iterable[str], size: int) -> list[str]:
    """All of the sentences, or `size` of them drawn evenly, always the same."""
    rng = random.Random(0)
    sample: list[str] = []
    seen = 0
    for seen, sentence in enumerate(sentences, start=1):
        if len(sample) < size:
            sample.append(sentence)
        elif (slot := int(rng.random() * seen)) < size:
            sample[slot] = sentence
    if seen > size:
        logging.getLogger(__name__).warning(
            "the tokenizer is trained on a sample: %d of %d sentences", size, seen
        )
    return sample


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    message = str(error)
    model = "; --config.model.vocab_size too, where a config does not tie it to this one"
    if match := re.search(r"set it to a value <= (\d+)", message):
        return ValueError(
            f"vocab_size {vocab_size} is more than this text has pieces for, {match[1]} at most: "
            f"set --config.data.vocab_size={match[1]} or lower, or give more text{model}"
        )
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return ValueError(
            f"vocab_size {vocab_size} is less than bytes and alphabet take, {match[1]}: set "
            f"--config.data.vocab_size={match[1]} or higher{model}"
        )
    return error
