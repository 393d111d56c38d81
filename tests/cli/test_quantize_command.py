"""`quantize` as a user types it: what it writes decodes, and what it tells is so."""

import json
import shutil

import pytest
from checkpoints import write, write_words
from flax import nnx
from running import train_args

from mqa_jax import hub
from mqa_jax.cli import main
from mqa_jax.convert import quantize
from mqa_jax.train.converted import save_converted
from mqa_jax.train.workdir import load_run

EIGHT = "--cache_dtype=int8"
LINES = ["w3 w17 w0 w0 w5", "w29 w0", "w0", "w11 w2 w2 w30 w8"]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def gpt2(tmp_path):
    return write_words(write(tmp_path / "gpt2", "gpt2", eos_token_id=4))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("\n".join(LINES) + "\n")
    return path


def table(printed):
    """The cells of each row, by its name."""
    rows = [line for line in printed.splitlines() if line.startswith(" ") or "  " in line]
    return {line[:30].strip(): line[30:].split() for line in rows}


def number(cell):
    return float(cell.replace(",", ""))


def test_a_run_in_eight_bits_is_a_run(project, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(project)
    out, texts = tmp_path / "eight", ["--text=val.en", "--reference=val.de", "--batch_size=4"]
    assert main(["quantize", "--workdir=run", EIGHT, f"--output={out}", *texts, "--by_layer"]) == 0
    printed = capfd.readouterr().out
    found = table(printed)
    assert found[""] == ["float32", "weights", "caches", "both"]
    wide, weights, caches, both = map(number, found["weights, bytes"])
    assert wide == caches > weights == both > 0.25 * wide
    # One head of 8 in one layer, key and value: in float32, and in int8 with a scale each.
    assert found["caches, bytes a token"] == ["64", "64", "24", "24"]
    nats = [*map(number, found["KL divergence, nats a token"])]
    assert nats[0] < 1e-6 < min(nats[1:]) and max(nats) < 0.05
    assert [cell for cell in found["top-1 agreement"] if cell != "%"][0] == "100.00"
    assert all(0 <= float(p) <= 1 for p in found["p of its difference"])
    for name in ("embedding alone", "encoder layer 0 alone", "decoder layer 0 alone"):
        assert f"\n{name}, nats a token  " in printed
    assert main(["evaluate", "--workdir=run", "--split=validation"]) == 0
    loss = float(capfd.readouterr().out.split()[1])
    assert float(found["loss, nats a token"][0]) == pytest.approx(loss, abs=1e-4)

    outputs = []
    for flags in ([f"--workdir={out}"], ["--workdir=run", "--quantize=int8", EIGHT]):
        assert main(["decode", *flags, "--input=val.en", f"--output={tmp_path}/o"]) == 0
        outputs.append((tmp_path / "o").read_text())
    assert outputs[0] == outputs[1]
    config = load_run(out).config
    assert (config.model.quantized, config.model.cache_dtype) == ("int8", "int8")
    assert config.converted.to_dict() == {"from": "run"}
    # Trained it is no further, nor quantized once more.
    eights = ["--config.train.batch_size=8", "--config.evaluate.batch_size=8"]
    flags = [*map(str, train_args(project, str(out), *eights))][1:]
    assert main(["train", *flags]) == 2
    assert "has weights in eight bits, which are not trained further" in capfd.readouterr().err
    flags = [*map(str, train_args(project, "more", f"--config.init_from={out}", *eights))][1:]
    assert main(["train", *flags]) == 2
    assert "weights of eight bits have no gradients" in capfd.readouterr().err
    for command in (["quantize"], ["decode", "--input=val.en", "--quantize=int8"]):
        assert main([*command, f"--workdir={out}", f"--output={tmp_path}/more"]) == 2
        assert "is quantized already (int8)" in capfd.readouterr().err


def test_a_model_of_the_hub_stays_one(gpt2, text, tmp_path, capfd):
    out = tmp_path / "eight"
    flags = [f"--model={gpt2}", "--quantize=int8_weights", f"--output={out}"]
    assert main(["quantize", *flags, f"--text={text}"]) == 0
    found = table(capfd.readouterr().out)
    assert found[""] == ["float32", "weights"] and "BLEU, greedy" not in found
    assert hub.load(out).model.config.quantized == "int8_weights"
    outputs = []
    for own in ([f"--model={out}"], [f"--model={gpt2}", "--quantize=int8_weights"]):
        end = [f"--input={text}", f"--output={tmp_path}/o", "--max_new_tokens=3"]
        assert main(["decode", *own, *end]) == 0
        outputs.append((tmp_path / "o").read_text())
    assert outputs[0] == outputs[1]
    # Nothing is written, and without a text nothing told, that was not asked for.
    assert main(["quantize", f"--model={gpt2}", f"--output={tmp_path / 'more'}"]) == 0
    assert capfd.readouterr().out == ""
    assert main(["convert", f"--model={out}", "--num_kv_heads=1", f"--output={tmp_path}/x"]) == 2
    assert "weights are in eight bits: convert the model that" in capfd.readouterr().err


def test_scales_that_are_none_are_found_in_a_run_too(project, tmp_path, capfd):
    """As of a run that somebody else has written, whose files are what they should be."""
    run = load_run(project / "run")
    model = quantize(nnx.merge(nnx.graphdef(run.model), run.params), "int8")
    model.decoder.layers[0].attention.out.scales[...] *= -1
    save_converted(tmp_path / "eight", run, model, {"from": "run"})
    end = [f"--input={project}/val.en", f"--output={tmp_path}/o"]
    assert main(["decode", f"--workdir={tmp_path / 'eight'}", *end]) == 2
    error = capfd.readouterr().err
    assert "decoder/layers/0/attention/out/scales in" in error and "has a scale of -" in error


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "give --output, a new directory, or --text"),
        (["--output=x", "--by_layer"], "--by_layer"),
        (["--output=x", "--reference=val.de"], "--reference"),
        (["--text=val.en"], "--text of a translation model needs --reference"),
        (["--text=val.en", "--reference=train.de"], "--reference has 120 lines, --text 7"),
        (["--text=val.en", "--quantize=none"], "--quantize=none without --cache_dtype"),
        (["--output=x", "--quantize=none", EIGHT], "leaves the model as it is: leave out --output"),
        (["--output=x", "--quantize=fp8"], "has no products of float8"),
        (["--output=x", "--model=y"], "exclude each other"),
        (["--output=run"], "run"),
        (["--text=val.en", "--reference=val.de", "--batch_size=0"], "--batch_size must be"),
    ],
)
def test_what_cannot_be_done_is_said(project, monkeypatch, capfd, flags, reason):
    monkeypatch.chdir(project)
    assert main(["quantize", "--workdir=run", *flags]) == 2
    assert reason in capfd.readouterr().err


def test_weights_in_fp8_need_a_device_that_multiplies_it(gpt2, text, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("mqa_jax.core.devices.multiplies_fp8", lambda device: True)
    out = tmp_path / "eight"
    assert main(["quantize", f"--model={gpt2}", "--quantize=fp8", f"--output={out}"]) == 0
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["mqa-jax"])
    decode = ["decode", f"--model={out}", f"--input={text}", f"--output={tmp_path}/o"]
    assert main(decode) == 2
    assert f"{out} has weights in fp8: the device here, cpu" in capfd.readouterr().err


def test_a_directory_of_another_s_scheme_is_refused(gpt2, text, tmp_path, capfd):
    other = shutil.copytree(gpt2, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    assert main(["quantize", f"--model={other}", f"--text={text}"]) == 2
    assert "quantization_config of the method 'awq'" in capfd.readouterr().err
