"""`make` takes the newest Python that runs, or the one that it is told."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIM = "echo 'pyenv: command not found' >&2; exit 127"
NO_PIP = "echo 'ModuleNotFoundError: No module named ensurepip' >&2; exit 1"
# Tells its version and its name, and makes an environment of itself.
PYTHON = """case "$*" in
  *ensurepip*) echo {version};;
  *venv*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python";;
  name) echo {name};;
esac"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def install(tmp_path):
    """Runs `make install` where these are, by path and version; returns which it has taken.

    A version that is none is what the script does instead.
    """

    def install(pythons: dict[str, str], *args: str) -> str:
        # The system's own are behind these on the path.
        missing = {f"bin/python3.{minor}": SHIM for minor in (12, 13)}
        for name, version in (missing | pythons).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            script = PYTHON.format(version=version, name=name)
            path.write_text(f"#!/bin/sh\n{script if version[0] == '3' else version}\n")
            path.chmod(0o755)
        result = subprocess.run(
            ["make", "install", f"VENV={tmp_path}/venv", *args],
            cwd=ROOT,
            env=dict(PATH=f"{tmp_path}/bin:{os.environ['PATH']}", PYENV_ROOT=str(tmp_path)),
            capture_output=True,
            text=True,
        )
        if result.returncode:
            return result.stderr
        return subprocess.check_output([tmp_path / "venv/bin/python", "name"], text=True).strip()

    return install


BOTH = {f"bin/python3.{minor}": f"3.{minor}" for minor in (12, 13)}


def test_the_newest_is_taken(install):
    assert install(BOTH) == "bin/python3.13"


def test_a_shim_without_a_python_behind_it_is_not(install):
    assert install(BOTH | {"bin/python3.13": SHIM}) == "bin/python3.12"


def test_one_without_pip_is_not(install):
    assert install(BOTH | {"bin/python3.13": NO_PIP}) == "bin/python3.12"


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_pyenvs_are_found(install, version):
    name = f"versions/{version}.7/bin/python"
    assert install({name: version, "versions/3.11.9/bin/python": "3.11"}) == name


def test_the_one_that_is_named_is_taken(install):
    assert install(BOTH | {"bin/other": "3.14"}, "PYTHON=other") == "bin/other"


def test_where_there_is_none_it_says_so(install):
    assert "Neither Python 3.12 nor 3.13 runs here" in install({})


def test_only_another_that_is_named_makes_the_environment_anew(install):
    assert install({"bin/python3.12": "3.12"}) == "bin/python3.12"
    assert install(BOTH) == "bin/python3.12"
    assert install(BOTH, "PYTHON=python3.13") == "bin/python3.13"
    assert install(BOTH, "PYTHON=python3.13", "EXTRAS=train") == "bin/python3.13"
    assert install(BOTH) == "bin/python3.13"
