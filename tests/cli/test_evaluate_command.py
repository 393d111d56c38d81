"""`evaluate` as a user types it: the figures of training, of other text, on one device or many."""

import json
import re
import shutil

import numpy as np
import pytest
from checkpoints import WORDS, write, write_words
from running import prepared, records, run_well

from mqa_jax import hub
from mqa_jax.cli import main

# Id 0 is a word like others.
LINES = ["w3 w17 w0 w0 w5", "w29 w0", "", "w0", "w11 w2 w2 w30 w8 w21"]


@pytest.fixture
def evaluate(project, tmp_path, monkeypatch, capfd):
    """Flags -> the figures, by their names, and what is printed."""
    # The run's data lies where it was trained.
    monkeypatch.chdir(project)

    def figures(*flags):
        code = main(["evaluate", *map(str, flags), f"--output={tmp_path}/figures.json"])
        printed = capfd.readouterr()
        assert code == 0, printed.err
        return json.loads((tmp_path / "figures.json").read_text()), printed.out

    return figures


def same(one, other):
    assert one.pop("signatures") == other.pop("signatures")
    assert one == pytest.approx(other, rel=1e-5)


def test_the_figures_are_those_of_training_and_of_the_same_text(project, tmp_path, evaluate):
    split, printed = evaluate("--workdir=run", "--split=validation", "--batch_size=3")
    (logged,) = records(project / "run", "validation")
    for name in ("loss", "ln_perplexity", "accuracy", "tokens"):
        assert split[name] == pytest.approx(logged[name], rel=1e-5)
    assert split["perplexity"] == pytest.approx(np.exp(logged["ln_perplexity"]), rel=1e-5)
    for text in ("loss ", " a token, of ", "BLEU ", "chrF ", "(nrefs:1|case:mixed", "exact match"):
        assert text in printed
    assert "words" not in split

    output = tmp_path / "out"
    source, reference = f"--input={project}/val.en", f"--reference={project}/val.de"
    text, _ = evaluate("--workdir=run", source, reference)
    same(text, split)
    # BLEU is of what decode gives with the same flags.
    beams = ["--beam_size=3", "--max_new_tokens=9"]
    assert main(["decode", "--workdir=run", source, f"--output={output}", *beams]) == 0
    against, _ = evaluate("--workdir=run", source, f"--reference={output}", *beams)
    assert against["exact_match"] == 1 and against["loss"] != text["loss"]


def test_weights_in_eight_bits(project, evaluate):
    """Which all devices have, and which change the figures by little."""
    flags = ["--workdir=run", "--split=test", "--max_new_tokens=9"]
    wide, _ = evaluate(*flags)
    losses = {wide["loss"]}
    for scheme, most in (("int8", 2e-2), ("int8_weights", 2e-2)):
        found, _ = evaluate(*flags, f"--quantize={scheme}")
        assert found["loss"] == pytest.approx(wide["loss"], rel=most)
        losses.add(found["loss"])
    assert len(losses) == 3


@pytest.mark.slow
def test_eight_devices_find_what_one_does(project, tmp_path, evaluate):
    flags = ["--workdir=run", "--split=test", "--beam_size=2", "--step=6"]
    ours, _ = evaluate(*flags)
    command = ["-m", "mqa_jax", "evaluate", *flags, f"--output={tmp_path}/one.json"]
    run_well(*command, cwd=project, devices=1)
    same(json.loads((tmp_path / "one.json").read_text()), ours)


