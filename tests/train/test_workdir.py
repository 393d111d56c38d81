"""The working directory: one run's, with whole files."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict, config_dict

from configs import quickstart
from mqa_jax.data.manifest import FORMAT, FileStats, Manifest, SplitStats
from mqa_jax.data.tokenizer import Tokenizer
from mqa_jax.model.transformer import build_model
from mqa_jax.train import workdir
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.optimizer import build_optimizer
from mqa_jax.train.state import TrainState


def make_config(**changes):
    config = ConfigDict(
        {
            "task": "translation",
            "train": {"steps": 70, "learning_rate": 0.25, "mesh": {"data": -1, "fsdp": 1}},
            "sizes": (3, 5),
            "window": None,
            "limit": config_dict.placeholder(int),
            "words": "für",
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def make_data(directory, *, words="abc", examples=7):
    """What of a prepared directory a run remembers."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(words.encode())
    write_manifest(directory, examples)
    return directory


def write_manifest(directory, examples=7):
    splits = {"train": SplitStats(examples, 5, 3, 2, 0.5, 0.25, {})}
    files = {"tokenizer.model": FileStats.of(directory / "tokenizer.model")}
    Manifest({"format": FORMAT, "vocab_size": 11}, splits, files).write(directory)


def describe(config, data=None):
    return workdir.describe(config, data and Manifest.read(data))


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "deep" / "run"


def claim(run, config, data):
    return workdir.claim(run, describe(config, data), data)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_config_may_claim_again(run, data):
    assert claim(run, make_config(), data) == []
    first = contents(run)
    assert claim(run, make_config(), data) == []
    assert contents(run) == first
    assert sorted(first) == ["config.json", "data.json", "tokenizer.model"]
    assert first["tokenizer.model"] == b"abc"


def test_to_look_claims_nothing(run, data):
    """A start that fails behind it may be tried again with another config."""
    workdir.check(run, describe(make_config()))
    assert not run.exists()
    run.mkdir(parents=True)
    # Nor does what a claim leaves that was killed.
    (run / "tokenizer.model").write_bytes(b"other")
    (run / "data.json").write_text("{")
    workdir.check(run, describe(make_config(), data))
    claim(run, make_config(window=3), data)
    assert workdir.load_config(run).window == 3


def test_every_difference_is_listed(run, data):
    claim(run, make_config(), data)
    first = contents(run)
    changes = {"train.learning_rate": 0.5, "train.mesh.fsdp": 2, "window": 7, "limit": 9}
    other = make_config(**changes)
    del other.words
    other.sizes = (3, 5, 7)
    other.extra = ConfigDict({"a": True})
    for look in (lambda: claim(run, other, data), lambda: check(run, other)):
        with pytest.raises(ValueError) as error:
            look()
        head, *lines, advice = str(error.value).splitlines()
        assert str(run) in head and "--workdir" in advice
        assert [line.strip() for line in lines] == [
            "config.extra: 'nothing' there, {'a': True} asked",
            "config.limit: None there, 9 asked",
            "config.sizes: [3, 5] there, [3, 5, 7] asked",
            "config.train.learning_rate: 0.25 there, 0.5 asked",
            "config.train.mesh.fsdp: 1 there, 2 asked",
            "config.window: None there, 7 asked",
            "config.words: 'für' there, 'nothing' asked",
        ]
        assert contents(run) == first


def check(run, config, data=None):
    workdir.check(run, describe(config, data))


SHIPPED = quickstart.get_config().to_dict()


@pytest.mark.parametrize("field", workdir.FREE)
def test_what_decides_nothing_may_change_and_is_told(run, data, field):
    config = ConfigDict(SHIPPED)
    claim(run, config, data)
    *parents, name = field.split(".")
    holder = config.to_dict()
    inner = holder
    for parent in parents:
        inner = inner[parent]
    was, inner[name] = inner[name], {"lines": 99} if isinstance(inner[name], dict) else 99
    changes = claim(run, ConfigDict(holder), data)
    assert changes and all(change.startswith(f"config.{field}") for change in changes)
    if not isinstance(was, dict):
        (change,) = changes
        assert change.split(";")[0] == f"config.{field}: {was!r} there, 99 asked"
    assert workdir.load_config(run).to_dict() == json.loads(json.dumps(holder))
    assert claim(run, ConfigDict(holder), data) == []


