"""What opens a directory: everything that is wrong with it is found before a tensor is read."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import safetensors_bytes, values
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_jax.hub.files import Directory, is_finite, read_header

TENSORS = {
    "a": values("a", [2, 3]),
    "b": values("b", [5]).astype("bfloat16"),
    "c": np.asarray(values("c", []), "float16"),
}


def open_files(directory, **files):
    """A directory with a config and these files, `_` for `.` and `-` in their names."""
    (directory / "config.json").write_text("{}")
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return Directory(directory)


def entry(start=0, stop=24, dtype="F32", shape=(2, 3)):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[start, stop])


def test_tensors_come_as_they_were_written(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"a": "b"})
    files = open_files(tmp_path)
    assert files.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert files.tensors[name].shape == tensor.shape
        assert files.read(name).dtype == tensor.dtype
        np.testing.assert_array_equal(files.read(name), tensor)


HEADERS = {
    "overlap": ({"a": entry(), "b": entry(20, 44)}, 44, "b begins at byte 20, not 24"),
    "hole": ({"a": entry(), "b": entry(28, 52)}, 52, "b begins at byte 28, not 24"),
    "late": ({"a": entry(4, 28)}, 28, "a begins at byte 4, not 0"),
    "short": ({"a": entry()}, 20, "its tensors have 24 bytes, but 20 are there"),
    "long": ({"a": entry()}, 25, "its tensors have 24 bytes, but 25 are there"),
    "span": ({"a": entry(shape=[2, 2])}, 24, r"a: .*F32 \[2, 2\] does not fill bytes 0 to 24"),
    "half": ({"a": entry(dtype="F16")}, 24, "does not fill"),
    "dtype": ({"a": entry(dtype="F33")}, 24, "F33"),
    "negative": ({"a": entry(shape=[-2, -3])}, 24, "must be whole numbers"),
    "backwards": ({"a": entry(24, 0, shape=[0])}, 0, "does not fill"),
    "fraction": ({"a": entry(shape=[2.0, 3])}, 24, "must be whole numbers"),
    "bool": ({"a": entry(0, 4, shape=[True])}, 4, "must be whole numbers"),
    "three": ({"a": dict(entry(), data_offsets=[0, 24, 24])}, 24, "a: ValueError"),
    "no offsets": ({"a": dict(dtype="F32", shape=[])}, 4, "a: KeyError"),
    "no object": ({"a": 3}, 0, "a: TypeError"),
    "list": ([entry()], 24, "no JSON object"),
    "twice": (b'{"a": 1, "a": 2}', 0, "a name is there twice"),
    "no JSON": (b"{'a'}", 0, "its header is no JSON"),
    "no text": (b"\xff\xfe", 0, "its header is no JSON"),
    "deep": (b"[" * 200_000, 0, "its header is no JSON"),
    "huge": ({"a": entry(shape=[2**40, 2**40])}, 24, "does not fill"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, name):
    header, size, message = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(size)))
    with pytest.raises(ValueError, match=rf"model\.safetensors is damaged.*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", f"its header has {2**63} bytes"),
        (struct.pack("<Q", 3) + b"{}", "its header has 3 bytes"),
    ],
)
def test_a_header_that_is_not_there_is_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_a_header_has_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr("mqa_jax.hub.files.MAX_HEADER_BYTES", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry()}, bytes(24)))
    with pytest.raises(ValueError, match="10 is the most"):
        read_header(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_as_it_stands(tmp_path_factory, data):
    """Whatever bytes of a header change: a ValueError, or tensors that lie within the file."""
    content = bytearray(
        safetensors_bytes({"a": entry(), "b": entry(24, 28, "BF16", [2])}, bytes(28))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 29))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(content)
    (path.parent / "config.json").write_text("{}")
    try:
        files = Directory(path.parent)
        for name in files.tensors:
            files.read(name)
    except ValueError:
        pass


def shards(directory, places, files):
    for name, tensors in files.items():
        safetensors.numpy.save_file({key: TENSORS[key] for key in tensors}, directory / name)
    text = json.dumps(dict(weight_map=places))
    return open_files(directory, **{"model.safetensors.index.json": text.encode()})


def test_shards_are_read_by_the_index(tmp_path):
    places = dict(a="x.safetensors", b="y.safetensors", c="x.safetensors")
    files = shards(tmp_path, places, {"x.safetensors": "ac", "y.safetensors": "b"})
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(files.read(name), tensor)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (dict(a="x.safetensors"), "b is in .*x.safetensors, but by .* it is nowhere"),
        (dict(a="x.safetensors", b="y.safetensors"), "b is in .*x.safetensors.* it is in y"),
        (
            dict(a="x.safetensors", b="x.safetensors", d="x.safetensors"),
            "d is not in .*x.safetensors",
        ),
        (dict(a="x.safetensors", b="z.safetensors"), "b is in|names z.safetensors, which is miss"),
        (dict(a="../x.safetensors"), "a shard is a .safetensors file beside it"),
        (dict(a="/x.safetensors"), "a shard is a .safetensors file beside it"),
        (dict(a="x\\y.safetensors"), "a shard is a .safetensors file beside it"),
        (dict(a="x" * 3000 + ".safetensors"), "a shard is a .safetensors file beside it"),
        (dict(a=".."), "a shard is a .safetensors file beside it"),
        (dict(a="x.bin"), "a shard is a .safetensors file beside it"),
        (dict(a=3), "a shard is a .safetensors file beside it"),
        (dict(), "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, places, message):
    files = shards(tmp_path, places, {"x.safetensors": "ab", "y.safetensors": "c"})
    with pytest.raises(ValueError, match=message):
        _ = files.tensors


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "tf_model.h5"]
)
def test_a_pickle_is_not_read_and_its_conversion_is_said(tmp_path, name):
    files = open_files(tmp_path, **{name: b"cos\nsystem\n(S'true'\ntR."})
    with pytest.raises(ValueError, match=rf"{name} alone.*weights_only=True.*save_file"):
        _ = files.tensors


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="the directory 'gs://bucket/model' is an address"):
        Directory("gs://bucket/model")
    with pytest.raises(ValueError, match="there is no directory .*nowhere: download"):
        Directory(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        Directory(tmp_path)
    with pytest.raises(ValueError, match="has no weights"):
        _ = open_files(tmp_path).tensors


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ['{"a": ', "[1]", "[" * 200_000])
def test_a_broken_json_file_is_named(tmp_path, name, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"/{name} is"):
        Directory(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_not_finite_is_found_wherever_it_is(dtype):
    array = np.full((1 << 20) + 3, np.finfo(np.float16).max, dtype)
    assert is_finite(array) and is_finite(-array) and is_finite(array[:0])
    for place in (0, 1 << 20, -1):
        for value in (np.nan, np.inf, -np.inf):
            wrong = array.copy()
            wrong[place] = value
            assert not is_finite(wrong)


def test_a_tensor_that_is_not_finite_or_not_of_floats_is_named(tmp_path):
    tensors = dict(nan=np.array([1, np.nan], np.float32), eight=np.zeros(3, np.int8))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    files = open_files(tmp_path)
    with pytest.raises(ValueError, match="nan in .*model.safetensors holds NaN or infinity"):
        files.read("nan")
    with pytest.raises(ValueError, match=r"eight is I8 \[3\] in .*quantized"):
        files.read("eight")


def test_tensors_are_compared_to_the_last_element(tmp_path):
    table = values("table", [1500, 1031])  # of more than one part
    last = table.copy()
    last[-1, -1] += 1
    tensors = dict(a=table, b=table, c=last, d=table[:-1], e=table.astype("bfloat16"))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    files = open_files(tmp_path)
    assert [files.are_equal("a", other) for other in "bcde"] == [True, False, False, False]
