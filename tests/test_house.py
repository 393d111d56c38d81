"""The house: imports run one way, files are of one idea, heavy things are known in one place."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mqa_jax"

# From the bottom to the top: a folder imports itself and what stands before it.
ORDER = (
    "core",
    "attention",
    "model",
    "decode",
    "data",
    "hub",
    "convert",
    "train",
    "measure",
    "cli",
)
FILES = sorted(PACKAGE.rglob("*.py"))
# Where each of these may be imported, and nowhere else.
KNOWN_IN = {
    "orbax": ["train/checkpoint.py"],
    "matplotlib": ["measure/plots.py"],
    "tensorflow_datasets": ["data/number_phrases.py", "data/parallel_text.py", "data/raw.py"],
    "safetensors": ["hub/files.py", "hub/save.py"],
    "tokenizers": ["hub/tokenizer.py"],
    "tensorflow": [],
}
# Without JAX, so that they can be read, and used, where there is none.
MEASURE = ("cost", "paper", "plots", "record", "report")
NO_JAX = ("data/", *(f"measure/{name}.py" for name in MEASURE))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, at its head or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def folders(path: Path) -> set[str]:
    """The folders of the package that a file imports from."""
    parts = (module.split(".") for module in imports(path))
    return {part[1] for part in parts if part[0] == "mqa_jax" and len(part) > 1} & set(ORDER)


def test_every_folder_has_its_place():
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert found == set(ORDER)


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != PACKAGE], ids=name)
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).parts[0]
    allowed = ORDER[: ORDER.index(own) + 1]
    assert folders(path) <= set(allowed), f"{name(path)} may import {', '.join(allowed)} alone"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_is_heavy_is_known_in_one_place(path):
    for module, places in KNOWN_IN.items():
        roots = {found.split(".")[0] for found in imports(path)}
        assert module not in roots or name(path) in places
    if name(path).startswith(NO_JAX):
        assert not {"jax", "flax"} & {found.split(".")[0] for found in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_of_one_idea_and_says_which(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text))
