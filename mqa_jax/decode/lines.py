"""From lines of text to what is decoded for each."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from flax import nnx
from jax import Array

from mqa_jax.decode.generate import Generator, Model
from mqa_jax.decode.search import Decoded


class Tokenizer(Protocol):
    """What this file asks of a tokenizer; `mqa_jax.data.tokenizer.Tokenizer` is one."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class LineDecoder(Generator):
    """A `Generator` from lines of text; `tokenizer` turns them into ids, all else is the same."""

    def __init__(self, model: Model, tokenizer: Tokenizer, **options):
        super().__init__(model, **options)
        self._tokenizer = tokenizer

    def __call__(
        self, params: nnx.State, lines: Sequence[str], keys: Array | None = None
    ) -> Iterator[tuple[int, Decoded]]:
        """As `Generator`, of lines; an error counts them from 1."""
        prompts = map(self._tokenizer.encode, lines)
        if not self._is_translation:
            # A sentence to be continued begins, and does not end.
            prompts = ([self._bos_id, *ids[:-1]] for ids in prompts)
        return super().__call__(params, list(prompts), keys, name="line {}".format)
