"""The documentation: its examples run as they stand, the notebook runs, the site builds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from checkpoints import write, write_words
from running import CACHED

import mqa_jax
from mqa_jax.hub import load

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
CODE = re.compile(r"```py(?:thon)?\n(.*?)```", flags=re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    str(page.relative_to(ROOT)): blocks
    for page in PAGES
    if (blocks := BLOCK.findall(page.read_text(encoding="utf-8")))
}
# Each knows nothing of the one before, but what takes long to import is there already.
RUN_EACH = """
import sys
for number, block in enumerate(sys.argv[1:], start=1):
    print("example", number, file=sys.stderr, flush=True)
    exec(compile(block, f"example {number}", "exec"), {"__name__": "__main__"})
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)} | CACHED


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run_as_they_stand(page, tmp_path):
    if any('"DIR"' in block for block in EXAMPLES[page]):
        write_words(write(tmp_path / "DIR", "llama_linear"))
    result = subprocess.run(
        [sys.executable, "-c", RUN_EACH, *EXAMPLES[page]],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_pages_that_promise_examples_have_them():
    names = ("importing", "measuring", "converting", "eight_bits")
    guides = {f"docs/guides/{name}.md" for name in names}
    assert guides | {"README.md", "docs/decoding.md", "docs/guides/serving.md"} <= set(EXAMPLES)


def test_the_api_pages_have_what_is_public_and_what_pages_name():
    pages = "".join(map(read, PAGES))
    code = "\n".join(block for page in PAGES for block in CODE.findall(read(page)))
    listed = set(re.findall(r"^::: (\S+)", pages, flags=re.MULTILINE))
    wanted = {f"mqa_jax.{name}" for name in mqa_jax.__all__}
    for module, names in re.findall(r"^from (mqa_jax[\w.]*) import (.+)$", code, re.MULTILINE):
        wanted |= {f"{module}.{name}" for name in names.split(", ")}
    guides = "".join(read(page) for page in PAGES if page.stem not in ("results", "decisions"))
    wanted |= set(re.findall(r"`(mqa_jax\.[\w.]+\w)(?:\(|`)", guides))
    short = {entry.rpartition(".")[2] for entry in listed}  # What is public has two addresses.
    missing = {
        name
        for name in wanted
        if name.rpartition(".")[2] not in short
        and not any(f"{name}.".startswith(f"{entry}.") for entry in listed)
        and not any(f"{entry}.".startswith(f"{name}.") for entry in listed)
    }
    assert not missing


def read(page):
    return page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_recipe_for_own_text_runs_as_typed(tmp_path):
    """With fewer steps."""
    for name in ("train.py", "decode.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    run_commands("own_text", tmp_path)
    inputs = (tmp_path / "text/test.en").read_text().splitlines()
    for output in ("test.fr", "continued.fr"):
        assert (tmp_path / output).read_text().count("\n") == len(inputs) == 20


@pytest.mark.slow
def test_the_page_of_the_hub_runs_as_typed(tmp_path):
    """With fewer steps, on a Llama of words."""
    write_words(write(tmp_path / "DIR", "llama_linear", max_position_embeddings=1024))
    generation = dict(bos_token_id=1, eos_token_id=2)
    (tmp_path / "DIR/generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "text").mkdir()
    for name in ("prompts.txt", "english.txt", "right.txt"):
        (tmp_path / name).write_text("w3 w5 w0\nw7\n" * 64)
    for name in ("text/train.txt", "text/validation.txt"):
        (tmp_path / name).write_text("w3 w5 w0\nw7\n" * 1024)
    run_commands("pretrained", tmp_path)
    for name in ("answers.txt", "german.txt"):
        assert (tmp_path / name).read_text().count("\n") == 128
    assert json.loads((tmp_path / "runs/model/benchmark.json").read_text())["costs"]
    assert load(tmp_path / "mine").tokenizer.encode("w3 w5") == [3, 5]


def run_commands(guide, directory):
    """All of a guide's but what installs, with few steps of training."""
    page = (ROOT / f"docs/guides/{guide}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    commands = "\n".join(["set -e", *(block for block in blocks if "pip install" not in block)])
    commands = re.sub(r"(train\.steps)=\d+", r"\1=4", commands)
    commands = re.sub(r"(train\.\w+_steps)=\d+", r"\1=2", commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = ENVIRONMENT | {"PATH": path, "JAX_PLATFORMS": "cpu"}
    # One device, as a user has it, and of LLVM's optimizations none, as in `running.command`.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    result = subprocess.run(
        ["bash", "-c", commands],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        build, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # What docstrings say stands on the pages of the API.
    assert "one write-head" in (tmp_path / "index.html").read_text().lower()
    for name in ("dot_product_attention", "MultiQueryAttention", "init_cache", "KVCache"):
        assert name in (tmp_path / "api/attention/index.html").read_text()


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """On a smaller model than the one that it measures."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs/multi_query_in_two_minutes.ipynb", as_version=4)
    sizes = "vocab_size=8192, d_model=512, num_layers=4"
    (cell,) = (cell for cell in notebook.cells if sizes in cell.source)
    cell.source = cell.source.replace(sizes, "vocab_size=512, d_model=128, num_layers=1")
    nbclient.execute(notebook, timeout=600, kernel_name="python3")
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert float(re.search(r"largest difference: (\S+)", printed)[1]) < 1e-5
    times = re.findall(r"(multi_\w+) +(\d+) tokens +(\d+\.\d+) ms a step", printed)
    assert len(times) == 6 and all(float(ms) > 0 for _, _, ms in times)
