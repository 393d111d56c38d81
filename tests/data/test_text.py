"""The one reader of text files: what ends a line, what is no text, what is damaged and where."""

import gzip
import subprocess
import sys

import pytest

from mqa_jax.data.text import read_lines

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\n\nb", ["a", "", "b"]),
        (b"a\r\n\r\nb\r", ["a", "", "b"]),
        (BOM + b"a\r\n" + BOM + b"b\n", ["a", "\ufeffb"]),
        (BOM, [""]),
        ("a\u2028b\x85\x0b\n\nc\rd\x00".encode(), ["a\u2028b\x85\x0b", "", "c\rd\x00"]),
    ],
    ids=str,
)
def test_only_a_newline_ends_a_line_and_marks_are_no_text(content, lines, tmp_path):
    (tmp_path / "text").write_bytes(content)
    (tmp_path / "text.gz").write_bytes(gzip.compress(content))
    assert read_lines(tmp_path / "text") == lines
    assert read_lines(tmp_path / "text.gz") == lines


def test_standard_input_is_read_as_files_are():
    """Where the locale is not UTF-8, too."""
    content = BOM + "a\r\nb\u2028c\n\nd".encode()
    program = "from mqa_jax.data.text import read_lines; print(ascii(read_lines('-')))"
    piped = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", program],
        input=content,
        capture_output=True,
        check=True,
        env={"LC_ALL": "C", "PYTHONPATH": ":".join(sys.path), "PYTHONCOERCECLOCALE": "0"},
    )
    assert piped.stdout.decode().strip() == ascii(["a", "b\u2028c", "", "d"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text", b"a\n\xe4\n", r"text:2: not UTF-8 .*iconv"),
        ("text", "ab\n".encode("utf-16"), r"text:1: not UTF-8"),
        ("text.gz", gzip.compress(b"a\n\xe4\n", mtime=0), r"text\.gz:2: not UTF-8"),
        ("text.gz", b"a\nb\n", r"text\.gz:1: cannot be unpacked"),
        ("text.gz", gzip.compress(b"a\n" * 99, mtime=0)[:-9], r"text\.gz:\d+: cannot be unpacked"),
    ],
)
def test_what_is_damaged_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / name)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_lines(tmp_path / "text")
    with pytest.raises(IsADirectoryError):
        read_lines(tmp_path)
