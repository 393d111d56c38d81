"""Sentence pairs into rows of fixed length.

Array letters: S source_length   T target_length

A pair is `(source_ids, target_ids)`, both ending in EOS; a language model's has an empty source. A
row is a list of pairs that attend only to themselves. Unpacked text is rows of one pair each.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from mqa_jax.data import OWN_IDS, SpecialIds

Pair = tuple[Sequence[int], Sequence[int]]

# Rows open at once. More fill rows a little better, and move pairs farther from their neighbours.
OPEN_ROWS = 64


def pack(pairs: Iterable[Pair], source_length: int, target_length: int) -> Iterator[list[Pair]]:
    """Puts every pair, whole and once, into the first open row that has room for it.

    Pairs and rows are streamed, and the same pairs always give the same rows. When no row has room,
    the fullest is closed.

    Args:
      pairs: the pairs.
      source_length: tokens that a row has room for on the source side; 0 for a language model.
      target_length: likewise on the target side.

    Raises:
      ValueError: a pair is longer than a row.
    """
    rows: list[list[Pair]] = []
    room: list[tuple[int, int]] = []
    for pair in pairs:
        source, target = len(pair[0]), len(pair[1])
        if source > source_length or target > target_length:
            raise ValueError(
                f"a pair of {source} source and {target} target tokens does not fit into a row of "
                f"{source_length} and {target_length}: leave it out, or make the rows longer"
            )
        for i, (source_room, target_room) in enumerate(room):
            if source <= source_room and target <= target_room:
                rows[i].append(pair)
                room[i] = source_room - source, target_room - target
                break
        else:
            if len(rows) == OPEN_ROWS:
                # Full is the row that has least room on the side where it has least.
                fullest = min(
                    range(OPEN_ROWS),
                    key=lambda i: min(room[i]) if source_length else room[i][1],
                )
                del room[fullest]
                yield rows.pop(fullest)
            rows.append([pair])
            room.append((source_length - source, target_length - target))
    yield from rows


def to_tokens(
    row: Sequence[Pair], source_length: int, target_length: int, ids: SpecialIds = OWN_IDS
) -> np.ndarray:
    """A row as it is stored: its source tokens and its target tokens, padding behind either.

    EOS alone tells its sentences apart; `training.segments` does.

    Args:
      row: pairs; an empty row is all padding.
      source_length: `S`; 0 for a language model.
      target_length: `T`.
      ids: of EOS and of padding.

    Returns:
      int32 `[S + T]`.

    Raises:
      ValueError: the pairs are longer than the row, or a sentence does not end in its only EOS.
    """
    sides = []
    for side, length in enumerate((source_length, target_length)):
        sentences = [pair[side] for pair in row] if length else []
        tokens = list(chain.from_iterable(sentences))
        if len(tokens) > length:
            raise ValueError(
                f"{len(tokens)} {('source', 'target')[side]} tokens do not fit into a row of "
                f"{length}: pack them into longer rows"
            )
        for sentence in sentences:
            is_ended = list(sentence[-1:]) == [ids.eos] and ids.eos not in sentence[:-1]
            if not is_ended or ids.pad in sentence:
                raise ValueError(
                    f"the sentence {list(sentence)} must end in EOS ({ids.eos}), which along with "
                    f"PAD ({ids.pad}) must be nowhere else in it: encode it with `Tokenizer`"
                )
        padding = np.full(length - len(tokens), ids.pad, np.int32)
        sides.append(np.concatenate([np.array(tokens, np.int32), padding]))
    return np.concatenate(sides)
