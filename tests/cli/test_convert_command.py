"""Converting as a user types it: runs and directories of the hub, and what is told and refused."""

import json
import re

import numpy as np
import pytest
from checkpoints import IDS, write, write_words
from running import TINY, write_text

from mqa_jax import hub
from mqa_jax.cli import main
from mqa_jax.train.workdir import load_run

# The flag of a config reads its file in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory):
    """By family."""
    made = {}

    def make(name):
        if name not in made:
            path = write_words(write(tmp_path_factory.mktemp("hub") / name, name), "$A w1")
            ids = dict(eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
            (path / "generation_config.json").write_text(json.dumps(ids))
            made[name] = path
        return made[name]

    return make


def convert(*args):
    return main(["convert", *map(str, args)])


def table(text):
    """The columns of what is told, by the row's name."""
    rows = re.findall(r"^(\S.*?) {2,}(\S.*?) {2,}(\S.*)$", text, re.M)
    assert all(len(line) < 80 for line in text.splitlines())
    return {name: (before, after) for name, before, after in rows}


def test_a_translation_model_of_the_hub_and_what_its_parts_become(hub_model, tmp_path, capsys):
    given = hub_model("t5")
    heads = ["--num_kv_heads=1", "--cross_kv_heads=3", "--encoder_kv_heads=1"]
    assert convert(f"--model={given}", "--output=out", *heads) == 0
    told = capsys.readouterr().out
    # Three heads of 7 in two layers, keys and values of four bytes.
    assert table(told) == {
        "key/value heads, decoder": ("3", "1"),
        "key/value heads, cross-attention": ("3", "3"),
        "key/value heads, encoder": ("3", "1"),
        "parameters": table(told)["parameters"],
        "cache, bytes a token": ("336", "112"),
        "cache, bytes a source token": ("336", "336"),
    }
    before, after = (int(x.replace(",", "")) for x in table(told)["parameters"])
    # Two heads less of key and of value, in two decoder layers and three encoder layers.
    assert before - after == 2 * 2 * 7 * 22 * (2 + 3)
    assert "merge: truncated\nd_ff stays 29" in told
    config = hub.load("out").model.config
    assert (config.num_kv_heads, config.cross_kv_heads, config.encoder_kv_heads) == (1, 3, 1)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]
    (tmp_path / "in.txt").write_text("w3 w5\nw7\n")
    assert main(["decode", "--model=out", "--input=in.txt", "--output=out.txt"]) == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 2


def test_a_gpt2_with_one_head_is_saved_as_what_transformers_reads(hub_model, tmp_path):
    given = hub_model("gpt2")
    assert convert(f"--model={given}", "--output=out", "--num_kv_heads=1", "--merge=mean") == 0
    found = hub.load("out")
    assert found.family == "gpt_bigcode" and found.tokenizer is not None
    assert "num_key_value_heads" not in json.loads((tmp_path / "out/config.json").read_text())
    wide = hub.load(given).model.decoder.layers[0].attention
    narrow = found.model.decoder.layers[0].attention
    np.testing.assert_allclose(narrow.key[...][0], np.mean(wide.key[...], axis=0), atol=1e-6)
    assert found.model(np.array([IDS])).shape == (1, len(IDS), 31)


def test_a_text_and_other_flags_change_the_weights(hub_model, tmp_path):
    given = hub_model("gpt_bigcode_heads")
    (tmp_path / "lines").write_text("w3 w5 w7\n\nw9 w1 w2 w3\n")
    common = [f"--model={given}", "--num_kv_heads=1"]
    variants = {
        "weights": ["--merge=truncated"],
        "text": ["--merge=truncated", "--calibrate=lines"],
        "one": ["--merge=random"],
        "other": ["--merge=random", "--seed=1"],
        "half": ["--merge=truncated", "--dtype=bfloat16"],
    }
    found = {}
    for name, flags in variants.items():
        assert convert(*common, f"--output={name}", *flags) == 0
        key = hub.load(name, dtype="float32").model.decoder.layers[0].attention.key
        found[name] = np.asarray(key[...], np.float32)
    assert not np.allclose(found["weights"], found["text"], atol=1e-3)
    assert not np.allclose(found["one"], found["other"], atol=1e-3)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_report_before_any_training(hub_model, tmp_path, capsys):
    """Nothing is written; the loss is that of scores, and both steps are measured."""
    (tmp_path / "in.txt").write_text("w3 w5 w6\nw7 w2\n")
    (tmp_path / "right.txt").write_text("w9 w4\nw30\n")
    report = ["--report", "--input=in.txt", "--batch_size=2", "--context=9", "--num_kv_heads=1"]
    given = hub_model("t5")
    assert convert(f"--model={given}", *report, "--reference=right.txt") == 0
    told = capsys.readouterr().out
    rows = table(told)
    scores = [f"--model={given}", "--input=in.txt", "--reference=right.txt", "--output=scores"]
    assert main(["decode", "--score", *scores]) == 0
    total = sum(map(float, (tmp_path / "scores").read_text().split()))
    assert float(rows["loss, nats a token"][0]) == pytest.approx(-total / 5, abs=1e-3)
    assert rows["loss, nats a token"][0] != rows["loss, nats a token"][1]
    # Keys and values of two caches, of 2 rows and 9 tokens.
    assert rows["its caches, bytes"] == (f"{2 * 9 * 336 * 2:,}", f"{2 * 9 * 112 * 2:,}")
    assert all(float(ms) > 0 for ms in rows["a decode step, ms"])
    assert {"BLEU, greedy", "exact match", "perplexity"} < rows.keys()
    assert "BLEU: nrefs:1|" in told and "2 rows behind 9 tokens" in told
    (tmp_path / "scores").unlink()
    assert {p.name for p in tmp_path.iterdir()} == {"in.txt", "right.txt"}
    # A language model's is of the lines themselves.
    given = hub_model("gpt2")
    assert convert(f"--model={given}", *report) == 0
    rows = table(capsys.readouterr().out)
    logits = np.asarray(hub.load(given).model(np.array([[3, 5, 6, 1], [7, 2, 1, 1]])))
    logits = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    total = sum(logits[0, i, id] for i, id in enumerate([5, 6, 1]))
    total += sum(logits[1, i, id] for i, id in enumerate([2, 1]))
    assert float(rows["loss, nats a token"][0]) == pytest.approx(-total / 5, abs=1e-3)
    assert "BLEU, greedy" not in rows
    # What there is no room for is named with its file, before anything is measured.
    (tmp_path / "in.txt").write_text("w3 w5\n\n" + "w7 " * 99 + "\n" + "w9 " * 98 + "\n")
    assert convert(f"--model={given}", *report, "--calibrate=in.txt", "--regroup") == 2
    told = capsys.readouterr()
    assert "error: in.txt, line 3 has " in told.err and "(and 1 more lines are" in told.err
    assert told.out == ""


