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
    name: Callable[[int, bool], str] = "line {}".format,
) -> list[dict[str, np.ndarray]]:
    """Batches as `mqa_jax.data.loader` makes them: all lines, packed, and padding behind them.

    Args:
      sources: of a translation, a line for each of `targets`; None for a language model.
      targets: the lines; none is blank.
      max_length: positions that the model knows.
      batch_size: rows of each batch.
      name: what errors call a line, from its number, which counts from 1, and whether it is of
        `sources`.

    Raises:
      ValueError: a line has more tokens than there are positions, or within what is encoded as the
        end of a text.
    """
    pairs, too_long = list[Pair](), list[str]()
    for number, target in enumerate(targets, start=1):
        source = [] if sources is None else tokenizer.encode(sources[number - 1])
        pair = source, tokenizer.encode_target(target)
        for ids, is_source in zip(pair, (True, False), strict=True):
            where = name(number, is_source)
            if len(ids) > max_length:
                too_long.append(f"{where} has {len(ids)} tokens")
            if tokenizer.ids.eos in ids[:-1]:
                raise ValueError(
                    f"{where} has, within, what is encoded as {tokenizer.ids.eos}, the id "
                    "that ends a text: take it out"
                )
        pairs.append(pair)
    if too_long:
        more = f" (and {len(too_long) - 1} more lines are too long)" if too_long[1:] else ""
        raise ValueError(
            f"{too_long[0]}, and the model knows {max_length} positions{more}: shorten or split "
            "what is too long"
        )
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