def test_a_language_model_by_hand(tmp_path, evaluate):
    directory = write_words(write(tmp_path / "gpt2", "gpt2"))
    (directory / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[4, 9])))
    (tmp_path / "text").write_text("\n".join(LINES) + "\n")
    found, printed = evaluate(f"--model={directory}", f"--input={tmp_path}/text")
    model, total, tokens = hub.load(directory).model, 0.0, 0
    for line in filter(None, LINES):
        ids = [WORDS[word] for word in line.split()]
        logits = np.asarray(model(np.array([ids])), np.float64)[0]
        logits -= logits.max(axis=-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        # The first word has nothing in front, and is not predicted.
        total += log_probs[np.arange(len(ids)), [*ids[1:], 4]].sum()
        tokens += len(ids)
    assert found["tokens"] == tokens == 14
    assert found["perplexity"] == pytest.approx(np.exp(-total / tokens), rel=1e-5)
    words = sum(len(line.split()) + 1 for line in filter(None, LINES))
    assert found["words"] == words == 18 and "a word, of 18" in printed
    assert found["perplexity_per_word"] == pytest.approx(np.exp(-total / words), rel=1e-5)
    assert "bleu" not in found


def refused(capfd, *flags):
    assert main(["evaluate", *map(str, flags)]) == 2
    errors = capfd.readouterr().err
    assert re.fullmatch(r"(1 of .*\n)?error: (.|\n)*\n", errors), errors
    return errors


def test_what_cannot_be_evaluated_is_refused(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(project)
    run, text = "--workdir=run", f"--input={project}/val.en"
    assert "give --split, of the run's data, or --input" in refused(capfd, run)
    assert "one of them" in refused(capfd, run, text, "--split=test")
    assert "--split: of no effect without --workdir" in refused(capfd, "--model=x", "--split=test")
    assert "--data_dir: of no effect without" in refused(capfd, run, text, "--data_dir=x")
    assert "by the right lines: give --reference" in refused(capfd, run, text)
    test = f"--reference={project}/test_2016_flickr.de"
    assert "has 6 lines" in refused(capfd, run, text, test)
    assert "--alpha: of no effect without a" in refused(capfd, run, "--split=test", "--alpha=1")
    error = refused(capfd, run, "--split=test", "--quantize=fp8")
    assert "--quantize=fp8: the device here, cpu, has no products of float8" in error
    output = "--output=nowhere/figures.json"
    assert "there is no directory nowhere" in refused(capfd, run, "--split=test", output)
    for output in (".", "run", "/dev/null"):
        error = refused(capfd, run, "--split=test", f"--output={output}")
        assert f"--output {output} is there, and is no file" in error
    long, blank = tmp_path / "long", tmp_path / "blank"
    long.write_text("\none two\n" + "three " * 60 + "\n")
    error = refused(capfd, run, f"--input={long}", f"--reference={long}")
    assert f"{long}, line 3 has 362 tokens, and the model knows 40 positions (and 1 more" in error
    short = tmp_path / "short"
    short.write_text("\none two\nthree\n")
    error = refused(capfd, run, f"--input={short}", f"--reference={long}")
    assert f"{long}, line 3 has" in error and "positions: shorten or split" in error
    blank.write_text("\n\n")
    error = refused(capfd, run, f"--input={blank}", f"--reference={blank}")
    assert "has no line that is not blank" in error


def test_no_text_is_written_over(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(project)
    for name in ("input", "reference"):
        (tmp_path / name).write_text("one\n")
    (tmp_path / "link").symlink_to("reference")
    given = [f"--{name}={tmp_path / name}" for name in ("input", "reference")]
    for output, name in {"input": "input", "link": "reference"}.items():
        error = refused(capfd, "--workdir=run", *given, f"--output={tmp_path / output}")
        assert f"is the --{name} too: give another one" in error
        assert (tmp_path / name).read_text() == "one\n"


def test_a_run_that_does_not_say_what_its_data_was(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(project)
    own = shutil.copytree(project / "run", tmp_path / "own")
    about = json.loads((own / "data.json").read_text())
    del about["manifest"]  # Version 0.1 kept the tokenizer alone.
    (own / "data.json").write_text(json.dumps(about))
    error = refused(capfd, f"--workdir={own}", "--split=test")
    assert "no data.json that says what data" in error and "give --input" in error


def test_the_data_is_the_run_s_wherever_it_lies(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = [f"--workdir={project}/run", "--split=test"]
    assert "give --data_dir" in refused(capfd, *run)
    data = shutil.copytree(prepared(project), tmp_path / "moved")
    assert main(["evaluate", *run, f"--data_dir={data}", "--max_new_tokens=3"]) == 0
    with (data / "test.de.txt").open("a") as file:
        file.write("eins\n")
    assert "test.de.txt has " in refused(capfd, *run, f"--data_dir={data}")
    lines = json.loads((data / "manifest.json").read_text())
    lines["files"]["test.de.txt"]["size"] = 1
    (data / "manifest.json").write_text(json.dumps(lines))
    assert "is not as it was written" in refused(capfd, *run, f"--data_dir={data}")
    own = shutil.copytree(project / "run", tmp_path / "own")
    about = json.loads((own / "data.json").read_text())
    about["manifest"]["request"]["target_length"] = 9
    (own / "data.json").write_text(json.dumps(about))
    run[0] = f"--workdir={own}"
    error = refused(capfd, *run, f"--data_dir={prepared(project)}")
    assert "is not the data of" in error and "target_length: 9 there, 40 asked" in error
