"""Lines of text to batches at once, for text that no directory was prepared of."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mqa_jax.data.packing import Pair, pack, to_tokens
from mqa_jax.data.tokenizer import RowTokenizer

# Rows are so long, unless the model knows fewer positions, or a line has more tokens.
ROW_LENGTH = 256


def text_batches(
    tokenizer: RowTokenizer,
    sources: Sequence[str] | None,
    targets: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
    name: Callable[[int], str] = "line {}".format,
) -> list[dict[str, np.ndarray]]:
    """Batches as `mqa_jax.data.loader` makes them: all lines, packed, and padding behind them.

    Args:
      sources: of a translation, a line for each of `targets`; None for a language model.
      targets: the lines; none is blank.
      max_length: positions that the model knows.
      batch_size: rows of each batch.
      name: what errors call a line, from its number, which counts from 1.

    Raises:
      ValueError: a line has more tokens than there are positions, or within what is encoded as the
        end of a text.
    """
    pairs = list[Pair]()
    for number, target in enumerate(targets, start=1):
        source = [] if sources is None else tokenizer.encode(sources[number - 1])
        pair = source, tokenizer.encode_target(target)
        for ids in pair:
            if len(ids) > max_length:
                raise ValueError(
                    f"{name(number)} has {len(ids)} tokens, and the model knows {max_length} "
                    "positions: shorten or split it"
                )
            if tokenizer.ids.eos in ids[:-1]:
                raise ValueError(
                    f"{name(number)} has, within, what is encoded as {tokenizer.ids.eos}, the id "
                    "that ends a text: take it out"
                )
        pairs.append(pair)
    longest = max((len(ids) for pair in pairs for ids in pair), default=0)
    length = min(max(longest, ROW_LENGTH), max_length)
    lengths = 0 if sources is None else length, length
    rows = [to_tokens(row, *lengths, tokenizer.ids) for row in pack(pairs, *lengths)]
    rows += [to_tokens([], *lengths, tokenizer.ids)] * (-len(rows) % batch_size)
    return list(_batches(np.stack(rows), lengths[0], batch_size)) if rows else []


def _batches(rows: np.ndarray, source_length: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(rows), size):
        sides = np.split(rows[start : start + size], [source_length], axis=1)
        names = ("source_tokens", "target_tokens")
        yield {name: side for name, side in zip(names, sides, strict=True) if side.size}