@pytest.mark.parametrize(
    ("steps", "effect"),
    [
        (90, "; the learning rate now falls over steps 80 to 90, and rises again if it had fallen"),
        (60, "; the learning rate now falls over steps 50 to 60"),
        (5, "; the learning rate now falls over steps 0 to 5"),
    ],
)
def test_another_number_of_steps_says_what_becomes_of_the_rate(run, data, steps, effect):
    config = ConfigDict(SHIPPED)
    config.train.update(steps=70, decay_steps=10)
    claim(run, config, data)
    config.train.steps = steps
    assert claim(run, config, data) == [f"config.train.steps: 70 there, {steps} asked{effect}"]
    config.train.decay_steps = 0
    run = run.with_name("level")
    claim(run, config, data)
    config.train.steps = 8
    assert claim(run, config, data) == [f"config.train.steps: {steps} there, 8 asked"]


def test_there_are_no_fewer_steps_than_are_done(run, data):
    claim(run, make_config(), data)
    (run / "checkpoints/60/params").mkdir(parents=True)
    check(run, make_config(**{"train.steps": 60}))
    with pytest.raises(ValueError, match=r"train.steps 59 is less than the 60 of the newest"):
        check(run, make_config(**{"train.steps": 59}))


def test_a_run_goes_on_with_other_places_figures_and_checkpoints(run, data):
    """Where the same text lies, how often what is logged, evaluated and kept."""
    claim(run, ConfigDict(SHIPPED), data)
    other = ConfigDict(SHIPPED)
    for place in ("dir", "path", "tfds_dir"):
        other.data[place] += "elsewhere"
    for name in ("log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
        other.train[name] += 1
    for name in ("batch_size", "lines"):
        other.evaluate[name] += 1
    changes = claim(run, other, data)
    assert [change.split(":")[0] for change in changes] == [
        *(f"config.data.{name}" for name in ("dir", "path", "tfds_dir")),
        *(f"config.evaluate.{name}" for name in ("batch_size", "lines")),
        *(f"config.train.{name}" for name in ("checkpoint_every", "evaluate_every")),
        *(f"config.train.{name}" for name in ("keep_checkpoints", "log_every")),
    ]


@pytest.mark.parametrize("field", ["train.seed", "data.target_length", "model.d_ff"])
def test_what_decides_may_not(run, data, field):
    claim(run, ConfigDict(SHIPPED), data)
    other = ConfigDict(SHIPPED)
    group, name = field.split(".")
    other[group][name] += 1
    with pytest.raises(ValueError, match=f"config.{field}: "):
        check(run, other)


def test_a_run_goes_on_from_what_it_began_from(run, data):
    claim(run, ConfigDict(SHIPPED | dict(init_from="one")), data)
    with pytest.raises(ValueError, match="config.init_from: 'one' there, 'other' asked"):
        check(run, ConfigDict(SHIPPED | dict(init_from="other")))


def test_fields_of_another_version_are_compared_with_their_defaults(run, data, monkeypatch):
    newer = make_config()
    newer.train.clip = 0.5
    newer.more = ConfigDict({"a": 1, "b": {"c": 2}})
    newer.model = ConfigDict({"window": None})  # Has a default in `TransformerConfig`.
    base = ConfigDict(json.loads(newer.to_json()))
    del base.model.window
    monkeypatch.setattr(workdir, "base_config", lambda: base)
    claim(run, make_config(), data)
    claim(run, newer, data)
    check(run, make_config())
    newer.train.clip = 0.25
    newer.more.b.c = 3
    newer.model = ConfigDict({"window": 3})
    with pytest.raises(ValueError) as error:
        check(run, newer)
    assert "config.train.clip: 0.5 there, 0.25 asked" in str(error.value)
    assert "config.more.b.c: 2 there, 3 asked" in str(error.value)
    assert "config.model.window: None there, 3 asked" in str(error.value)


def test_a_run_keeps_to_its_data(run, data, tmp_path):
    """Wherever that lies."""
    claim(run, make_config(), data)
    check(run, make_config(), make_data(tmp_path / "elsewhere"))
    first = contents(run)
    for other, reason in (
        (make_data(tmp_path / "more", examples=8), "data.manifest.splits.train.examples: 7 there"),
        (make_data(tmp_path / "words", words="xyz"), "data.tokenizer_sha256: '"),
    ):
        with pytest.raises(ValueError, match=r"run on other data") as error:
            claim(run, make_config(), other)
        assert reason in str(error.value)
        assert contents(run) == first


def test_a_run_of_version_0_1_has_a_tokenizer_alone(run, data, tmp_path):
    claim(run, make_config(), data)
    (run / "data.json").unlink()
    with pytest.raises(ValueError, match=r"data.tokenizer_sha256: '"):
        check(run, make_config(), make_data(tmp_path / "words", words="xyz"))
    claim(run, make_config(), data)
    assert (run / "data.json").exists()


def test_the_config_comes_back(run, data):
    config = make_config()
    claim(run, config, data)
    loaded = workdir.load_config(str(run))
    assert isinstance(loaded, ConfigDict) and isinstance(loaded.train.mesh, ConfigDict)
    assert loaded.to_dict() == config.to_dict() | {"sizes": [3, 5], "limit": None}
    assert loaded.train.steps == 70 and loaded.train.learning_rate == 0.25
    assert loaded.window is None and loaded.words == "für"
    # What was loaded claims the directory too, as a resumed run may.
    assert claim(run, loaded, data) == []


@pytest.mark.parametrize("limit", [4, None])
def test_a_placeholder_is_its_value(run, data, limit):
    config = make_config()
    config.limit = limit
    config.train.limit = config.get_ref("limit")
    claim(run, config, data)
    loaded = workdir.load_config(run)
    assert loaded.limit == loaded.train.limit == limit
    assert json.loads((run / "config.json").read_text())["limit"] == limit


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"no .*config.json: .* not the --workdir"):
        workdir.load_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_json_that_is_cut_short_is_named(run, data, name, content):
    claim(run, make_config(), data)
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=f"run/{name} is (cut short|not what was written)"):
        check(run, make_config(), data)
    if name == "config.json":
        with pytest.raises(ValueError, match=f"run/{name} is (cut short|not what was written)"):
            workdir.load_config(run)


