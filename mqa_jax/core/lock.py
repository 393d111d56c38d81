"""One process at a time in a directory, by a lock that ends with the process that holds it.

<directory>/.lock    stays; what it says of a process counts only while that process holds it
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"

# What a file system answers that has no such locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(directory: str | Path, doing: str, *, wait: bool = False) -> Iterator[None]:
    """Holds `directory` for this process alone; whoever else asks is told who holds it.

    The operating system lets go of it when the process ends, however it ends. It is the lock of
    `flock(2)`: between hosts too where the file system has it so (NFS does, a mounted bucket does
    not). Where there are no locks at all, a warning says so.

    Args:
      directory: made if it is not there.
      doing: what this process does there, such as "training", for the others' messages.
      wait: until the other lets go, with a word in the log; else that it is held is an error.

    Raises:
      ValueError: another process holds it, or this one does already.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    # Read and written, and never truncated: it may be another's.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as file:
        try:
            _take(file.fileno(), path, wait=wait)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(path)) from None
            logging.warning(
                "%s: this file system has no locks (%s), so nothing keeps a second process out",
                *(path, error.strerror),
            )
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.seek(0)
        file.truncate()
        file.write(
            f"process {os.getpid()} on host {socket.gethostname()}, which is {doing} since {now}"
        )
        file.flush()
        try:
            yield
        finally:
            # A child that was forked holds the same lock, and closing the file leaves it that.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _take(file: int, path: Path, *, wait: bool) -> None:
    try:
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8", errors="replace").strip()
        holder = holder or "another process"
    if not wait:
        raise ValueError(
            f"{path.parent} is in use by {holder}: wait until it ends, or name another directory"
        )
    logging.warning("waiting for %s, in %s", holder, path.parent)
    fcntl.flock(file, fcntl.LOCK_EX)
