"""Text files, one sentence a line, as every part of the project reads them.

Only "\\n" ends a line. The "\\r" of "\\r\\n" and the byte order mark that some programs write in
front are no text; a file named `.gz` is unpacked; "-" is standard input.
"""

import codecs
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

STANDARD_INPUT = "-"


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text, without what ends them; raises as `iterate_lines` does."""
    return list(iterate_lines(path))


def iterate_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text one after the other, without what ends them.

    Raises:
      ValueError: a line is not UTF-8, or a `.gz` file is damaged; it names file and line.
      OSError: there is no such file, or it may not be read.
    """
    name, number = text_name(path), 0
    # Read as bytes: in text mode a lone "\r" would end a line too, and `str.splitlines` would split
    # at six more characters, so that two files would no longer run side by side.
    with open_text(path) as text:
        try:
            for number, line in enumerate(text, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}:{number}: not UTF-8 ({error}): convert the file, with iconv say"
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{name}:{number + 1}: cannot be unpacked ({error}): copy it here again"
            ) from error


def open_text(path: str | Path) -> io.BufferedReader | gzip.GzipFile:
    """The bytes of a text, unpacked if its name ends in `.gz`."""
    if str(path) == STANDARD_INPUT:
        # A copy, since whoever reads a file closes it.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb")


def text_name(path: str | Path) -> str:
    """What messages call a text."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)
