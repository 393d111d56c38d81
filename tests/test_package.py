"""What the README promises: the import is light."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("tensorflow", "tensorflow_datasets", "grain", "orbax", "sentencepiece", "matplotlib")


def run(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_import_pulls_in_nothing_heavy():
    program = "import sys, mqa_jax; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(program).split()}
    assert "mqa_jax" in loaded and not loaded & set(HEAVY)


def test_import_of_the_benchmark_pulls_in_nothing_heavy():
    program = "import sys, mqa_jax.measure.benchmark; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(program).split()}
    assert "mqa_jax" in loaded and not loaded & set(HEAVY)


def test_public_names_exist_and_are_documented():
    program = (
        "import mqa_jax; print([n for n in mqa_jax.__all__ if not getattr(mqa_jax, n).__doc__])"
    )
    assert run(program) == "[]\n"
