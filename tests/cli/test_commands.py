"""The command lines, as a user types them: prepare, train, kill, resume, decode, benchmark."""

import json
import signal
import subprocess
import time

import pytest
from running import (
    ROOT,
    TINY,
    Running,
    behind,
    checkpoints,
    command,
    losses,
    records,
    run,
    run_well,
    train,
    train_args,
)


def test_training_reports_progress_and_leaves_what_decoding_needs(project):
    assert sorted(losses(project / "run")) == list(range(1, 9))
    names = {path.name for path in (project / "run").iterdir()}
    assert {"config.json", "tokenizer.model", "checkpoints", "metrics.jsonl"} <= names
    assert all(record["tokens_per_second"] > 0 for record in records(project / "run"))
    (validation,) = records(project / "run", "validation")
    assert {"loss", "ln_perplexity", "bleu"} <= validation.keys()


def test_a_killed_run_resumes_with_the_same_losses(project):
    # Steps 1 to 3 are in a checkpoint; the kill comes somewhere behind it.
    with Running(project, "killed") as killed:
        killed.until(lambda: checkpoints(killed.workdir) and len(losses(killed.workdir)) >= 4)
        killed.send(signal.SIGKILL)
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


def test_benchmark_needs_jax_and_flax_alone(tmp_path):
    # Not to be found, as where they are not installed. Flax itself wants optax and msgpack.
    absent = ("grain", "orbax", "sentencepiece", "tensorflow_datasets", "sacrebleu", "tensorboardX")
    result = run_well(
        "-c",
        behind(f"sys.modules.update(dict.fromkeys({absent}))"),
        ROOT / "decode.py",
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
    args = [*TINY[:7], "--batch_sizes=2,3", "--context_lengths=11,13,17,19", "--output_dir=out"]
    process = subprocess.Popen(
        **command("-c", behind(""), ROOT / "decode.py", "--benchmark", *args, cwd=tmp_path),
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
