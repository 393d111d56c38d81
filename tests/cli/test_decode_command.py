"""`decode` as a user types it: text in, text out, and what is refused."""

import dataclasses
import gzip
import re
import shutil
import subprocess
import time

import pytest
from absl.flags import FlagValues
from running import ROOT, behind, command, run_well

from mqa_jax.cli import decode as decode_command
from mqa_jax.cli import main
from mqa_jax.cli.source import Source
from mqa_jax.decode.beam import TRANSFORMERS, BeamRules
from mqa_jax.train import workdir


@pytest.mark.parametrize(
    "search",
    [[], ["--beam_size=3"], ["--sample", "--temperature=0.8", "--top_k=9", "--top_p=0.9"]],
    ids=["greedy", "beam", "sample"],
)
def test_decode_writes_a_line_for_each_and_prints_figures(project, tmp_path, capfd, search):
    source, reference = project / "test_2016_flickr.en", project / "test_2016_flickr.de"
    output, options = tmp_path / "out.de", ["--batch_size=4", *search]
    files = [f"--input={source}", f"--output={output}", f"--reference={reference}"]
    assert decode(project, *options, *files) == 0
    assert output.read_text().count("\n") == 6
    figures = capfd.readouterr().err
    for text in ("6 lines", "tokens/s", "ms per step", "BLEU", "nrefs:1", "exact match"):
        assert text in figures
    if not search:
        # The same from standard input to standard output, in another order and other batches, by
        # the script.
        lines = source.read_text().splitlines()
        script = [ROOT / "decode.py", f"--workdir={project}/run", *options]
        piped = run_well(*script, cwd=tmp_path, input="\n".join(lines[::-1]) + "\n")
        assert piped.stdout.splitlines()[::-1] == output.read_text().splitlines()


def decode(project, *args):
    return main(["decode", f"--workdir={project}/run", *map(str, args)])


def test_n_best_outputs_and_scores_of_given_ones(project, capfd):
    source = project / "test_2016_flickr.en"
    beams = ["--beam_size=3", "--beam_rules=transformers", "--alpha=0", "--max_new_tokens=40"]
    assert decode(project, f"--input={source}", "--n_best=2", *beams) == 0
    rows = [line.split(" ||| ") for line in capfd.readouterr().out.splitlines()]
    assert [number for number, _, _ in rows] == [str(i) for i in range(6) for _ in range(2)]
    best = rows[::2]
    for (_, _, first), (_, _, second) in zip(best, rows[1::2], strict=True):
        assert float(first) >= float(second)
    assert decode(project, f"--input={source}", *beams) == 0
    assert capfd.readouterr().out.splitlines() == [text for _, text, _ in best]
    given = project / "test_2016_flickr.de"
    assert decode(project, f"--input={source}", f"--reference={given}", "--score") == 0
    scores = list(map(float, capfd.readouterr().out.splitlines()))
    assert len(scores) == 6 and all(score < 0 for score in scores)


@pytest.mark.parametrize(
    ("flags", "rules"),
    [
        ([], BeamRules()),
        (["--beam_rules=transformers"], TRANSFORMERS),
        *(
            (
                ["--beam_rules=transformers", f"--early_stopping={text}"],
                dataclasses.replace(TRANSFORMERS, early_stopping=value),
            )
            for text, value in (("true", True), ("false", False), ("never", "never"))
        ),
        (["--early_stopping=never"], BeamRules(early_stopping="never")),
    ],
)
def test_flags_choose_the_rules_of_a_beam_search(flags, rules):
    args = FlagValues()
    decode_command.define(args)
    args(["decode", "--beam_size=3", *flags])
    source = Source(None, None, None, bos_id=0, eos_ids=(1,))
    assert decode_command.build_search(args, source).keywords["beam_rules"] == rules


