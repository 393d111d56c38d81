"""Training as a user types it: prepare, train, kill, resume; and the quickstart as a whole."""

import json

import pytest
from running import (
    ROOT,
    losses,
    records,
    run,
    run_well,
    train,
    train_args,
)

from mqa_jax.train.optimizer import rsqrt_schedule


def test_training_reports_progress_and_leaves_what_decoding_needs(project):
    assert sorted(losses(project / "run")) == list(range(1, 9))
    names = {path.name for path in (project / "run").iterdir()}
    assert {"config.json", "tokenizer.model", "checkpoints", "metrics.jsonl"} <= names
    assert all(record["tokens_per_second"] > 0 for record in records(project / "run"))
    (validation,) = records(project / "run", "validation")
    assert {"loss", "ln_perplexity", "bleu"} <= validation.keys()


def test_the_rate_that_is_logged_is_that_of_the_step(project):
    config = json.loads((project / "run/config.json").read_text())["train"]
    names = ("hold_steps", "warmup_steps", "decay_steps")
    options = {name: config[name] for name in names}
    schedule = rsqrt_schedule(config["learning_rate"], config["steps"], **options)
    logged = {record["step"]: record["learning_rate"] for record in records(project / "run")}
    # The first step is that of position 0.
    assert logged == pytest.approx({step: float(schedule(step - 1)) for step in range(1, 9)})
    assert len({*logged.values()}) > 1


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


@pytest.mark.slow
def test_quickstart_learns_to_translate_phrases_it_has_never_seen(tmp_path):
    """In 200 of its 500 steps, most of them; in all, 99 of 100."""
    run_well(
        ROOT / "train.py",
        f"--config={ROOT}/configs/quickstart.py",
        "--config.train.steps=200",
        "--config.train.decay_steps=100",
        "--config.train.evaluate_every=200",
        "--config.evaluate.lines=0",
        "--workdir=run",
        cwd=tmp_path,
        is_optimized=True,
    )
    data = tmp_path / "data/number_phrases"
    for side in ("en", "de"):
        lines = (data / f"test.{side}.txt").read_text().splitlines(keepends=True)
        (tmp_path / f"test.{side}").write_text("".join(lines[:500]))
    result = run_well(
        ROOT / "decode.py",
        "--workdir=run",
        "--input=test.en",
        "--output=out.txt",
        "--reference=test.de",
        cwd=tmp_path,
        is_optimized=True,
    )
    outputs = (tmp_path / "out.txt").read_text().splitlines()
    references = (tmp_path / "test.de").read_text().splitlines()
    pairs = list(zip(outputs, references, strict=True))
    assert len(pairs) == 500
    assert sum(a == b for a, b in pairs) >= 0.8 * len(pairs), result.stderr
