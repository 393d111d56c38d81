"""Paths that users give, and JSON that is read back from a disk: what is wrong names the file."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of one letter it is a drive of Windows. `Path` makes one slash of two.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(name: str, value: str | os.PathLike[str]) -> Path:
    """`value` as a path of this machine; a leading `~` is the home directory.

    Args:
      name: what the path is, such as "--workdir", for the message.

    Raises:
      ValueError: it is empty, or an address such as gs://bucket/run.
    """
    text = os.fspath(value)
    if not text or "\0" in text:
        raise ValueError(f"{name} must be a path, not {text!r}")
    if _SCHEME.match(text):
        raise ValueError(
            f"{name} {text!r} is an address, and only paths of this machine are read and written: "
            "mount a bucket (gs:// with Cloud Storage FUSE: `gcsfuse BUCKET DIR`), or copy the "
            "files here, and give the path"
        )
    return Path(os.path.expanduser(text))  # `Path` would take ./~ for ~ too.


def new_directory(name: str, value: str | os.PathLike[str]) -> Path:
    """`value` as the path of a directory to be made, or of an empty one; nothing is made yet.

    Args:
      name: as for `local_path`.

    Raises:
      ValueError: there is something already, or it is the working directory; as `local_path` and
        `check_place`.
    """
    # What a link leads to is replaced, not the link.
    path = local_path(name, value).resolve()
    check_place(name, path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{name} {path} is there already: give a new directory, or remove it")
    if path.exists() and path.samefile(os.curdir):
        raise ValueError(
            f"{name} {path} is the working directory, which cannot be replaced: give another"
        )
    return path


def check_place(name: str, path: Path) -> None:
    """Finds that a file or directory of that path could be made; nothing is made yet.

    Args:
      name: as for `local_path`.

    Raises:
      ValueError: what it would be in is a file, or cannot be written to, or its name is too long.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}: give another") from None
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{name} {path}: {above} is a file, no directory: give another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {path}: nothing can be written into {above}: give another")


def write_whole(path: Path, text: str) -> None:
    """The file appears with all of its text, or not at all.

    Raises:
      OSError: it cannot be written; it has the name of the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # Python's own message does not say which file, when a disk is full.
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A directory beside `path`, of `new_directory`, which takes its place when all is written in
    it; after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file is cut short, or holds something else; the message names it.
      OSError: it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # Of UnicodeDecodeError too.
        raise ValueError(f"{path} is cut short or damaged, no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is not what was written there: {content!r:.60} in place of fields"
        )
    return content