def killed(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_claim_that_is_killed_is_none(run, data, monkeypatch, writes):
    """Killed when all is written but a name: the next try, of another config, makes them all."""
    replace, done = os.replace, []

    def replace_some(*args):
        replace(*args) if len(done) < writes else killed()
        done.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            claim(run, make_config(), data)
    assert not (run / "config.json").exists()
    claim(run, make_config(window=3), data)
    assert sorted(contents(run)) == ["config.json", "data.json", "tokenizer.model"]
    assert workdir.load_config(run).window == 3


def test_a_full_disk_names_the_file(run, data, monkeypatch):
    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run), "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*run/data.json"):
        claim(run, make_config(), data)


SIZES = dict(vocab_size=300, d_model=6, d_ff=7, num_layers=1, num_heads=2, num_kv_heads=1)
SIZES |= dict(head_dim=3, max_length=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a checkpoint, its weights, and another tokenizer with as many words."""
    directory = tmp_path_factory.mktemp("trained")
    for name, sentences in (("data", ["one two three"]), ("other", ["wo eno eerht"])):
        Tokenizer.train(sentences * 9, make_data(directory / name) / "tokenizer.model", 269)
        write_manifest(directory / name)
    config = ConfigDict({"task": "language_model", "model": SIZES, "train": {"log_every": 1}})
    about = describe(config, directory / "data")
    run = directory / "run"
    workdir.claim(run, about, directory / "data")
    model = build_model(config.task, SIZES, rngs=nnx.Rngs(0))
    optimizer = build_optimizer("adamw", lambda _: 0.1)
    params = nnx.as_pure(nnx.state(model))
    # Where no process with one device could read it from.
    params = jax.device_put(params, jax.devices()[-1])
    with Checkpoints(run / "checkpoints", run=about) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(3), params, optimizer.init(params)))
    return directory, params


@pytest.fixture
def own(trained, tmp_path):
    """A copy of that run, to do harm to."""
    return Path(shutil.copytree(trained[0] / "run", tmp_path / "own"))


def test_a_run_is_loaded_with_all_that_decoding_needs(trained, own):
    for path in (own, f"{own}/"):
        run = workdir.load_run(path)
        assert run.config.task == "language_model" and run.config.model.to_dict() == SIZES
        assert run.tokenizer.decode(run.tokenizer.encode("one two")) == "one two"
        leaves = zip(jax.tree.leaves(run.params), jax.tree.leaves(trained[1]), strict=True)
        for found, saved in leaves:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(saved))
            assert found.devices() == {jax.devices()[0]}
        logits = nnx.merge(nnx.graphdef(run.model), run.params)(jnp.ones((1, 5), jnp.int32))
        assert logits.shape == (1, 5, 300)


@pytest.fixture
def several(trained, own):
    """Weights times 1, 2, 4 and 8 as steps 3, 5, 7 and 9; of the best loss is step 5."""
    config = json.loads((own / "config.json").read_text())
    config["train"]["best"] = "loss"
    (own / "config.json").write_text(json.dumps(config))
    about = json.loads((own / "checkpoints/3/run.json").read_text())
    with Checkpoints(own / "checkpoints", keep=9, run=about) as checkpoints:
        for step, times in ((5, 2), (7, 4), (9, 8)):
            params = jax.tree.map(lambda x, times=times: x * times, trained[1])
            checkpoints.save(TrainState(jnp.int32(step), params, params))
    losses = {3: 2.0, 5: 1.0, 7: 1.5, 11: 0.5}
    records = [dict(kind="validation", step=step, loss=loss) for step, loss in losses.items()]
    (own / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return own


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 8),
        (dict(step=9), 8),
        (dict(step=3), 1),
        (dict(step="best"), 2),  # Of what is behind the newest checkpoint nothing is there.
        (dict(average=2), (8 + 4) / 2),
        (dict(step=7, average=3), (4 + 2 + 1) / 3),
        (dict(step="best", average=2), (2 + 1) / 2),
    ],
)
def test_the_weights_of_a_step_and_the_mean_of_several(trained, several, options, times):
    run = workdir.load_run(several, **options)
    for found, one in zip(*map(jax.tree.leaves, (run.params, trained[1])), strict=True):
        assert found.dtype == one.dtype and found.devices() == {jax.devices()[0]}
        np.testing.assert_allclose(found, np.asarray(one) * times, rtol=1e-6)


def test_a_step_that_is_not_there_or_damaged_is_an_error(several):
    there = "9, 7, 5, 3"
    with pytest.raises(ValueError, match=f"no checkpoint of step 4 in .* of steps {there}"):
        workdir.load_run(several, step=4)
    with pytest.raises(ValueError, match=f"has 4 checkpoints, of steps {there}; --config.train.k"):
        workdir.load_run(several, average=5)
    (several / "checkpoints/5/run.json").write_text("{}")
    for options in (dict(step=5), dict(step="best"), dict(step=7, average=2)):
        with pytest.raises(ValueError, match=r"checkpoints/5 is damaged: files \['run.json'\]"):
            workdir.load_run(several, **options)
    shutil.rmtree(several / "checkpoints/5")
    with pytest.raises(ValueError, match="--step=best: the best loss is of step 5; .* 9, 7, 3"):
        workdir.load_run(several, step="best")
    (several / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="--step=best: no loss is logged; "):
        workdir.load_run(several, step="best")


def test_a_mean_of_bfloat16_is_taken_in_float32(trained, tmp_path):
    """In bfloat16, 256 and 1 add up to 256; the newest is the first."""
    sizes, data = SIZES | dict(param_dtype="bfloat16"), trained[0] / "data"
    config = ConfigDict({"task": "language_model", "model": sizes, "train": {}})
    about = describe(config, data)
    run = tmp_path / "run"
    workdir.claim(run, about, data)
    model = build_model(config.task, config.model.to_dict(), rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model))
    with Checkpoints(run / "checkpoints", run=about) as checkpoints:
        for step, value in enumerate((1, 1, 256)):
            full = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), params)
            checkpoints.save(TrainState(jnp.int32(step), full, full))
    for x in jax.tree.leaves(workdir.load_run(run, average=3).params):
        assert x.dtype == jnp.bfloat16 or x.ndim == 1  # Norms are in float32.
        assert np.unique(np.asarray(x, np.float32)) == 86


def test_a_run_at_an_address_is_refused():
    with pytest.raises(ValueError, match="--workdir 'gs://bucket/run' is an address"):
        workdir.load_run("gs://bucket/run")


def change(path, **fields):
    config = json.loads(path.read_text())
    config["model"] |= fields
    path.write_text(json.dumps(config))


def test_what_decodes_is_what_was_trained(trained, own):
    """A file that was exchanged is named, before there is garbage."""
    shutil.copyfile(trained[0] / "other/tokenizer.model", own / "tokenizer.model")
    change(own / "config.json", window=3)
    with pytest.raises(ValueError) as error:
        workdir.load_run(own)
    for text in (f"{own}/config.json", f"{own}/tokenizer.model", "put it back"):
        assert text in str(error.value)
    assert "config.model.window: None there, 3 asked" in str(error.value)
    assert "data.tokenizer_sha256: '" in str(error.value)
    # One alone, and what has no arrays of other sizes.
    shutil.copyfile(trained[0] / "data/tokenizer.model", own / "tokenizer.model")
    with pytest.raises(ValueError, match="config.model.window: None there, 3 asked"):
        workdir.load_run(own)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "checkpoints"])
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_what_is_gone_is_named(own, name, how):
    path = own / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if how == "empty":
        path.touch()
    with pytest.raises((ValueError, OSError), match=f"own/{name}"):
        workdir.load_run(own)


def test_another_number_that_decides_nothing_still_decodes(own):
    config = json.loads((own / "config.json").read_text())
    config["train"]["log_every"] = 7
    (own / "config.json").write_text(json.dumps(config))
    assert workdir.load_run(own).config.train.log_every == 7


def test_runs_of_version_0_1_decode(own):
    """Their checkpoints say nothing of the run."""
    folder = own / "checkpoints/3"
    signed = json.loads((folder / "manifest.json").read_text())
    del signed["run.json"]
    (folder / "manifest.json").write_text(json.dumps(signed))
    (folder / "run.json").unlink()
    (own / "data.json").unlink()
    assert workdir.load_run(own).tokenizer.decode([]) == ""


def test_a_checkpoint_of_another_run_is_none_of_this(trained, own):
    signed = {"config": {"a": 1}, "data": {"tokenizer_sha256": "f00"}}
    workdir.check_signed(own, {}, signed)
    with pytest.raises(ValueError, match=r"config.a: 1 there, 2 asked"):
        workdir.check_signed(own, signed, signed | {"config": {"a": 2}})
    workdir.check_signed(own, signed, signed | {"config": {"a": 1, "evaluate": {"lines": 2}}})