def test_a_step_or_a_mean_is_decoded(project, tmp_path, capfd):
    shutil.copytree(project / "run", tmp_path / "run")
    text = f"--input={project}/val.en"

    def outputs(*flags):
        code = main(["decode", f"--workdir={tmp_path}/run", text, "--max_new_tokens=9", *flags])
        printed, errors = capfd.readouterr()
        return (printed if code == 0 else errors), code

    newest, code = outputs()
    assert code == 0 and outputs("--step=8")[0] == newest
    assert outputs("--average=2")[1] == outputs("--step=6", "--average=1")[1] == 0
    main(["decode", f"--workdir={tmp_path}/run", text, "--max_new_tokens=9", "--average=2"])
    assert "weights: the mean of 2 checkpoints up to that of step 8\n" in capfd.readouterr().err
    errors, code = outputs("--step=7")
    assert code == 2 and "no checkpoint of step 7" in errors and "of steps 8, 6\n" in errors
    for precision in (["--quantize=int8", "--cache_dtype=int8"], ["--cache_dtype=fp8"]):
        lines, code = outputs(*precision, "--step=8")
        assert code == 0 and len(lines.splitlines()) == len(newest.splitlines())
    errors, code = outputs("--step=best")
    assert code == 2 and "trained without --config.train.best" in errors and "8, 6\n" in errors
    errors, code = outputs("--step=6", "--average=2")
    assert code == 2 and "has 1 checkpoints up to step 6, of steps 6;" in errors
    assert "--config.train.keep_checkpoints" in errors


def test_rules_and_stops(project, capfd):
    source = project / "test_2016_flickr.en"
    assert decode(project, f"--input={source}", "--max_new_tokens=30") == 0
    plain = capfd.readouterr().out.splitlines()
    letter = max("".join(plain), key="".join(plain).count)
    assert decode(project, f"--input={source}", "--max_new_tokens=30", f"--stop={letter}") == 0
    assert capfd.readouterr().out.splitlines() == [text.split(letter)[0] for text in plain]
    rules = ["--repetition_penalty=1.5", "--no_repeat_ngram=1", "--min_new_tokens=5"]
    assert decode(project, f"--input={source}", "--max_new_tokens=30", *rules) == 0
    assert capfd.readouterr().out.splitlines() != plain


def test_decode_refuses_a_line_without_room(project, tmp_path, capsys):
    text, output = tmp_path / "text", tmp_path / "out"
    text.write_text("one two\n" + "three " * 60 + "\n")
    output.write_text("of another day\n")
    assert decode(project, f"--input={text}", f"--output={output}") == 2
    errors = capsys.readouterr().err
    assert re.search(r"^error: line 2 has \d+ tokens, .* room for 40 .*on_long=skip, cut", errors)
    assert output.read_text() == "of another day\n"


def test_decode_refuses_a_directory_without_a_run(tmp_path, capsys):
    assert main(["decode", f"--workdir={tmp_path}", f"--input={__file__}"]) == 2
    assert re.search(r"^error: .*config.json.*\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input=nowhere.en"], "nowhere.en: No such file or directory"),
        (["--input=."], ".: Is a directory"),
        (["--input=text", "--output=."], ".: Is a directory"),
        (["--input=text", "--output=nowhere/out"], "nowhere/out: No such file or directory"),
        (["--input=text", "--output=gs://a/b"], "--output 'gs://a/b' is an address"),
        (["--input=s3://a/b"], "--input 's3://a/b' is an address"),
        (["--input=text", "--output=./text"], "--output ./text is the --input too"),
        (["--input=text", "--output=link"], "--output link is the --input too"),
        (["--input=text", "--reference=other", "--output=other"], "is the --reference too"),
        (["--input=text", "--reference=other"], "other has 1 line, text has 2"),
        (["--input=bad"], "bad:2: not UTF-8"),
        (["--input=bad.gz"], "bad.gz:1: cannot be unpacked"),
        (["--input=text", "--output=/dev/full"], "/dev/full: No space left on device"),
    ],
    ids=str,
)
def test_files_that_cannot_be_are_named_before_the_model_is_loaded(
    args, message, project, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("one\ntwo\n")
    (tmp_path / "other").write_text("eins\n")
    (tmp_path / "link").symlink_to("text")
    (tmp_path / "bad").write_bytes(b"a\n\xe4\n")
    (tmp_path / "bad.gz").write_bytes(b"a\n")
    if "/dev/full" not in message:
        monkeypatch.setattr(workdir, "load_run", None)
    assert decode(project, *args) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", errors) and message in errors
    assert (tmp_path / "text").read_text() == "one\ntwo\n"
    assert (tmp_path / "other").read_text() == "eins\n"


def test_marks_of_other_systems_are_no_text(project, tmp_path, capsys):
    """As with prepared text: byte order marks and "\\r\\n" change neither outputs nor scores."""
    lines = (project / "test_2016_flickr.en").read_text().splitlines()
    output, again = tmp_path / "out", tmp_path / "again"
    assert decode(project, f"--input={project}/test_2016_flickr.en", f"--output={output}") == 0
    bom = b"\xef\xbb\xbf"
    marked = bom + "".join(f"{line}\r\n" for line in lines).encode()
    (tmp_path / "marked.gz").write_bytes(gzip.compress(marked))
    reference = bom + output.read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "reference").write_bytes(reference)
    args = [f"--input={tmp_path}/marked.gz", f"--output={again}"]
    assert decode(project, *args, f"--reference={tmp_path}/reference") == 0
    assert again.read_bytes() == output.read_bytes()
    assert "exact match 100.0 %" in capsys.readouterr().err


