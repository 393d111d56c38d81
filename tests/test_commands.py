"""The command lines, as a user types them: prepare, train, kill, resume, decode, benchmark."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    "--config.data.vocab_size=288",
    "--config.data.source_length=40",
    "--config.data.target_length=40",
    "--config.train.steps=8",
    "--config.train.batch_size=4",
    "--config.train.log_every=1",
    "--config.train.evaluate_every=8",
    "--config.train.checkpoint_every=3",
    "--config.evaluate.lines=5",
    "--config.evaluate.batch_size=4",
]


def command(*args, cwd: Path) -> dict:
    # One device, as a user has it; the tests' eight are for the tests of shardings.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # Programs that an earlier command has compiled need not be compiled again.
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla")}
    return dict(args=[sys.executable, *map(str, args)], cwd=cwd, env=environment, text=True)


def run(*args, cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(**command(*args, cwd=cwd), capture_output=True, timeout=1800, **options)


def run_well(*args, cwd: Path, **options) -> subprocess.CompletedProcess:
    result = run(*args, cwd=cwd, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def losses(workdir: Path) -> dict[int, float]:
    """The train loss of every step; where a step was done twice, the later one."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A directory with parallel text and, under `run`, a model trained on it."""
    directory = tmp_path_factory.mktemp("project")
    rng = random.Random(0)
    for stem, count in (("train", 120), ("val", 7), ("test_2016_flickr", 6)):
        pairs = [rng.choices(list(DIGITS.items()), k=rng.randint(1, 6)) for _ in range(count)]
        for side, language in enumerate(("en", "de")):
            lines = [" ".join(pair[side] for pair in line) for line in pairs]
            (directory / f"{stem}.{language}").write_text("\n".join(lines) + "\n")
    train(directory, "run")
    return directory


def train_args(directory: Path, workdir: str, *overrides: str) -> list[str]:
    return [
        ROOT / "train.py",
        *TINY,
        f"--config.data.path={directory}",
        f"--workdir={workdir}",
        *overrides,
    ]


def train(directory: Path, workdir: str, *overrides: str) -> subprocess.CompletedProcess:
    return run_well(*train_args(directory, workdir, *overrides), cwd=directory)


