"""Batches of a prepared directory, by random access: the position in the data is one integer.

Array letters: B rows a batch and process   S source_length   T target_length
"""

from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from mqa_jax.core.checks import check_integer
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
    manifest: Manifest | None = None,
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
      manifest: of the data that the caller began with; None for what the directory says now.

    Yields:
      int32 `source_tokens`, `[B, S]` and absent when `S` is 0, and `target_tokens`, `[B, T]`, where
      `B = batch_size / process_count`; the sides of `packing.to_tokens`.

    Raises:
      ValueError: there are fewer rows than `batch_size`, or they cannot be shared out evenly; the
        directory holds other data than it did; or, from the iterator too, a record is damaged.
    """
    batch_size, local = _local_batch_size(batch_size, process_index, process_count)
    seed = check_integer("seed", seed, least=0)
    start = check_integer("start", start, least=0)
    rows = _Rows(directory, "train", manifest)
    if batch_size > rows.count:
        raise ValueError(
            f"batch_size {batch_size} is more than the {rows.count} rows of {directory}: lower it, "
            "or prepare more data or shorter rows"
        )
    # As good as endless. With no number, Grain's length overflows when a batch has one row.
    epochs = 2**53 // rows.count
    indices = grain.MapDataset.range(rows.count).seed(seed).shuffle().repeat(epochs)
    batches = _batches(rows, indices, local, process_index, process_count)
    batches.set_state({"next_index": start})
    return batches


def eval_batches(
    directory: str | Path,
    split: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    manifest: Manifest | None = None,
) -> Iterator[Batch]:
    """All rows of a split, once and in order, the last batch filled up with rows of padding.

    Args and Yields: as for `train_batches`.

    Raises:
      ValueError: there is no such split, or the rows cannot be shared out evenly; the directory
        holds other data than it did; or, from the iterator too, a record is damaged.
    """
    batch_size, local = _local_batch_size(batch_size, process_index, process_count)
    rows = _Rows(directory, split, manifest)
    indices = grain.MapDataset.range(rows.count + -rows.count % batch_size)
    return _batches(rows, indices, local, process_index, process_count)


class _Rows:
    """Random access to the rows of a split, and to rows of padding behind them."""

    def __init__(self, directory: str | Path, split: str, began_with: Manifest | None):
        manifest = Manifest.read(directory)
        if began_with and manifest != began_with:
            raise ValueError(
                f"{Path(directory).absolute()} holds other data than this run began with: it was "
                "prepared anew meanwhile; start again, or prepare the data as it was"
            )
        self.count = manifest.split(split).rows
        self._path = records_path(directory, split)
        manifest.check_files(directory, self._path.name, contents=False)
        try:
            self._records = ArrayRecordDataSource(str(self._path))
            # Opens it: from here on the file is the same one, even if another takes its name.
            self._records.__getitems__([0])
        except RuntimeError as error:
            raise self._damaged(f"no records that can be read ({error})") from error
        if len(self._records) != self.count:
            raise self._damaged(f"{len(self._records)} records, and the manifest says {self.count}")
        self._source_length = manifest.request["source_length"]
        self._target_length = manifest.request["target_length"]
        self._vocab_size = manifest.request["vocab_size"]
        self._pad = manifest.ids.pad

    def batch(self, indices: np.ndarray) -> Batch:
        length = self._source_length + self._target_length
        tokens = np.full((len(indices), length), self._pad, np.int32)
        # Rows of padding come last, and one process's share of a batch can be all padding.
        if real := indices[indices < self.count].tolist():
            tokens[: len(real)] = self._read(real)
        # Views would be copied as they are sent to the device, by the thread that starts the steps.
        sides = [side.copy() for side in np.split(tokens, [self._source_length], axis=1)]
        names = ("source_tokens", "target_tokens")
        return {name: side for name, side in zip(names, sides, strict=True) if side.size}

    def _read(self, indices: list[int]) -> np.ndarray:
        length = self._source_length + self._target_length
        try:
            # In one call for all: a call for each takes twenty times as long.
            records = self._records.__getitems__(indices)
            tokens = np.frombuffer(b"".join(records), RECORD).reshape(len(indices), length)
            # As one comparison: negative ids are the largest of the unsigned.
            if ((tokens.view("<u4") < self._vocab_size) | (tokens == self._pad)).all():
                return tokens
            reason = f"ids that are not in the vocabulary, 0 to {self._vocab_size - 1}"
        except (RuntimeError, ValueError) as error:
            reason = str(error)
        if len(indices) > 1:
            # One by one, to say which it is.
            return np.concatenate([self._read([index]) for index in indices])
        raise self._damaged(f"a damaged record, {indices[0]} ({reason})")

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self._path.absolute()} has {what}: delete the manifest.json beside it and prepare "
            "the data anew, or copy it again"
        )


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """The rows of a batch, over all processes and of one."""
    count = check_integer("process_count", process_count)
    check_integer("process_index", process_index, least=0, most=count - 1)
    batch_size = check_integer("batch_size", batch_size)
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared out among {count} processes: give a "
            f"multiple of {count}"
        )
    return batch_size, batch_size // count


def _batches(
    rows: _Rows,
    indices: grain.MapDataset,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> grain.DatasetIterator:
    # Every P-th small batch, from the p-th: with the others', it makes up the global batch.
    local = indices.batch(batch_size)[process_index::process_count]
    return iter(local.map(rows.batch).to_iter_dataset(READ_OPTIONS))
