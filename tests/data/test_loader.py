import dataclasses
from itertools import islice

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mqa_jax.data.loader import eval_batches, train_batches
from mqa_jax.data.manifest import FileStats, Manifest
from mqa_jax.data.prepare import prepare
from mqa_jax.data.text import read_lines
from mqa_jax.data.tokenizer import Tokenizer

BATCH = 6


@pytest.fixture
def directory(config):
    return prepare(config)


def take(count, *arguments, **options):
    return list(islice(train_batches(*arguments, **options), count))


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def row_keys(batches):
    """What tells rows from each other."""
    return [row.tobytes() for batch in batches for row in batch["target_tokens"]]


def test_shapes_and_names(directory):
    (batch,) = take(1, directory, batch_size=BATCH, seed=0)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "source_tokens": ((6, 37), np.int32),
        "target_tokens": ((6, 41), np.int32),
    }
    assert all(batch["target_tokens"][:, 0] > 0)


def test_language_model_has_no_source(config):
    config.update(source="", source_length=0, vocab_size=281)
    (batch,) = take(1, prepare(config), batch_size=BATCH, seed=0)
    assert batch.keys() == {"target_tokens"}


def test_every_epoch_has_every_row_once_in_another_order(directory):
    rows = Manifest.read(directory).split("train").rows
    epochs = row_keys(take(rows, directory, batch_size=5, seed=3))
    in_order = row_keys(eval_batches(directory, "train", batch_size=1))
    epochs = [epochs[i * rows : (i + 1) * rows] for i in range(5)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(in_order)
    assert len({tuple(epoch) for epoch in [in_order, *epochs]}) == 6


def test_the_seed_decides(directory):
    first = take(3, directory, batch_size=BATCH, seed=1)
    assert_same(first, take(3, directory, batch_size=BATCH, seed=1))
    assert row_keys(first) != row_keys(take(3, directory, batch_size=BATCH, seed=2))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 40), st.sampled_from([1, 2, 3, 6]))
