"""What each extra brings is what the code asks for, and its absence is said in one line."""

import ast
import configparser
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from mqa_jax.core.extras import EXTRAS, MissingExtra, require

ROOT = Path(__file__).parents[2]
CORE = {"jax", "jaxlib", "flax", "numpy"}
# Of which extras the files of a folder may import; the folders that are not here, of none.
MAY_IMPORT = dict(
    data=["train"], hub=["hub"], train=["train"], measure=["train", "plot"], cli=["train", "plot"]
)
# What config files import, whoever reads them: ml_collections is in both extras.
MAY_IMPORT["core/config.py"] = ["plot"]


def distributions(extra: str) -> set[str]:
    """The packages of an extra in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.extras_require"][extra].strip().splitlines()
    names = (re.match(r"[\w-]+", line) for line in lines if not line.startswith("#"))
    return {name.group().lower().replace("_", "-") for name in names}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_is_setup_cfg(extra):
    providers = packages_distributions()
    wanted = distributions(extra)
    for name in EXTRAS[extra]:
        found = {p.lower().replace("_", "-") for p in providers[name.split(".")[0]]}
        assert found & wanted, f"nothing of [{extra}] in setup.cfg brings {name}"
    assert len(EXTRAS[extra]) == len(wanted)


def third_party(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"mqa_jax"}


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "mqa_jax").rglob("*.py")),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_files_import_what_their_folder_asks_for(path):
    name = path.relative_to(ROOT / "mqa_jax")
    extras = MAY_IMPORT.get(name.as_posix()) or MAY_IMPORT.get(name.parts[0], [])
    allowed = CORE | {name.split(".")[0] for extra in extras for name in EXTRAS[extra]}
    assert third_party(path) <= allowed


FIRST_USES = [
    ("mqa_jax.train.loop", "sacrebleu", "train"),
    ("mqa_jax.train.step", "tensorboardX", "train"),
    ("mqa_jax.data.loader", "array_record", "train"),
    ("mqa_jax.data", "ml_collections", "train"),
    ("mqa_jax.measure.report", "matplotlib", "plot"),
    ("mqa_jax.hub", "tokenizers", "hub"),
]


def test_the_first_use_says_what_to_install():
    # Each as the first thing that a process does with the package; jax itself is imported once.
    program = f"""
import importlib, sys
for module, missing, _ in {FIRST_USES}:
    for name in [name for name in sys.modules if name.split(".")[0] == "mqa_jax"]:
        del sys.modules[name]
    before = sys.modules.get(missing)
    sys.modules[missing] = None
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
    sys.modules[missing] = before
    if before is None:
        del sys.modules[missing]
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    messages = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr[-3000:]
    for message, (module, missing, extra) in zip(messages, FIRST_USES, strict=True):
        assert message.endswith(f'pip install "mqa_jax[{extra}]"')
        assert missing in message and ".".join(module.split(".")[:2]) in message


def test_nothing_is_missing_here_and_all_that_is_missing_is_named(monkeypatch):
    for extra in EXTRAS:
        require(extra, "the test")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "grain", None)
    message = (
        "the test needs grain, tqdm, which the core of mqa_jax leaves out: "
        r'pip install "mqa_jax\[train\]"'
    )
    with pytest.raises(MissingExtra, match=f"^{message}$") as error:
        require("train", "the test")
    assert error.value.name == "grain"