def test_training_reports_progress_and_leaves_what_decoding_needs(project):
    assert sorted(losses(project / "run")) == list(range(1, 9))
    names = {path.name for path in (project / "run").iterdir()}
    assert {"config.json", "tokenizer.model", "checkpoints", "metrics.jsonl"} <= names
    records = [
        json.loads(line) for line in (project / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert all(r["tokens_per_second"] > 0 for r in records if r["kind"] == "train")
    (validation,) = (record for record in records if record["kind"] == "validation")
    assert {"loss", "ln_perplexity", "bleu"} <= validation.keys()


def test_a_killed_run_resumes_with_the_same_losses(project):
    # Steps 1 to 3 are in a checkpoint; the kill comes somewhere behind it.
    process = subprocess.Popen(
        **command(*train_args(project, "killed"), cwd=project),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics, checkpoint = project / "killed/metrics.jsonl", project / "killed/checkpoints/3"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and checkpoint.exists() and len(losses(project / "killed")) >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = train(project, "killed")
    assert "step 0 to 8" not in result.stdout
    assert losses(project / "killed") == losses(project / "run")


def test_a_finished_run_is_left_as_it_is(project):
    before = (project / "run/metrics.jsonl").read_text()
    train(project, "run")
    assert (project / "run/metrics.jsonl").read_text() == before


def test_another_config_in_the_same_workdir_is_refused(project):
    args = train_args(project, "run", "--config.train.seed=5", "--config.model.window=3")
    result = run(*args, cwd=project)
    assert result.returncode != 0
    assert "config.train.seed: 0 there, 5 asked" in result.stderr
    assert "config.model.window: None there, 3 asked" in result.stderr


@pytest.mark.parametrize(
    "search",
    [[], ["--beam_size=3"], ["--sample", "--temperature=0.8", "--top_k=9", "--top_p=0.9"]],
    ids=["greedy", "beam", "sample"],
)
def test_decode_writes_a_line_for_each_and_prints_figures(project, tmp_path, search):
    decode = [ROOT / "decode.py", f"--workdir={project}/run", "--batch_size=4", *search]
    source, reference = project / "test_2016_flickr.en", project / "test_2016_flickr.de"
    output = tmp_path / "out.de"
    result = run_well(
        *decode,
        f"--input={source}",
        f"--output={output}",
        f"--reference={reference}",
        cwd=tmp_path,
    )
    assert output.read_text().count("\n") == 6
    for text in ("6 lines", "tokens/s", "ms per step", "BLEU", "nrefs:1", "exact match"):
        assert text in result.stderr
    # The same from standard input to standard output, in another order and other batches.
    lines = source.read_text().splitlines()
    if "--sample" not in search:  # what a line draws depends on where it stands
        piped = run_well(*decode, cwd=tmp_path, input="\n".join(lines[::-1]) + "\n")
        assert piped.stdout.splitlines()[::-1] == output.read_text().splitlines()


def test_decode_refuses_a_line_without_room(project, tmp_path):
    text = "one two\n" + "three " * 60 + "\n"
    result = run(ROOT / "decode.py", f"--workdir={project}/run", cwd=tmp_path, input=text)
    assert result.returncode != 0 and "line 2 has" in result.stderr and result.stdout == ""


def test_decode_refuses_a_directory_without_a_run(tmp_path):
    result = run(ROOT / "decode.py", f"--workdir={tmp_path}", cwd=tmp_path, input="one\n")
    assert result.returncode != 0 and "config.json" in result.stderr


def run_decode(setup: str) -> str:
    """A program that is decode.py behind some lines of setup."""
    return (
        f"import runpy, signal, sys; {setup}; sys.argv = sys.argv[1:];"
        f"runpy.run_path({str(ROOT / 'decode.py')!r}, run_name='__main__')"
    )


def test_benchmark_needs_jax_and_flax_alone(tmp_path):
    # Not to be found, as where they are not installed. Flax itself wants optax and msgpack.
    absent = ("grain", "orbax", "sentencepiece", "tensorflow_datasets", "sacrebleu", "tensorboardX")
    result = run_well(
        "-c",
        run_decode(f"sys.modules.update(dict.fromkeys({absent}))"),
        "decode.py",
        "--benchmark",
        *TINY[:7],
        "--variants=multi_head,multi_query",
        "--searches=greedy,beam",
        "--batch_sizes=3",
        "--context_lengths=40",
        "--dtypes=float32",
        "--repeats=2",
        "--compare=paper",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert "multi_query" in result.stdout and "12.11" in result.stdout  # 46 / 3.8, the paper's
    content = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert len(content["costs"]) == 2 * 2 and content["is_complete"]
    assert all(cost["step_ms"] > 0 for cost in content["costs"])
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        "roofline_greedy_float32",
        "roofline_beam_float32",
    }


def test_an_interrupted_benchmark_keeps_its_rows(tmp_path):
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    setup = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    args = [*TINY[:7], "--batch_sizes=2,3", "--context_lengths=11,13,17,19", "--output_dir=out"]
    process = subprocess.Popen(
        **command("-c", run_decode(setup), "decode.py", "--benchmark", *args, cwd=tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    path = tmp_path / "out/benchmark.json"
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors[-3000:]
    content = json.loads(path.read_text())
    assert 1 <= len(content["costs"]) < 4 * 2 * 4 and not content["is_complete"]
    assert "interrupted" in errors and "The cost of decoding" in printed
    assert any((tmp_path / "out").glob("roofline_*.png"))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--variants=multi_query", "--compare=paper"], "and multi_head"),
        (["--batch_sizes=2,two"], "--batch_sizes takes whole numbers, not ['2', 'two']"),
        (["--context_lengths=8,1"], "a context length of 1 is too short"),
        (["--context_lengths=3000000"], "GB, but the device has"),
        (["--variants=many_query"], "'many_query' is not one of"),
    ],
    ids=str,
)
def test_a_benchmark_that_cannot_be_is_refused(args, reason, tmp_path):
    options = ["--benchmark", *TINY[:7], "--output_dir=out", *args]
    result = run(ROOT / "decode.py", *options, cwd=tmp_path)
    assert result.returncode != 0 and reason in result.stdout + result.stderr
    assert not list(tmp_path.glob("out/*"))


def test_a_quick_benchmark_is_small_where_no_flag_says_otherwise(tmp_path):
    options = ["--benchmark", "--quick", *TINY[:7], "--context_lengths=11,13", "--output_dir=out"]
    run_well(ROOT / "decode.py", *options, cwd=tmp_path)
    rows = json.loads((tmp_path / "out/benchmark.json").read_text())["costs"]
    assert [(row["variant"], row["batch"], row["context_length"]) for row in rows] == [
        ("multi_head", 8, 11),
        ("multi_head", 8, 13),
        ("multi_query", 8, 11),
        ("multi_query", 8, 13),
    ]
    assert (tmp_path / f"out/step_cost_greedy_{rows[0]['dtype']}_batch_8.png").exists()


@pytest.mark.parametrize(
    "args", [[], ["--benchmark"], ["--workdir=x", "--sample", "--beam_size=2"]], ids=str
)
def test_unusable_flags_end_with_usage_or_reason(args, tmp_path):
    result = run(ROOT / "decode.py", *args, cwd=tmp_path, input="")
    assert result.returncode != 0 and result.stdout + result.stderr


@pytest.mark.slow
def test_quickstart_learns_to_translate_phrases_it_has_never_seen(tmp_path):
    run_well(
        ROOT / "train.py", f"--config={ROOT}/configs/quickstart.py", "--workdir=run", cwd=tmp_path
    )
    data = tmp_path / "data/number_phrases"
    result = run_well(
        ROOT / "decode.py",
        "--workdir=run",
        f"--input={data}/test.en.txt",
        "--output=out.txt",
        f"--reference={data}/test.de.txt",
        cwd=tmp_path,
    )
    outputs = (tmp_path / "out.txt").read_text().splitlines()
    references = (data / "test.de.txt").read_text().splitlines()
    pairs = list(zip(outputs, references, strict=True))
    assert len(pairs) >= 500
    assert sum(a == b for a, b in pairs) >= 0.98 * len(pairs), result.stderr
