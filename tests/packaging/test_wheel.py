"""What is built is whole, and what is installed is what was asked for: in environments of its own.

The packages come from where pip is configured to take them from.
"""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mqa_jax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# What work leaves at the top of a checkout.
LEFT = {".git", ".venv", "build", "data", "dist", "mqa_jax.egg-info", "runs"}
# What training, data and pictures stand on, and nobody who imports a module should have to install.
EXTRAS = ("grain", "matplotlib", "ml_collections", "sentencepiece", "tensorflow_datasets")
TINY = [
    "--config=configs/quickstart.py",
    "--config.model.d_model=16",
    "--config.model.d_ff=24",
    "--config.data.splits.train=train[:2%]",
    "--config.train.steps=2",
    "--config.train.batch_size=2",
    "--config.evaluate.lines=2",
    "--workdir=run",
]


def run(*args, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    # Neither the repository nor what is installed beside these tests may be seen.
    environment = dict(PATH="/usr/bin:/bin", HOME=str(Path.home()), JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    result = subprocess.run(
        list(map(str, args)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0 or not check, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The source archive and the wheel, built from the archive."""
    directory = tmp_path_factory.mktemp("dist")
    source = directory / "source"
    shutil.copytree(
        ROOT, source, ignore=lambda folder, _: LEFT if Path(folder) == ROOT else {"__pycache__"}
    )
    subprocess.run([sys.executable, "-m", "build", "--outdir", directory, source], check=True)
    return directory


def install(programs: Path, dist: Path, extra: str = "") -> None:
    (wheel,) = dist.glob("*.whl")
    # That of these tests: the environment needs none of its own.
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    pip += ["install", "--quiet", "--no-compile"]
    subprocess.run([*pip, f"{wheel}{extra}"], check=True, cwd=programs)


def files(*patterns: str, under: Path) -> set[str]:
    found = (path for pattern in patterns for path in under.glob(pattern) if path.is_file())
    return {path.relative_to(under).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_archives_are_whole(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(
            archive.read(next(name for name in names if name.endswith("/METADATA")))
        )
    wanted = files("**/*.py", "py.typed", under=ROOT / "mqa_jax")
    wanted |= {f"configs/{name}" for name in files("*.py", under=ROOT / "configs")}
    assert {f"mqa_jax/{name}" for name in wanted} == {n for n in names if n.startswith("mqa_jax/")}
    assert any(name.endswith("/LICENSE") for name in names)
    assert metadata["Version"] == mqa_jax.__version__
    assert any("github.com/mqa-jax/mqa_jax" in url for url in metadata.get_all("Project-URL"))

    page = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links and all(re.match("https?://|#", link) for link in links)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    root = "https://raw.githubusercontent.com/mqa-jax/mqa_jax/main/"
    assert pictures and all((ROOT / picture.removeprefix(root)).exists() for picture in pictures)

    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("mqa_jax", "configs", "tests", "docs", "benchmarks")
    wanted = files(*(f"{folder}/**/*" for folder in folders), under=ROOT)
    wanted |= files("*.py", "*.md", "*.toml", "*.cfg", "Makefile", "LICENSE", ".ci/*", under=ROOT)
    assert wanted <= names


def test_the_core_alone_and_what_train_adds(dist, tmp_path):
    """In one environment, to which the extra is added as whoever misses it would add it."""
    venv.create(tmp_path / "venv", with_pip=False)
    programs = tmp_path / "venv" / "bin"
    install(programs, dist)
    check_the_core_alone(programs, tmp_path)
    install(programs, dist, "[train]")
    check_train(programs, tmp_path / "work")


def check_the_core_alone(programs, tmp_path):
    """The README's example runs with the core; what is missing is said in one line."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run(programs / "python", "-c", snippet, cwd=tmp_path)
    installed = run(
        programs / "python",
        "-c",
        "import importlib.util, mqa_jax; print(mqa_jax.__version__); "
        f"print([n for n in {EXTRAS} if importlib.util.find_spec(n)])",
        cwd=tmp_path,
    )
    assert installed.stdout == f"{mqa_jax.__version__}\n[]\n"

    run(programs / "mqa-jax", "--help", cwd=tmp_path)
    for extra, command in (
        ("train", ["train", *TINY]),
        ("train", ["decode", "--workdir=run"]),
        ("plot", ["benchmark", "--config=configs/quickstart.py", "--output_dir=out"]),
    ):
        result = run(programs / "mqa-jax", *command, cwd=tmp_path, check=False)
        (line,) = result.stderr.splitlines()
        assert line.endswith(f'pip install "mqa_jax[{extra}]"') and result.returncode == 2
    for extra, module in (("train", "train.loop"), ("train", "data"), ("plot", "measure.report")):
        program = f"import mqa_jax.{module}"
        result = run(programs / "python", "-c", program, cwd=tmp_path, check=False)
        assert result.stderr.splitlines()[-1].endswith(f'pip install "mqa_jax[{extra}]"')


def check_train(programs, work):
    """A model trains and decodes with [train] alone, from a directory that has nothing of ours."""
    work.mkdir()
    run(programs / "mqa-jax", "train", *TINY, cwd=work)
    (work / "in.txt").write_text("two hundred and five dollars\nseven\n")
    decode = ["decode", "--workdir=run", "--input=in.txt", "--output=out.txt", "--max_new_tokens=3"]
    run(programs / "mqa-jax", *decode, cwd=work)
    assert len((work / "out.txt").read_text().splitlines()) == 2
    # What was installed for the core alone is not asked for the pictures either.
    result = run(programs / "python", "-m", "mqa_jax", "benchmark", cwd=work, check=False)
    assert result.stderr.splitlines()[-1].endswith('pip install "mqa_jax[plot]"')
