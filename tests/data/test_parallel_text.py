import gzip

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mqa_jax.data.parallel_text import ParallelText, parallel_text_config


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (directory / name.replace("__", ".")).write_bytes(content)
    return directory


def build(path, data_dir, source="en", target="de", **splits):
    config = parallel_text_config(path, source, target, splits or {"train": "train"})
    builder = ParallelText(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def read(builder, split="train"):
    source = builder.as_data_source(split)
    return [
        {key: value.decode() if isinstance(value, bytes) else int(value)
         for key, value in example.items()}
        for example in source
    ]  # fmt: skip


def test_lines_keep_order_number_and_text(tmp_path):
    """Only "\\n" ends a line, "\\r" before it goes, and blank lines stay."""
    english = "b\r\na\u2028a\n\n \x85\x0b\x0c\x1c c\rc\nlast"
    german = "B\nA\nB\nC\r\r\nletzte\n"
    path = write(tmp_path / "text", train__en=english, train__de=german)
    assert read(build(path, tmp_path / "tfds")) == [
        {"line": 1, "en": "b", "de": "B"},
        {"line": 2, "en": "a\u2028a", "de": "A"},
        {"line": 3, "en": "", "de": "B"},
        {"line": 4, "en": " \x85\x0b\x0c\x1c c\rc", "de": "C\r"},
        {"line": 5, "en": "last", "de": "letzte"},
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), crlf=st.booleans())
def test_any_text_survives(tmp_path, lines, crlf):
    end = "\r\n" if crlf else "\n"
    lines = [tuple(text.rstrip("\r") for text in texts) for texts in lines]
    english, german = ("".join(text + end for text in side) for side in zip(*lines, strict=True))
    path = write(tmp_path / "text", train__en=english, train__de=german)
    examples = read(build(path, tmp_path / "tfds"))
    assert [(example["en"], example["de"]) for example in examples] == lines


def test_gzip_is_the_same_text(tmp_path):
    path = write(tmp_path / "text", train__en="a\nb\n", train__de="A\nB\n")
    plain = build(path, tmp_path / "tfds")
    text = (path / "train.de").read_bytes()
    (path / "train.de").unlink()
    write(path, train__de__gz=gzip.compress(text))
    zipped = build(path, tmp_path / "other")
    assert read(zipped) == read(plain)
    assert zipped.builder_config.name == plain.builder_config.name
    assert zipped.builder_config.hashes.keys() == {"train.en", "train.de"}


def test_splits_are_separate(tmp_path):
    path = write(tmp_path / "text", a__en="a\n", a__de="A\n", dev__en="x\ny\n", dev__de="X\nY\n")
    builder = build(path, tmp_path / "tfds", train="a", validation="dev")
    assert [example["de"] for example in read(builder, "train")] == ["A"]
    assert [example["de"] for example in read(builder, "validation")] == ["X", "Y"]


def test_language_model_has_one_side(tmp_path):
    path = write(tmp_path / "text", train__txt="a\nb\n")
    builder = build(path, tmp_path / "tfds", source="", target="txt")
    assert read(builder) == [{"line": 1, "txt": "a"}, {"line": 2, "txt": "b"}]


def test_changed_text_is_built_anew(tmp_path):
    path = write(tmp_path / "text", train__en="a\n", train__de="A\n")
    first = build(path, tmp_path / "tfds")
    assert build(path, tmp_path / "tfds").data_dir == first.data_dir
    write(path, train__de="C\n")
    second = build(path, tmp_path / "tfds")
    assert read(second) == [{"line": 1, "en": "a", "de": "C"}]
    assert read(first) == [{"line": 1, "en": "a", "de": "A"}]


def test_swapped_splits_are_built_anew(tmp_path):
    path = write(tmp_path / "text", a__en="a\n", a__de="A\n", b__en="b\n", b__de="B\n")
    build(path, tmp_path / "tfds", train="a", validation="b")
    swapped = build(path, tmp_path / "tfds", train="b", validation="a")
    assert read(swapped) == [{"line": 1, "en": "b", "de": "B"}]


def test_suffixes_may_have_dots(tmp_path):
    (tmp_path / "text").mkdir()
    for side in ("tok.en", "tok.de"):
        (tmp_path / "text" / f"train.{side}").write_text(f"{side}\n")
    builder = build(tmp_path / "text", tmp_path / "tfds", source="tok.en", target="tok.de")
    assert read(builder) == [{"line": 1, "tok.en": "tok.en", "tok.de": "tok.de"}]


@pytest.mark.parametrize(
    "files, message",
    [
        (dict(train__en="a\n"), r"names:\n  /.*train\.de\nthe directory holds train\.en: "),
        (dict(train__en="a\n", train__de="A\n", train__de__gz=gzip.compress(b"A\n", mtime=0)),
         r"train\.de and .*train\.de\.gz are both there"),
        (dict(train__en="a\n", train__de=""), r"train\.de is empty"),
        (dict(train__en="a\n", train__de__gz=gzip.compress(b"", mtime=0)), r"train\.de\.gz is empty"),
        (dict(train__en="a\n", train__de__gz="A\n"), r"train\.de\.gz cannot be read"),
        (dict(train__en="a\n", train__de__gz=gzip.compress(b"A\n" * 99, mtime=0)[:-9]),
         r"train\.de\.gz cannot be read"),
        (dict(train__en="a\nb\nc\n", train__de="A\nB\n"),
         r"train\.en has 3 and .*train\.de has 2"),
        (dict(train__en="a\n", train__de="A\n\n\n"), r"train\.en has 1 and .*train\.de has 3"),
        (dict(train__en="a\nb\n", train__de=b"A\nB\xff\n"), r"train\.de:2: not UTF-8"),
        (dict(train__en=b"\xe4\n", train__de=b"A\n"), r"train\.en:1: not UTF-8"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, files, message):
    path = write(tmp_path / "text", **files)
    with pytest.raises(ValueError, match=message):
        build(path, tmp_path / "tfds")
    # What was refused must not look built the next time.
    with pytest.raises(ValueError, match=message):
        build(path, tmp_path / "tfds")


def test_one_suffix_for_both_sides_is_refused(tmp_path):
    path = write(tmp_path / "text", train__en="a\n")
    with pytest.raises(ValueError, match="source and target are both 'en'"):
        build(path, tmp_path / "tfds", source="en", target="en")
