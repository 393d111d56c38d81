"""What is trusted is hashed: nothing that was edited, exchanged or cut short is read."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mqa_jax.data.manifest import FORMAT, Manifest
from mqa_jax.data.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Copied by each test that spoils it."""
    directory = tmp_path_factory.mktemp("manifest")
    (directory / "text").mkdir()
    for stem, count in (("train", 97), ("val", 11)):
        for side in ("en", "de"):
            lines = [f"{side} {stem} {i * i} {'abc'[i % 3] * (i % 5)}" for i in range(count)]
            (directory / "text" / f"{stem}.{side}").write_text("\n".join(lines) + "\n")
    return ConfigDict(
        dict(
            builder="parallel_text",
            path=str(directory / "text"),
            source="en",
            target="de",
            splits=dict(train="train", validation="val"),
            dir=str(directory / "prepared"),
            tfds_dir="",
            source_length=41,
            target_length=43,
            pack=True,
            on_invalid="error",
            vocab_size=283,
        )
    )


@pytest.fixture
def data(prepared):
    """Its config, in a directory as it was prepared."""
    directory = prepare(prepared)
    kept = {path: path.read_bytes() for path in directory.glob("[!.]*") if path.is_file()}
    yield prepared.copy_and_resolve_references()
    for path, contents in kept.items():
        path.write_bytes(contents)


def test_every_file_is_in_it(data):
    manifest = Manifest.read(data.dir)
    on_disk = {path.name for path in Path(data.dir).glob("[!.]*") if path.is_file()}
    assert manifest.files.keys() == on_disk - {"manifest.json"}
    manifest.check_files(data.dir)
    assert manifest.tokenizer_sha256 == manifest.files["tokenizer.model"].sha256
    assert manifest == Manifest.read(data.dir)
    assert manifest.sha256 == json.loads((Path(data.dir) / "manifest.json").read_text())["sha256"]


def spoiled(path, how):
    contents = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(contents[: len(contents) // 2])
    else:
        middle = len(contents) // 2
        path.write_bytes(contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :])


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "is missing"),
        ("cut short", "has .* bytes, and had"),
        ("edited", "other content"),
    ],
)
def test_files_that_are_not_what_they_were_are_all_named(data, how, message):
    names = sorted(Manifest.read(data.dir).files)
    assert len(names) == 5
    for name in names:
        spoiled(Path(data.dir) / name, how)
    with pytest.raises(ValueError, match=message) as error:
        prepare(data)
    for name in names:
        assert f"{name} " in str(error.value)
    assert f"Delete {data.dir}/manifest.json and prepare the data anew" in str(error.value)


def edited(data, change):
    path = Path(data.dir) / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["request"].update(vocab_size=282),
        lambda fields: fields["request"]["files"].update({"val.de": 64 * "0"}),
        lambda fields: fields["splits"]["train"].update(rows=1),
        lambda fields: fields["splits"]["train"].pop("rows"),
        lambda fields: fields["files"].pop("train.array_record"),
        lambda fields: fields["files"]["tokenizer.model"].update(sha256=64 * "0"),
        lambda fields: fields.update(splits=[]),
        lambda fields: fields.pop("sha256"),
        lambda fields: fields.pop("request"),
        lambda fields: fields.update(request=3),
        lambda fields: fields.update(more=3),
    ],
)
def test_an_edited_manifest_is_refused(data, change):
    edited(data, change)
    with pytest.raises(ValueError, match=r"/manifest\.json is not as it was written.*delete /"):
        Manifest.read(data.dir)
    with pytest.raises(ValueError, match=r"/manifest\.json is not as it was written"):
        prepare(data)


def test_spaces_and_order_are_no_contents(data):
    before = Manifest.read(data.dir)
    edited(data, lambda fields: fields.update({"request": fields.pop("request")}))
    assert Manifest.read(data.dir) == before


@pytest.mark.parametrize("contents", [b"", b'{"sha256": "', b"\xff\xfe", b"[]", b"null", b"3"])
def test_what_is_no_manifest_is_named(data, contents):
    (Path(data.dir) / "manifest.json").write_bytes(contents)
    with pytest.raises(ValueError, match=rf"{data.dir}/manifest\.json is "):
        prepare(data)


def test_another_format_is_refused_with_the_way_out(data):
    """As version 0.1 wrote it: with no hashes at all."""

    def older(fields):
        fields["request"]["format"] = FORMAT - 1
        del fields["files"], fields["sha256"]

    edited(data, older)
    message = rf"manifest\.json is of format {FORMAT - 1}, .* reads {FORMAT}: delete .*anew"
    with pytest.raises(ValueError, match=message):
        prepare(data)
    (Path(data.dir) / "manifest.json").unlink()
    assert Manifest.read(prepare(data)).request["format"] == FORMAT
