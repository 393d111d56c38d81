"""Sentence pairs into rows of fixed length, and rows into arrays.

Array letters: S source_length   T target_length

A pair is `(source_ids, target_ids)`, both ending in EOS; a language model's has an empty source. A
row is a list of pairs that attend only to themselves. Unpacked text is rows of one pair each.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mqa_jax.data.tokenizer import BOS_ID, PAD_ID

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


def to_arrays(row: Sequence[Pair], source_length: int, target_length: int) -> dict[str, np.ndarray]:
    """A row as int32 arrays; an empty row is all padding.

    Segment ids count from 1 and are 0 where there is padding, positions count from 0 in each
    segment, and `target_inputs` is BOS and then `targets` one place later, in each segment anew.

    Args:
      row: the pairs.
      source_length: `S`; 0 for a language model.
      target_length: `T`.

    Returns:
      `source_tokens`, `source_segment_ids`, `source_positions`, each `[S]` and absent when `S` is
      0; `target_inputs`, `targets`, `target_segment_ids`, `target_positions`, each `[T]`.

    Raises:
      ValueError: the pairs are longer than the row.
    """
    arrays = {}
    sources, targets = [pair[0] for pair in row], [pair[1] for pair in row]
    source_tokens, segment_ids, positions = _segments("source", sources, source_length)
    if source_length:
        arrays["source_tokens"] = source_tokens
        arrays["source_segment_ids"] = segment_ids
        arrays["source_positions"] = positions
    target_tokens, segment_ids, positions = _segments("target", targets, target_length)
    inputs = np.where(positions == 0, BOS_ID, np.roll(target_tokens, 1))
    arrays["target_inputs"] = np.where(segment_ids == 0, PAD_ID, inputs).astype(np.int32)
    arrays["targets"] = target_tokens
    arrays["target_segment_ids"] = segment_ids
    arrays["target_positions"] = positions
    return arrays


def _segments(
    side: str, sentences: Sequence[Sequence[int]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segment ids and positions, each `[length]`."""
    if (total := sum(map(len, sentences))) > length:
        raise ValueError(
            f"a row of {total} {side} tokens was packed for longer rows than {length}: prepare the "
            "data again"
        )
    tokens = np.full(length, PAD_ID, np.int32)
    segment_ids, positions = np.zeros((2, length), np.int32)
    start = 0
    for segment, sentence in enumerate(sentences, start=1):
        end = start + len(sentence)
        tokens[start:end] = sentence
        segment_ids[start:end] = segment
        positions[start:end] = np.arange(len(sentence))
        start = end
    return tokens, segment_ids, positions
