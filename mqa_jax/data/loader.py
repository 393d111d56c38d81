"""Batches of a prepared directory, by random access: the position in the data is one integer.

Array letters: B rows a batch and process   S source_length   T target_length
"""

import operator
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from mqa_jax.data.manifest import RECORD, Manifest, records_path

Batch = dict[str, np.ndarray]

# Each thread makes whole batches. Two keep the slowest model's processor free and feed all but the
# smallest models on the fastest devices; eight batches ahead ride out a slow read.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def train_batches(
    directory: str | Path,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless batches of the training split, shuffled anew in every epoch.

    The stream is a function of `seed` and `batch_size` alone. From `start=n` it goes on as a stream
    from 0 does after `n` batches, and each process gets its share of the rows of the same batches,
    so a run can be resumed on another number of hosts.

    Args:
      directory: what `prepare` made.
      batch_size: rows of a batch over all processes.
      seed: of the shuffle, from 0.
      start: batches of this stream that were consumed before.
      process_index: which of the processes this one is.
      process_count: how many there are.

    Yields:
      int32 `source_tokens`, `[B, S]` and absent when `S` is 0, and `target_tokens`, `[B, T]`, where
      `B = batch_size / process_count`; the sides of `packing.to_tokens`.

    Raises:
      ValueError: there are fewer rows than `batch_size`, or they cannot be shared out evenly.
    """
    rows = _Rows(directory, "train")
    if batch_size > rows.count:
        raise ValueError(
            f"batch_size {batch_size} is more than the {rows.count} rows of {directory}: lower it, "
            "or prepare more data or shorter rows"
        )
    # As good as endless. With no number, Grain's length overflows when a batch has one row.
    epochs = 2**53 // rows.count
    indices = grain.MapDataset.range(rows.count).seed(seed).shuffle().repeat(epochs)
    return _batches(rows, indices, batch_size, start, process_index, process_count)


def eval_batches(
    directory: str | Path,
    split: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """All rows of a split, once and in order, the last batch filled up with rows of padding.

    Args and Yields: as for `train_batches`.

    Raises:
      ValueError: there is no such split, or the rows cannot be shared out evenly.
    """
    rows = _Rows(directory, split)
    indices = grain.MapDataset.range(rows.count + -rows.count % max(batch_size, 1))
    return _batches(rows, indices, batch_size, 0, process_index, process_count)


class _Rows:
    """Random access to the rows of a split, and to rows of padding behind them."""

    def __init__(self, directory: str | Path, split: str):
        manifest = Manifest.read(directory)
        path = records_path(directory, split)
        self.count = manifest.split(split).rows
        self._records = ArrayRecordDataSource(str(path))
        if len(self._records) != self.count:
            raise ValueError(
                f"{path} has {len(self._records)} records, the manifest says {self.count}: delete "
                f"{directory} and prepare the data again"
            )
        self._source_length = manifest.request["source_length"]
        self._target_length = manifest.request["target_length"]

    def batch(self, indices: np.ndarray) -> Batch:
        tokens = np.zeros((len(indices), self._source_length + self._target_length), np.int32)
        # Rows of padding come last, and one process's share of a batch can be all padding.
        if real := indices[indices < self.count].tolist():
            # In one call for all: a call for each takes twenty times as long.
            records = self._records.__getitems__(real)
            tokens[: len(real)] = np.frombuffer(b"".join(records), RECORD).reshape(len(real), -1)
        # Views would be copied as they are sent to the device, by the thread that starts the steps.
        sides = [side.copy() for side in np.split(tokens, [self._source_length], axis=1)]
        names = ("source_tokens", "target_tokens")
        return {name: side for name, side in zip(names, sides, strict=True) if side.size}


def _batches(
    rows: _Rows,
    indices: grain.MapDataset,
    batch_size: int,
    start: int,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared out among {process_count} processes: give "
            f"a positive multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not one of {process_count}, from 0")
    if start < 0:
        raise ValueError(f"start {start} is negative: give a number of consumed batches")
    # Every P-th small batch, from the p-th: with the others', it makes up the global batch.
    local = indices.batch(batch_size // process_count)[process_index::process_count]
    iterator = iter(local.map(rows.batch).to_iter_dataset(READ_OPTIONS))
    iterator.set_state({"next_index": operator.index(start)})
    return iterator
