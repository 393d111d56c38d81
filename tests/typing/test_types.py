"""Users' code is type-checked against this package: right is let through, wrong is found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def errors() -> dict[str, set[int]]:
    """The lines of each user's file that the checker complains of; the package's own are not."""
    # With the options of `make lint`, it goes on from what that has found.
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary"]
        + [str(Path(__file__).with_name(name)) for name in ("user_ok.py", "user_wrong.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode in (0, 1), checked.stderr
    found = re.findall(r"(\w+)\.py:(\d+): error: .*", checked.stdout)
    return {
        name: {int(line) for file, line in found if file == name}
        for name in ("user_ok", "user_wrong")
    }


def test_what_is_right_is_let_through(errors):
    assert errors["user_ok"] == set()


def test_what_is_wrong_is_found(errors):
    lines = Path(__file__).with_name("user_wrong.py").read_text().splitlines()
    assert errors["user_wrong"] == {i for i, line in enumerate(lines, 1) if "# wrong: " in line}


def test_every_public_name_is_used():
    import mqa_jax

    text = Path(__file__).with_name("user_ok.py").read_text()
    assert not [name for name in mqa_jax.__all__ if not re.search(rf"\b{name}\b", text)]
