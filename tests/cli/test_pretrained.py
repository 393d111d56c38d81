"""Models of the hub on the command line: --model decodes as its directory says, and is measured."""

import json

import jax
import pytest
from checkpoints import WORDS, write, write_words
from flax import nnx

import mqa_jax
from mqa_jax.cli import main
from mqa_jax.decode.beam import TRANSFORMERS
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.rules import Forbid
from mqa_jax.hub import load
from mqa_jax.measure import compile_only
from mqa_jax.measure.compile_only import CHIPS, Topology

LINES = ["w3 w17 w5", "", "w29 w2", "w11"]


@pytest.fixture
def directory(tmp_path):
    """A GPT-2 whose tokens are words, which asks for two beams, and never says w7."""
    directory = write_words(write(tmp_path / "gpt2", "gpt2"))
    generation = dict(eos_token_id=[4, 9], num_beams=2, length_penalty=0.5, bad_words_ids=[[7]])
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "lines").write_text("\n".join(LINES) + "\n")
    return directory


def decoded(tmp_path, capfd, directory, *flags, status=0):
    output = tmp_path / "output"
    source = f"--input={tmp_path / 'lines'}"
    got = main(["decode", f"--model={directory}", source, f"--output={output}", *flags])
    errors = capfd.readouterr().err
    assert got == status, errors
    return output.read_text().split("\n")[:-1], errors


def expected(directory, **options):
    pretrained = load(directory)
    options |= dict(eos_id=[4, 9], rules=[Forbid([7])])
    search = mqa_jax.greedy
    if "beam_size" in options:
        options |= dict(alpha=0.5, beam_rules=TRANSFORMERS)
        search = mqa_jax.beam_search
    generator = Generator(
        pretrained.model,
        search=lambda *args, **kwargs: search(*args, **kwargs | options),
        batch_size=2,
        bos_id=0,
        max_new_tokens=5,
    )
    prompts = [[WORDS[word] for word in line.split()] for line in LINES if line]
    ids = iter(generator.tokens(nnx.state(pretrained.model), prompts))
    return [" ".join(f"w{id}" for id in next(ids)) if line else "" for line in LINES]


def test_a_directory_says_how_it_is_decoded_and_flags_say_otherwise(directory, tmp_path, capfd):
    lines, errors = decoded(tmp_path, capfd, directory, "--max_new_tokens=5")
    assert "as transformers has it for this directory: --beam_size=2 --beam_rules=tr" in errors
    assert "--alpha=0.5" in errors
    assert [line.strip() for line in lines] == expected(directory, beam_size=2)
    lines, errors = decoded(tmp_path, capfd, directory, "--max_new_tokens=5", "--beam_size=1")
    assert "directory" not in errors
    # Other rules of beams have a penalty of their own.
    _, errors = decoded(tmp_path, capfd, directory, "--beam_size=2", "--beam_rules=paper")
    assert "directory" not in errors
    assert [line.strip() for line in lines] == expected(directory)
    assert "w7" not in " ".join(lines)
    # Its beams are beams for the flags, too.
    lines, errors = decoded(tmp_path, capfd, directory, "--max_new_tokens=5", "--n_best=2")
    assert [line.split(" ||| ")[0] for line in lines][:2] == ["0", "0"]
    _, errors = decoded(tmp_path, capfd, directory, "--n_best=3", status=2)
    assert "--n_best=3 is more than there are with --beam_size=2" in errors
    generation = dict(max_new_tokens=2, min_length=9, diversity_penalty=0.5, do_sample=True)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    lines, errors = decoded(tmp_path, capfd, directory)
    assert "for this directory: --max_new_tokens=2\n" in errors
    assert "not as the model's directory says: diversity_penalty, do_sample (give" in errors
    assert "(give --sample), min_length (give --min_new_tokens)" in errors
    _, errors = decoded(tmp_path, capfd, directory, "--sample")
    assert "--max_new_tokens=2 --top_k=50\n" in errors and "do_sample" not in errors
    (directory / "generation_config.json").write_text(json.dumps(generation | dict(top_k=0)))
    _, errors = decoded(tmp_path, capfd, directory, "--sample")
    assert "--max_new_tokens=2\n" in errors
    assert max(len(line.split()) for line in lines) == 2
    for values, flags, reason in (
        (dict(temperature=0.0), ["--sample"], "gpt2: its temperature is 0, with which nothing"),
        (dict(num_beams=2, length_penalty=-1.0), [], "gpt2: its length_penalty is -1.0, and no"),
    ):
        (directory / "generation_config.json").write_text(json.dumps(values))
        _, errors = decoded(tmp_path, capfd, directory, *flags, status=2)
        assert reason in errors
    (directory / "generation_config.json").unlink()
    _, errors = decoded(tmp_path, capfd, directory, "--n_best=2", status=2)
    assert "--n_best: of no effect without a --beam_size above 1" in errors


def test_an_id_that_the_tokenizer_has_no_text_for_is_not_decoded(directory, tmp_path, capfd):
    """Tables of models are larger, of a round number of rows."""
    beyond = {int(word[1:]) for line in expected(directory) for word in line.split()}
    fewer = max(beyond - {4, 9})
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: id for word, id in words.items() if id < fewer}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "lines").write_text("w3 w5\nw2\n")
    flags = ["--max_new_tokens=5", "--beam_size=1"]
    lines, _ = decoded(tmp_path, capfd, directory, *flags)
    assert all(int(word[1:]) < fewer for line in lines for word in line.split())
    assert all(len(line.split()) for line in lines)


