"""The command lines as the tests run them: a tiny model, and text made on the spot."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Programs that an earlier test or command has compiled, small ones too, need not be compiled again.
CACHED = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
DIGITS = dict(
    zero="null", one="eins", two="zwei", three="drei", four="vier", five="fünf", six="sechs"
)
TINY = [
    f"--config={ROOT}/configs/multi30k.py:multi_query",
    "--config.model.d_model=24",
    "--config.model.d_ff=40",
    "--config.model.num_layers=1",
    "--config.model.head_dim=8",
    "--config.model.max_length=40",
    "--config.model.dtype=float32",
    "--config.data.vocab_size=288",
    "--config.data.source_length=40",
    "--config.data.target_length=40",
    "--config.train.steps=8",
    "--config.train.batch_size=4",
    "--config.train.log_every=1",
    "--config.train.evaluate_every=8",
    "--config.train.checkpoint_every=3",
    "--config.evaluate.lines=0",
    "--config.evaluate.batch_size=4",
]
# To translate lines takes as long as all else in so short a run.
WITH_BLEU = "--config.evaluate.lines=5"


def write_text(directory: Path) -> None:
    """Number words in English and German, with the file names of Multi30k."""
    rng = random.Random(0)
    for stem, count in (("train", 120), ("val", 7), ("test_2016_flickr", 6)):
        pairs = [rng.choices(list(DIGITS.items()), k=rng.randint(1, 6)) for _ in range(count)]
        for side, language in enumerate(("en", "de")):
            lines = [" ".join(pair[side] for pair in line) for line in pairs]
            (directory / f"{stem}.{language}").write_text("\n".join(lines) + "\n")


def command(
    *args, cwd: Path, devices: int = 1, is_optimized: bool = False, **environment: str
) -> dict:
    # One device, as a user has it; the tests' eight are for the tests of shardings. Of LLVM's
    # optimizations none, as there, but in a run that is long for a test.
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags += "" if is_optimized else " --xla_backend_optimization_level=0"
    environment |= {"XLA_FLAGS": flags}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= CACHED
    return dict(
        args=[sys.executable, *map(str, args)], cwd=cwd, env=os.environ | environment, text=True
    )


def run(
    *args, cwd: Path, devices: int = 1, is_optimized: bool = False, **options
) -> subprocess.CompletedProcess:
    started = command(*args, cwd=cwd, devices=devices, is_optimized=is_optimized)
    return subprocess.run(**started, capture_output=True, timeout=1800, **options)


def run_well(*args, cwd: Path, **options) -> subprocess.CompletedProcess:
    """As `run`, for what must succeed."""
    result = run(*args, cwd=cwd, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def behind(setup: str) -> str:
    """A program that is the script of its first argument, behind some lines of setup."""
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    return (
        "import runpy, signal, sys; sys.argv = sys.argv[1:]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{setup}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )


def train_args(directory: Path, workdir: str, *overrides: str) -> list[str]:
    tiny = TINY
    if any(override.startswith("--config.init_from=") for override in overrides):
        # Whose model it is.
        own = re.compile(r"--config\.(model\.(?!dtype)|data\.vocab_size)")
        tiny = [arg for arg in TINY if not own.match(arg)]
    return [
        ROOT / "train.py",
        *tiny,
        f"--config.data.path={directory}",
        f"--workdir={workdir}",
        *overrides,
    ]


def train(directory: Path, workdir: str, *overrides: str) -> subprocess.CompletedProcess:
    return run_well(*train_args(directory, workdir, *overrides), cwd=directory)


class Running:
    """A training run under way, in one process or in several; output goes to a file each.

    Args:
      directory: with the text.
      workdir: a name in it.
      overrides: further arguments.
      processes: that share the work.
      devices: of each process.
      setup: Python to run in each before train.py.
    """

    def __init__(
        self,
        directory: Path,
        workdir: str,
        *overrides: str,
        processes: int = 1,
        devices: int = 1,
        setup: str = "pass",
    ):
        self.workdir = directory / workdir
        environments = [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            overrides += ("--distributed",)
            environments = [
                dict(
                    JAX_COORDINATOR_ADDRESS=address,
                    JAX_NUM_PROCESSES=str(processes),
                    JAX_PROCESS_ID=str(i),
                )
                for i in range(processes)
            ]
        args = ["-c", behind(setup), *train_args(directory, workdir, *overrides)]
        self._files = [directory / f"{workdir}.{i}.txt" for i in range(processes)]
        self.processes = []
        for environment, path in zip(environments, self._files, strict=True):
            with path.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        **command(*args, cwd=directory, devices=devices, **environment),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self) -> str:
        return "\n".join(path.read_text() for path in self._files)

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not is_so():
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes) and time.monotonic() < deadline, self.output()
            time.sleep(0.005)

    def until_step(self, step: int) -> None:
        self.until(lambda: max(losses(self.workdir), default=0) >= step)

    def send(self, number: signal.Signals) -> None:
        """To the last process."""
        self.processes[-1].send_signal(number)

    def exit_codes(self) -> list[int]:
        return [process.wait(timeout=600) for process in self.processes]


def records(workdir: Path, kind: str = "train") -> list[dict]:
    path = workdir / "metrics.jsonl"
    # A line without an end is being written, or was when the run was killed.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(workdir: Path) -> dict[int, float]:
    """The train loss of every step; where a step was done twice, the later one."""
    return {record["step"]: record["loss"] for record in records(workdir) if "loss" in record}


def checkpoints(workdir: Path) -> list[int]:
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def prepared(directory):
    """The data that runs in a directory prepared, but for that of a tokenizer that was given."""
    (manifest,) = (
        manifest
        for manifest in directory.glob("data/*/manifest.json")
        if "tokenizer" not in json.loads(manifest.read_text())["request"]
    )
    return manifest.parent