def test_every_line_has_a_line_whatever_it_holds(project, tmp_path, capsys):
    lines = ["one", "", "six " * 200, "x" * 3000, "nul\0\u2028nul", " \t", "two\rthree"]
    text, output = tmp_path / "text", tmp_path / "out"
    text.write_text("\n".join(lines), newline="\n")
    output.write_text("of another day\n" * 9)
    args = [f"--input={text}", f"--output={output}", "--max_new_tokens=3"]
    for on_long in ("skip", "cut", "split"):
        assert decode(project, *args, f"--on_long={on_long}") == 0
        outputs = output.read_bytes().decode().split("\n")
        assert len(outputs) == len(lines) + 1 and outputs[-1] == ""
        blank = {1, 5} | ({2, 3} if on_long == "skip" else set())
        assert {i for i in range(len(lines)) if not outputs[i]} >= blank
        assert not any(len(line.splitlines()) > 1 for line in outputs)
        errors = capsys.readouterr().err
        assert "7 lines" in errors and "2 of them blank, as their outputs are (lines 2, 6" in errors
        assert f"2 of them too long: --on_long={on_long} (lines 3, 4)" in errors
    assert len(outputs[2]) > 0


def test_an_empty_text_has_an_empty_output(project, tmp_path, capsys):
    text, output = tmp_path / "text", tmp_path / "out"
    text.write_text("")
    output.write_text("of another day\n")
    args = [f"--input={text}", f"--output={output}", f"--reference={text}", "--sample"]
    assert decode(project, *args) == 0
    assert output.read_text() == "" and "0 lines" in capsys.readouterr().err


def test_figures_are_of_the_lines_that_are_there(project, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("one\ntwo\nsix\nfour\n")
    assert decode(project, f"--input={text}", f"--output={tmp_path}/out") == 0
    assert "ms per step of 4 lines" in capsys.readouterr().err


# Each line for itself, so that the outputs come one by one.
ONE_BY_ONE = "import mqa_jax.decode.lines; mqa_jax.decode.lines.WINDOW = 1"


@pytest.fixture
def many(project, tmp_path):
    """Arguments that decode many lines, one after the other."""
    (tmp_path / "text").write_text("one two six\n" * 3000)
    args = [f"--workdir={project}/run", f"--input={tmp_path}/text", "--batch_size=1"]
    return ["-c", behind(ONE_BY_ONE), ROOT / "decode.py", *args]


def test_a_kill_leaves_the_lines_that_are_done(many, tmp_path):
    output = tmp_path / "out"
    with subprocess.Popen(**command(*many, f"--output={output}", cwd=tmp_path)) as process:
        deadline = time.monotonic() + 600
        while not (output.exists() and output.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    lines = output.read_bytes().split(b"\n")
    assert 2 <= len(lines) < 3000 and len({*lines[:-1]}) == 1


def test_a_reader_that_has_seen_enough_ends_it_in_silence(many, tmp_path):
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(**command(*many, cwd=tmp_path), **streams) as process:
        assert process.stdout.readline().endswith("\n")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=600) == 141