def test_a_stream_is_one_integer_on_any_number_of_processes(directory, start, processes):
    """Resumed at any batch, the processes together go on with the same global batches."""
    whole = take(start + 3, directory, batch_size=BATCH, seed=7)[start:]
    parts = [
        take(3, directory, batch_size=BATCH, seed=7, start=start,
             process_index=p, process_count=processes)
        for p in range(processes)
    ]  # fmt: skip
    assert all(len(part[0]["target_tokens"]) == BATCH // processes for part in parts)
    assert_same([joined(of_all) for of_all in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("start", [10**6, np.int64(10**6)])
def test_a_far_start_costs_nothing(directory, start):
    assert_same(
        take(2, directory, batch_size=BATCH, seed=7, start=start),
        take(3, directory, batch_size=BATCH, seed=7, start=10**6 - 1)[1:],
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
def test_eval_has_every_row_in_order_and_then_padding(directory, batch_size):
    rows = Manifest.read(directory).split("validation").rows
    batches = list(eval_batches(directory, "validation", batch_size=batch_size))
    assert len(batches) == -(-rows // batch_size)
    assert all(len(batch["target_tokens"]) == batch_size for batch in batches)
    whole = joined(batches)
    assert not any(array[rows:].any() for array in whole.values())
    assert all(whole["target_tokens"][:rows, 0] > 0)
    one_by_one = joined(list(eval_batches(directory, "validation", batch_size=1)))
    for name, array in whole.items():
        np.testing.assert_array_equal(array[:rows], one_by_one[name])


def test_eval_unpacked_is_the_text_in_order(config):
    config.pack = False
    directory = prepare(config)
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    batches = joined(list(eval_batches(directory, "validation", batch_size=4)))
    for side, name in (("en", "source_tokens"), ("de", "target_tokens")):
        decoded = [tokenizer.decode(row) for row in batches[name]]
        assert decoded == [*read_lines(directory / f"validation.{side}.txt"), "", "", ""]


def test_eval_is_shared_out_like_training(directory):
    whole = list(eval_batches(directory, "train", batch_size=BATCH))
    parts = [
        list(eval_batches(directory, "train", batch_size=BATCH, process_index=p, process_count=3))
        for p in range(3)
    ]
    assert_same([joined(of_all) for of_all in zip(*parts, strict=True)], whole)


def test_a_process_whose_share_is_all_padding_gets_padding(directory):
    rows = Manifest.read(directory).split("validation").rows
    size = 2 * rows
    whole = list(eval_batches(directory, "validation", batch_size=size))
    parts = [
        list(
            eval_batches(directory, "validation", batch_size=size, process_index=p, process_count=2)
        )
        for p in range(2)
    ]
    assert not any(array.any() for array in parts[1][0].values())
    assert_same([joined(of_all) for of_all in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=1000), r"batch_size 1000 is more than the \d+ rows"),
        (dict(batch_size=0), "batch_size must be at least 1, not 0"),
        (dict(batch_size=True), "batch_size must be an integer, not True"),
        (dict(batch_size=6.0), "batch_size must be an integer, not 6.0"),
        (dict(batch_size=6, seed=-1), "seed must be at least 0, not -1"),
        (dict(batch_size=6, seed=0.5), "seed must be an integer, not 0.5"),
        (dict(batch_size=6, process_count=0), "process_count must be at least 1, not 0"),
        (dict(batch_size=6, process_index=-1), "process_index must be from 0 to 0, not -1"),
        (dict(batch_size=6, process_count=4), "batch_size 6 cannot be shared out among 4"),
        (
            dict(batch_size=6, process_count=2, process_index=2),
            "process_index must be from 0 to 1, not 2",
        ),
        (dict(batch_size=6, start=-1), "start must be at least 0, not -1"),
        (dict(batch_size=6, start=1.5), "start must be an integer, not 1.5"),
    ],
)
def test_senseless_arguments_are_refused_at_once(directory, options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(directory, **dict(seed=0) | options)


def test_eval_arguments_are_checked_too(directory):
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        eval_batches(directory, "validation", batch_size=0)
    with pytest.raises(ValueError, match="no split 'dev', only .*'test', 'train', 'validation'"):
        eval_batches(directory, "dev", batch_size=1)


def test_a_directory_that_is_not_whole_is_refused(directory):
    (directory / "validation.array_record").replace(directory / "train.array_record")
    with pytest.raises(ValueError, match="array_record has 4 records, and the manifest says 54"):
        train_batches(directory, batch_size=1, seed=0)
    (directory / "train.array_record").unlink()
    with pytest.raises(ValueError, match="train.array_record is missing"):
        train_batches(directory, batch_size=1, seed=0)
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="python -m mqa_jax.data.prepare"):
        train_batches(directory, batch_size=1, seed=0)


def row_at(directory, number):
    """Where in the file of the training rows the bytes of one begin."""
    rows = joined(list(eval_batches(directory, "train", batch_size=1)))
    row = np.concatenate([rows["source_tokens"][number], rows["target_tokens"][number]])
    return (directory / "train.array_record").read_bytes().index(row.astype("<i4").tobytes())


def test_a_damaged_record_is_named_with_its_file(directory):
    place = row_at(directory, 5)
    with (directory / "train.array_record").open("r+b") as file:
        file.seek(place)
        file.write(b"\xff")
    batches = eval_batches(directory, "train", batch_size=3)
    next(batches)
    message = r"/.*/train\.array_record has a damaged record, 5 \(.*hash mismatch.*prepare the data"
    with pytest.raises(ValueError, match=message):
        next(batches)


@pytest.mark.parametrize(
    "row, reason", [([-1] * 78, "0 to 292"), ([293] * 78, "0 to 292"), ([5] * 77, "cannot reshape")]
)
def test_records_of_something_else_are_named(directory, row, reason):
    """Ids beyond the vocabulary would be embedded as padding, or as NaN."""
    path, rows = directory / "train.array_record", Manifest.read(directory).split("train").rows
    contents = np.zeros((rows, 78), "<i4")
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(rows):
        writer.write(np.array(row if i == 7 else contents[i], "<i4").tobytes())
    writer.close()
    manifest = Manifest.read(directory)
    files = manifest.files | {path.name: FileStats.of(path)}
    dataclasses.replace(manifest, files=files).write(directory)
    with pytest.raises(ValueError, match=rf"train.array_record has a damaged record, 7 .*{reason}"):
        list(eval_batches(directory, "train", batch_size=4))


def test_other_data_than_a_run_began_with_is_refused(config, directory):
    began_with = Manifest.read(directory)
    options = dict(batch_size=4, manifest=began_with)
    batches = train_batches(directory, seed=0, **options)
    expected = take(40, directory, batch_size=4, seed=0)
    # As a second run would do, with other fields and its manifest out of the way.
    (directory / "manifest.json").unlink()
    config.vocab_size = 290
    prepare(config)
    assert_same(list(islice(batches, 40)), expected)
    for again in (
        lambda: train_batches(directory, seed=0, **options),
        lambda: eval_batches(directory, "validation", **options),
    ):
        with pytest.raises(ValueError, match="holds other data than this run began with"):
            again()
