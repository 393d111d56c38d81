"""--config.init_from: a run that begins from a directory of the hub, or from another run."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import WORDS, write, write_words
from flax import nnx

from mqa_jax import hub
from mqa_jax.cli import main
from mqa_jax.train.start import pretrained

# The flag of a config reads its file in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# Id 0 is a word like others, which fills no row up.
TEXT = ["w3 w17 w0 w0 w5", "w29 w0", "w0", "w11 w2 w2 w30 w8 w21", "w6 w0 w7 w8 w9 w10 w12 w13"]
TINY = [
    "--config.model.dtype=float32",
    "--config.model.dropout_rate=0",
    "--config.data.target_length=11",
    "--config.train.steps=2",
    "--config.train.batch_size=8",
    "--config.train.warmup_steps=0",
    "--config.train.decay_steps=0",
    "--config.train.log_every=1",
    "--config.train.evaluate_every=2",
    "--config.train.checkpoint_every=1",
    "--config.evaluate.batch_size=8",
    "--config.evaluate.lines=0",
]
STILL = "--config.train.learning_rate=0"
ENDS = [4, 9]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpt2(tmp_path):
    directory = write_words(write(tmp_path / "gpt2", "gpt2"))
    generation = dict(bos_token_id=19, eos_token_id=ENDS, bad_words_ids=[[7]])
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture
def t5(tmp_path):
    return write_words(write(tmp_path / "t5", "t5", pad_token_id=0, eos_token_id=1), "$A w1")


def text(directory, sides):
    """Files of a language, or of two, of which the second is the first from behind."""
    directory.mkdir()
    for split, copies in (("train", 8), ("val", 1), ("validation", 1)):
        for i, side in enumerate(sides):
            lines = [" ".join(line.split()[:: (-1) ** i]) for line in TEXT * copies]
            (directory / f"{split}.{side}").write_text("\n".join(lines) + "\n")
    return directory


def train(config, *flags):
    return main(["train", f"--config={config}", *TINY, *flags])


def language_model(tmp_path, *flags):
    path = tmp_path / "text"
    path = path if path.exists() else text(path, ["txt"])
    return train("own_language_model", f"--config.data.path={path}", *flags)


def translation(tmp_path, *flags):
    path = text(tmp_path / "text", ["en", "de"])
    sizes = ["--config.data.source_length=10", "--config.data.splits.test="]
    return train("multi30k", f"--config.data.path={path}", *sizes, *flags)


def validation(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "validation"][-1]


def log_probability(logits, targets):
    """Of one row, summed up in float64."""
    logits = np.asarray(logits, np.float64)[: len(targets)]
    logits -= logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return log_probabilities[np.arange(len(targets)), targets].sum()


def padded(rows):
    """On the right, where nothing before it sees it."""
    return np.array([row + [0] * (11 - len(row)) for row in rows])


def ids(line):
    return [WORDS[word] for word in line.split()]


@pytest.mark.slow
def test_a_language_model_of_the_hub_is_trained_on_text_and_written_back(gpt2, tmp_path, capfd):
    run = tmp_path / "run"
    start = [f"--config.init_from={gpt2}", f"--workdir={run}"]
    assert language_model(tmp_path, *start, STILL) == 0
    assert f"begins with the weights of {gpt2}" in capfd.readouterr().out
    model = hub.load(gpt2).model
    # Nothing is in front of a text, as when it is decoded.
    logits = model(padded([ids(line) for line in TEXT]))
    targets = [[*ids(line)[1:], 4] for line in TEXT]
    total = sum(log_probability(x, row) for x, row in zip(logits, targets, strict=True))
    tokens = sum(len(line.split()) for line in TEXT)
    found = validation(run)
    assert found["tokens"] == tokens
    np.testing.assert_allclose(found["ln_perplexity"], -total / tokens, rtol=1e-5)

    # Killed before its first checkpoint, it begins again.
    shutil.rmtree(run / "checkpoints")
    assert language_model(tmp_path, *start, STILL) == 0
    assert f"begins with the weights of {gpt2}" in capfd.readouterr().out

    hub.save(tmp_path / "back", pretrained(run))
    back = hub.load(tmp_path / "back")
    for was, now in zip(*map(jax.tree.leaves, map(nnx.state, (model, back.model))), strict=True):
        np.testing.assert_array_equal(now, was)
    assert back.tokenizer.encode("w3 w0") == [3, 0]
    assert (back.generation.eos_ids, back.generation.bos_id) == ((4, 9), 19)

    # What it began from need not be there to go on.
    shutil.rmtree(gpt2)
    assert language_model(tmp_path, *start, STILL) == 0
    assert "nothing is left to train" in capfd.readouterr().out
    (tmp_path / "lines").write_text("w3 w17\nw0\n")
    flags = [f"--workdir={run}", f"--input={tmp_path / 'lines'}", f"--output={tmp_path / 'out'}"]
    assert main(["decode", *flags, "--max_new_tokens=3"]) == 0
    flags[0] = f"--model={tmp_path / 'back'}"
    flags[2] = f"--output={tmp_path / 'same'}"
    assert main(["decode", *flags, "--max_new_tokens=3"]) == 0
    assert (tmp_path / "same").read_text() == (tmp_path / "out").read_text()
    forward, best = nnx.jit(model), []
    for prompt in ([3, 17], [0]):
        row = list(prompt)
        while len(row) < len(prompt) + 3 and row[-1] not in ENDS:
            logits = forward(padded([row]))[0, len(row) - 1]
            row.append(int(np.argmax(logits.at[7].set(-np.inf))))
        best.append(" ".join(f"w{id}" for id in row[len(prompt) :] if id != 4))
    assert [line.strip() for line in (tmp_path / "out").read_text().splitlines()] == best


@pytest.mark.slow
def test_training_moves_the_weights_and_a_run_begins_from_a_run(gpt2, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    learning = ["--config.train.steps=4", "--config.train.learning_rate=1"]
    start = [f"--config.init_from={gpt2}", f"--workdir={first}"]
    assert language_model(tmp_path, *start, *learning) == 0
    still = [STILL, f"--config.init_from={first}", f"--workdir={second}"]
    assert language_model(tmp_path, *still) == 0
    assert validation(first)["loss"] == pytest.approx(validation(second)["loss"], rel=1e-6)
    untrained = tmp_path / "untrained"
    start[1] = f"--workdir={untrained}"
    assert language_model(tmp_path, *start, STILL) == 0
    assert validation(first)["loss"] < validation(untrained)["loss"] - 0.01
    assert json.loads((second / "config.json").read_text())["model"]["d_model"] == 20


def test_an_optimizer_that_is_not_there_is_not_continued(project, gpt2, tmp_path, capfd):
    def refused(directory, *flags):
        start = [f"--config.init_from={directory}", "--config.init_optimizer=continued"]
        assert main(["train", *flags, *start, f"--workdir={tmp_path / 'run'}"]) == 2
        return capfd.readouterr().err

    config = "--config=multi30k"
    other = refused(project / "run", config, "--config.train.optimizer=adamw")
    assert "was trained with 'adafactor', and --config.train.optimizer is 'adamw'" in other
    hub_model = refused(gpt2, "--config=own_language_model", f"--config.data.path={tmp_path}")
    assert f"{gpt2} is a model of the hub, without an optimizer; --config.init" in hub_model
    shutil.copytree(project / "run", tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights/checkpoints/8/optimizer")
    assert f"{tmp_path}/weights has weights alone" in refused(tmp_path / "weights", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_a_tokenizer_of_its_own_is_begun_from_too(tmp_path, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    sizes = dict(vocab_size=272, d_model=16, d_ff=24, num_layers=1, num_heads=2, head_dim=8)
    own = [f"--config.model.{name}={size}" for name, size in sizes.items()]
    assert language_model(tmp_path, f"--workdir={first}", "--config.train.steps=3", *own) == 0
    start = [f"--config.init_from={first}", f"--workdir={second}"]
    assert language_model(tmp_path, *start, STILL) == 0
    assert validation(first)["loss"] == pytest.approx(validation(second)["loss"], rel=1e-6)
    one, two = (run / "tokenizer.model" for run in (first, second))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ValueError, match="has a tokenizer of its own"):
        pretrained(second)


@pytest.mark.slow
def test_a_translation_model_of_the_hub_is_trained_on_text(t5, tmp_path):
    run = tmp_path / "run"
    start = [f"--config.init_from={t5}", f"--workdir={run}", STILL]
    assert (
        translation(tmp_path, *start, "--config.train.batch_size=16", "--config.train.accumulate=2")
        == 0
    )
    sources = padded([[*ids(line), 1] for line in TEXT])
    targets = padded([[0, *ids(line)[::-1]] for line in TEXT])
    lengths = np.array([[len(line.split()) + 1] for line in TEXT])
    is_source = (np.arange(sources.shape[1])[None] < lengths).astype(np.int32)
    segments = dict(source_segment_ids=is_source, target_segment_ids=np.ones_like(targets))
    logits = hub.load(t5).model(sources, targets, **segments)
    total = sum(
        log_probability(x, [*ids(line)[::-1], 1]) for x, line in zip(logits, TEXT, strict=True)
    )
    tokens = sum(len(line.split()) + 1 for line in TEXT)
    np.testing.assert_allclose(validation(run)["ln_perplexity"], -total / tokens, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--config.model.d_model=64"], "--config.model.d_model: of no effect with"),
        (["--config.data.vocab_size=64"], "--config.data.vocab_size: of no effect with"),
        (["--config.data.target_length=12"], "the 11 positions that the model has"),
        (["--config.init_from=nowhere"], "'nowhere' has no config.json: give a directory"),
        (["--config.init_from=gs://a/b"], "--config.init_from 'gs://a/b' is an address"),
        (["--config.model.param_dtype=float16"], "is loaded in float32 or bfloat16"),
    ],
)
def test_what_cannot_be_begun_from_is_refused(gpt2, tmp_path, capfd, flags, reason):
    flags = [f"--config.init_from={gpt2}", f"--workdir={tmp_path / 'run'}", *flags]
    assert language_model(tmp_path, *flags) == 2
    assert reason in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_model_of_another_task_and_one_without_a_tokenizer_are_refused(gpt2, t5, tmp_path, capfd):
    start = [f"--config.init_from={t5}", f"--workdir={tmp_path / 'run'}"]
    assert language_model(tmp_path, *start) == 2
    assert "is a translation, and the config's task is 'language_model'" in capfd.readouterr().err
    start[0] = f"--config.init_from={gpt2}"
    path = gpt2 / "tokenizer.json"
    path.write_text(path.read_text().replace('"w29": 29', '"w29": 31'))
    assert language_model(tmp_path, *start) == 2
    assert "ids up to 31, its model vectors for 31" in capfd.readouterr().err
    path.unlink()
    assert language_model(tmp_path, *start) == 2
    assert f"{gpt2}: there is no tokenizer that can be read" in capfd.readouterr().err


def test_a_model_of_the_hub_teaches(gpt2, tmp_path, capfd):
    """Itself: there is nothing to learn. Another one: a run that has begun refuses it."""
    run, weights = tmp_path / "run", gpt2 / "model.safetensors"
    start = [f"--config.init_from={gpt2}", f"--workdir={run}", STILL]
    start += ["--config.train.distillation=1", f"--config.train.teacher={gpt2}"]
    assert language_model(tmp_path, *start) == 0
    assert f"learns from {gpt2} too" in capfd.readouterr().out
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(r["loss"]) < 1e-6 < r["ln_perplexity"] for r in logged if r["kind"] == "train")
    tensors = safetensors.numpy.load_file(weights)
    tensors["transformer.wte.weight"] *= 2
    safetensors.numpy.save_file(tensors, weights)
    assert language_model(tmp_path, *start, "--config.train.steps=3") == 2
    assert "learnt from another --config.train.teacher than" in capfd.readouterr().err


@pytest.mark.slow
def test_text_that_spells_the_end_is_refused_or_left_out(gpt2, tmp_path, capfd):
    path = text(tmp_path / "text", ["txt"])
    with (path / "train.txt").open("a") as file:
        file.write("w3 w4 w5\n")
    start = [f"--config.init_from={gpt2}", f"--workdir={tmp_path / 'run'}", STILL]
    assert language_model(tmp_path, *start, "--config.data.on_invalid=error") == 2
    error = capfd.readouterr().err
    assert "train.txt:41: it has" in error and "encoded as 4, the id that ends a text" in error
    assert language_model(tmp_path, *start) == 0
    assert "dropped: 1 spells_an_end" in capfd.readouterr().out


def test_data_that_is_made_anew_keeps_no_other_tokenizer(gpt2, tmp_path):
    path, made = text(tmp_path / "text", ["txt"]), tmp_path / "made"
    config = ["--config=own_language_model", f"--config.data.path={path}", *TINY]
    config += [f"--config.data.dir={made}"]
    assert main(["prepare", *config, f"--config.init_from={gpt2}"]) == 0
    (made / "manifest.json").unlink()
    assert main(["prepare", *config, "--config.model.vocab_size=272"]) == 0
    assert {file.name for file in made.glob("tokenizer.*")} == {"tokenizer.model"}


@pytest.mark.slow
def test_preparing_needs_the_tokenizer_too(gpt2, tmp_path, capfd):
    path = text(tmp_path / "text", ["txt"])
    config = ["--config=own_language_model", f"--config.data.path={path}", *TINY]
    start = f"--config.init_from={gpt2}"
    assert main(["prepare", *config, start]) == 0
    out = capfd.readouterr().out
    assert "40 examples" in out
    (data,) = (tmp_path / "data").glob("*/manifest.json")
    request = json.loads(data.read_text())["request"]
    assert (request["ids"], request["vocab_size"]) == ([-1, None, 4], 31)
    assert language_model(tmp_path, start, f"--workdir={tmp_path / 'run'}", STILL) == 0
    assert len(list((tmp_path / "data").glob("*/manifest.json"))) == 1
    benchmark = ["benchmark", "--config=own_language_model", start, "--output_dir=out"]
    assert main(benchmark) == 2
    assert "--config.init_from is for training" in capfd.readouterr().err


@pytest.mark.slow
def test_a_model_of_the_hub_teaches_what_was_made_of_it(gpt2, tmp_path, capfd):
    """Whose config.json is another, and so the bytes of what the text is tokenized with."""
    assert main(["convert", f"--model={gpt2}", "--output=narrow", "--num_kv_heads=1"]) == 0
    taught = [f"--config.train.teacher={gpt2}", "--config.train.distillation=0.5"]
    assert language_model(tmp_path, "--config.init_from=narrow", "--workdir=run", *taught) == 0
    assert f"learns from {gpt2} too" in capfd.readouterr().out
