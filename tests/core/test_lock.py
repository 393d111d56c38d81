"""A directory is one process's, until that process ends in whatever way."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest
from running import ROOT

from mqa_jax.core.lock import LOCK, locked

HOLD = """
import sys, time
from mqa_jax.core.lock import locked
with locked(sys.argv[1], "training", wait="wait" in sys.argv):
    print("held", flush=True)
    time.sleep(600 if "long" in sys.argv else 0)
"""


def hold(directory, *words):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


@pytest.mark.parametrize("name", ["run", "a [b] {c} *?% #ä"])
def test_who_holds_it_is_named_and_a_kill_lets_go(tmp_path, name):
    directory = tmp_path / "deep" / name
    first = hold(directory, "long")
    assert first.stdout.readline() == "held\n"
    holder = f"process {first.pid} on host {socket.gethostname()}, which is training since 20"
    with pytest.raises(ValueError) as error, locked(directory, "preparing"):
        pass
    assert str(directory) in str(error.value) and holder in str(error.value)
    # One that waits is told for whom, and gets it when the first is killed.
    second = hold(directory, "wait")
    assert holder in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate()[0] == "held\n" and second.returncode == 0
    for _ in range(2):
        with locked(directory, "training"):
            assert f"process {os.getpid()} on" in (directory / LOCK).read_text()
            reason = f"in use by process {os.getpid()} on"
            with pytest.raises(ValueError, match=reason), locked(directory, "training"):
                pass
    assert [path.name for path in directory.iterdir()] == [LOCK]


FORK = """
import os, sys, time
from mqa_jax.core.lock import locked
with locked(sys.argv[1], "training"):
    if not os.fork():
        time.sleep(600)
print("let go", flush=True)
time.sleep(600)
"""


def test_a_forked_child_does_not_keep_it(tmp_path):
    """Though it has the same file open, as the workers of a loader do."""
    command = [sys.executable, "-c", FORK, str(tmp_path)]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(command, **options) as process:
        try:
            assert process.stdout.readline() == "let go\n"
            with locked(tmp_path, "training"):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_an_error_inside_lets_go_too(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path, "training"):
        raise KeyError
    with locked(tmp_path, "training"):
        pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path, "training"):
        assert f"{tmp_path}/.lock: this file system has no locks" in caplog.text


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file", "training"):
        pass