T5 = ["--num_kv_heads=1", "--output=out"]
REFUSED = {
    "give --workdir, of a training run, or --model": ("", T5),
    "give --output, a new directory, or --report": ("t5", ["--num_kv_heads=1"]),
    "give --num_kv_heads": ("t5", ["--output=out"]),
    "--num_kv_heads=2 does not divide the 3 key/value heads": (
        "t5", ["--num_kv_heads=2", "--output=out"],
    ),
    "--cross_kv_heads=6 does not divide the 3": ("t5", [*T5, "--cross_kv_heads=6"]),
    "--encoder_kv_heads must be at least 1, not 0": ("t5", [*T5, "--encoder_kv_heads=0"]),
    "--encoder_kv_heads=1, cross_kv_heads=None: a DecoderOnly has neither": (
        "gpt2", [*T5, "--encoder_kv_heads=1"],
    ),
    "--num_kv_heads=5: the model has these heads already": (
        "gpt2", ["--num_kv_heads=5", "--output=out"],
    ),
    "--seed: of no effect without --merge=random": ("t5", [*T5, "--seed=3"]),
    "--input: of no effect without --report": ("t5", [*T5, "--input=x"]),
    "--batch_size: of no effect without --report or --calibrate": ("t5", [*T5, "--batch_size=3"]),
    f"--batch_size must be from 1 to {2**31 - 1}, not {2**31}": (
        "t5", [*T5, "--calibrate=x", f"--batch_size={2**31}"],
    ),
    "--report needs --input": ("t5", [*T5, "--report"]),
    "--report of a translation model needs --reference": ("t5", [*T5, "--report", "--input=x"]),
    "--reference: of no effect for a language model": (
        "gpt2", [*T5, "--report", "--input=x", "--reference=y"],
    ),
    "--context must be from 2 to 11, not 12": (
        "gpt2", [*T5, "--report", "--input=x", "--context=12"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(hub_model, tmp_path, capsys, message):
    name, flags = REFUSED[message]
    model = [f"--model={hub_model(name)}"] if name else []
    assert convert(*model, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(hub_model, tmp_path, capsys):
    given = hub_model("t5")
    before = sorted(path.name for path in given.iterdir())
    assert convert(f"--model={given}", f"--output={given}", "--num_kv_heads=1") == 2
    assert f"--output {given} is there already" in capsys.readouterr().err
    assert sorted(path.name for path in given.iterdir()) == before
    assert convert(f"--workdir={given}", "--output=out", "--num_kv_heads=1") == 2
    assert "is no run, but a model of the hub: give it as --model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_converted_trained_further_and_decoded(tmp_path, capfd):
    write_text(tmp_path)
    variant = [TINY[0].replace("multi_query", "multi_head"), *TINY[1:]]
    # The tests have eight devices.
    variant += ["--config.train.batch_size=8", "--config.evaluate.batch_size=8"]
    data = f"--config.data.path={tmp_path}"
    assert main(["train", *variant, data, "--workdir=run"]) == 0
    assert convert("--workdir=run", "--output=narrow", "--num_kv_heads=1", "--regroup") == 0
    narrow = load_run("narrow")
    heads = {"num_kv_heads": 1, "cross_kv_heads": 1, "encoder_kv_heads": 4}
    assert {name: narrow.config.model[name] for name in heads} == heads
    record = narrow.config.converted
    assert (record["from"], record.merge, record.regrouped) == ("run", "truncated", True)
    assert record.kv_heads.after.to_dict() == heads
    text = ["--input=val.en", "--output=out.txt"]
    assert main(["decode", "--workdir=narrow", *text]) == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 7
    capfd.readouterr()
    assert main(["train", *variant, data, "--workdir=narrow"]) == 2
    error = capfd.readouterr().err
    assert "narrow is a converted model, no run to go on with" in error and error.count("\n") == 1
    assert main(["train", "--config=uptrain:0.5:narrow", "--workdir=further"]) == 0
    found = load_run("further")
    assert {name: found.config.model[name] for name in heads} == heads
    assert found.step == 4 and found.config.init_from == "narrow"
    assert main(["decode", "--workdir=further", *text]) == 0
    # And it is gone on with, as other runs are.
    assert main(["train", "--config=uptrain:0.5:narrow", "--workdir=further"]) == 0
    # A run that is converted twice has had fewer heads before.
    further = ["--workdir=further", "--output=last", "--num_kv_heads=1"]
    assert convert(*further) == 2
    assert convert(*further, "--encoder_kv_heads=2") == 0
    assert load_run("last").config.converted.kv_heads.before.cross_kv_heads == 1