def test_an_end_needs_no_text(directory, tmp_path, capfd):
    """Forced, it comes, though the tokenizer has no token for it; and alone it is no bad word."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: id for word, id in words.items() if id < 30}
    path.write_text(json.dumps(tokenizer))
    ids = dict(eos_token_id=30, bad_words_ids=[[30]], forced_eos_token_id=30)
    (directory / "generation_config.json").write_text(json.dumps(ids))
    lines, errors = decoded(tmp_path, capfd, directory, "--max_new_tokens=3")
    assert [len(line.split()) for line in lines] == [2, 0, 2, 2] and "at the limit" not in errors


def test_scores_are_of_the_end_too(directory, tmp_path, capfd):
    """Though the tokenizer ends no text."""
    (tmp_path / "right").write_text("w7 w8\n" * len(LINES))
    flags = [f"--reference={tmp_path / 'right'}", "--score"]
    (tmp_path / "lines").write_text("\n".join(line or "w1" for line in LINES) + "\n")
    lines, errors = decoded(tmp_path, capfd, directory, *flags)
    model = load(directory).model
    for line, prompt in zip(lines, ([3, 17, 5], [1], [29, 2], [11]), strict=True):
        answer = [7, 8, 4]
        logits = jax.nn.log_softmax(model(jax.numpy.array([prompt + answer])))[0]
        places = range(len(prompt) - 1, len(prompt) + 2)
        expected = sum(float(logits[i, id]) for i, id in zip(places, answer, strict=True))
        assert float(line) == pytest.approx(expected, abs=2e-4)
    assert "nothing to decode" not in errors


def test_a_model_without_a_longest_length_has_the_one_that_is_said(tmp_path, capfd):
    directory = write_words(write(tmp_path / "t5", "t5"))
    (tmp_path / "lines").write_text("w3 " * 600 + "\n")
    _, errors = decoded(tmp_path, capfd, directory, status=2)
    assert "600 tokens, but there is room for 512" in errors
    lines, _ = decoded(tmp_path, capfd, directory, "--max_length=640", "--max_new_tokens=3")
    assert len(lines) == 1


def test_a_model_at_an_address_is_refused(capfd):
    assert main(["decode", "--model=gs://bucket/model", f"--input={__file__}"]) == 2
    assert "error: --model 'gs://bucket/model' is an address" in capfd.readouterr().err


def test_a_model_without_a_tokenizer_and_two_models_are_refused(directory, tmp_path, capfd):
    (directory / "tokenizer.json").unlink()
    assert main(["decode", f"--model={directory}", f"--input={tmp_path / 'lines'}"]) == 2
    assert "has no tokenizer that can be read: tokenizer.json" in capfd.readouterr().err
    assert main(["decode", f"--model={directory}", "--workdir=x"]) == 2
    assert "--workdir, of a run, and --model, of the hub, exclude" in capfd.readouterr().err
    assert main(["decode", f"--input={tmp_path / 'lines'}"]) == 2
    assert "give --workdir, of a training run, or --model" in capfd.readouterr().err
    lines = f"--input={tmp_path / 'lines'}"
    assert main(["decode", f"--workdir={directory}", lines]) == 2
    assert "is no run, but a model of the hub: give it as --model" in capfd.readouterr().err
    assert main(["decode", f"--model={directory}/config.json", lines]) == 2
    assert "config.json is a file: give the directory" in capfd.readouterr().err
    (directory / "config.json").write_text(json.dumps(dict(task="language_model")))
    assert main(["decode", f"--model={directory}", lines]) == 2
    assert "it is of a training run (--workdir)" in capfd.readouterr().err


@pytest.mark.slow
def test_a_model_is_measured_by_its_config_alone(directory, tmp_path, capfd, monkeypatch):
    (directory / "model.safetensors").unlink()
    args = [f"--model={directory}", f"--output_dir={tmp_path / 'out'}", "--repeats=1"]
    assert main(["benchmark", *args, "--batch_sizes=3", "--context_lengths=8"]) == 0
    (row,) = json.loads((tmp_path / "out" / "benchmark.json").read_text())["costs"]
    assert (row["variant"], row["batch"], row["context_length"]) == ("gpt2", 3, 8)
    # 31 tokens, 11 positions, two layers of 20 and 80 with biases, and five norms.
    layer = 4 * 20 * 20 + 4 * 20 + 2 * 20 * 80 + 80 + 20 + 4 * 20
    assert row["parameters"] == 31 * 20 + 11 * 20 + 2 * layer + 2 * 20
    # The devices of this process in the place of TPUs.
    topology = Topology("v5e:2x4", jax.devices(), CHIPS["v5e"], chips=8)
    monkeypatch.setattr(compile_only, "find_topology", lambda name: topology)
    sizes = ["--batch_sizes=8", "--context_lengths=8"]
    assert main(["benchmark", args[0], "--compile_only=v5e:2x4", *sizes]) == 0
    assert "gpt2" in capfd.readouterr().out
    assert main(["benchmark", *args, "--variants=multi_head"]) == 2
    assert "--variants: of no effect with --model" in capfd.readouterr().err
