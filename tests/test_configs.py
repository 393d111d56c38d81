"""The configs say what the paper says, and each variant changes what its name says."""

import dataclasses
import json
import math
import random
import re
from pathlib import Path

import jax
import pytest
from flax import nnx
from running import ROOT, losses, records, run_well

from configs import lm1b, multi30k, own_language_model, quickstart, uptrain, wmt14
from mqa_jax import TransformerConfig
from mqa_jax.model.transformer import build_model
from mqa_jax.train.config import check_config, remarks
from mqa_jax.train.optimizer import rsqrt_schedule

# heads, key/value heads, head dim, window; and d_ff for translation, for the language model
PAPER = {
    "multi_head": (8, 8, 128, None, 4096, 8192),
    "multi_query": (8, 1, 128, None, 5440, 9088),
    "multi_head_local": (8, 8, 128, 32, 4096, 8192),
    "multi_query_local": (8, 1, 128, 32, 5440, 9088),
    "multi_head_h1": (1, 1, 128, None, 6784, 9984),
    "multi_head_h2": (2, 2, 64, None, 6784, 9984),
    "multi_head_h4": (4, 4, 32, None, 6784, 9984),
    "multi_head_h8_k16": (8, 8, 16, None, 6784, 9984),
}
GROUPED = {"grouped_query_2": 2, "grouped_query_4": 4}
WORDS = ["one", "two", "three", "four", "five", "six"]
CONFIGS = [wmt14, lm1b, multi30k, quickstart, own_language_model]
EVERY = [(config, variant) for config in CONFIGS for variant in config.VARIANTS]


def parameters(config) -> int:
    model = nnx.eval_shape(
        lambda: build_model(config.task, config.model.to_dict(), rngs=nnx.Rngs(0))
    )
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(("module", "millions"), [(wmt14, 211), (lm1b, 192)])
def test_the_baseline_has_the_papers_parameters(module, millions):
    assert round(parameters(module.get_config("multi_head")) / 1e6) == millions


@pytest.mark.parametrize("module", CONFIGS)
def test_variants_have_the_parameters_of_the_baseline(module):
    baseline = parameters(module.get_config("multi_head"))
    for variant in module.VARIANTS:
        assert abs(parameters(module.get_config(variant)) / baseline - 1) <= 0.002, variant


@pytest.mark.parametrize(("module", "d_ff_index"), [(wmt14, 4), (lm1b, 5)])
def test_variants_are_the_papers_and_two_grouped_ones(module, d_ff_index):
    assert module.VARIANTS.keys() == PAPER.keys() | GROUPED.keys()
    for variant, row in PAPER.items():
        model = module.get_config(variant).model
        assert (model.num_heads, model.num_kv_heads, model.head_dim, model.window) == row[:4]
        assert model.d_ff == row[d_ff_index]
    for variant, num_kv_heads in GROUPED.items():
        model = module.get_config(variant).model
        shape = model.num_heads, model.num_kv_heads, model.head_dim, model.window
        assert shape == (8, num_kv_heads, 128, None)


@pytest.mark.parametrize("module", [wmt14, lm1b])
def test_the_head_of_the_file_shows_the_figures_of_each_variant(module):
    rows = re.findall(r"^    (\w+) +(\d+) +(\d+) +(\d+) +(\d+|-) +(\d+) ", module.__doc__, re.M)
    assert {row[0] for row in rows} == module.VARIANTS.keys()
    for variant, heads, kv_heads, head_dim, window, d_ff in rows:
        model = module.get_config(variant).model
        shown = [model.num_heads, model.num_kv_heads, model.head_dim, model.window or "-"]
        assert [heads, kv_heads, head_dim, window, d_ff] == [str(x) for x in (*shown, model.d_ff)]


@pytest.mark.parametrize(("module", "variant"), EVERY)
def test_model_holds_the_fields_of_the_dataclass_and_no_others(module, variant):
    model = module.get_config(variant).model
    assert set(model) == {field.name for field in dataclasses.fields(TransformerConfig)}


@pytest.mark.parametrize("module", CONFIGS)
def test_vocabulary_of_model_and_data_are_one_number(module):
    config = module.get_config()
    config.data.vocab_size = 640
    assert config.model.vocab_size == 640


@pytest.mark.parametrize("module", CONFIGS)
def test_an_unknown_variant_is_refused_with_those_there_are(module):
    with pytest.raises(ValueError, match="'multi_qery' is not one of .*multi_query"):
        module.get_config("multi_qery")


def test_parameters_by_hand():
    attention, feed_forward, norm = 4 * 1024 * 8 * 128, 2 * 1024 * 4096, 1024
    layers = 6 * (attention + feed_forward + 2 * norm) + 6 * (
        2 * attention + feed_forward + 3 * norm
    )
    embeddings = (33_792 + 256 + 256) * 1024  # one table of tokens, two of positions
    expected = layers + 2 * norm + embeddings
    assert parameters(wmt14.get_config("multi_head")) == expected


@pytest.mark.parametrize(("module", "variant"), EVERY)
def test_a_variant_changes_attention_and_d_ff_and_nothing_else(module, variant):
    config, baseline = (
        module.get_config(variant).to_dict(),
        module.get_config("multi_head").to_dict(),
    )
    for field in ("num_heads", "num_kv_heads", "head_dim", "window", "d_ff"):
        del config["model"][field], baseline["model"][field]
    assert config == baseline


@pytest.mark.parametrize("module", [wmt14, lm1b])
def test_length_and_window_can_be_overridden(module):
    config = module.get_config()
    config.data.target_length = 127
    assert config.model.max_length == 127
    config.model.window = 5
    assert TransformerConfig(**config.model.to_dict()).window == 5


@pytest.mark.parametrize(
    ("section", "field", "expected"),
    [  # the published configurations, of wmt14 and of lm1b
        ("train", "steps", (100_000, 136_000)),
        ("train", "batch_size", (128, 256)),
        ("train", "hold_steps", (10_000, 10_000)),
        ("train", "decay_steps", (20_000, 13_600)),
        ("train", "label_smoothing", (0.1, 0.0)),
        ("train", "z_loss", (1e-4, 1e-4)),
        ("train", "optimizer", ("adafactor", "adafactor")),
        ("model", "d_model", (1024, 1024)),
        ("model", "num_layers", (6, 6)),
        ("model", "max_length", (256, 256)),
        ("model", "dropout_rate", (0.2, 0.0)),
        ("model", "attention_dropout_rate", (0.1, 0.0)),
        ("model", "relu_dropout_rate", (0.1, 0.0)),
        ("model", "dtype", ("bfloat16", "bfloat16")),
    ],
)
def test_training_is_that_of_the_paper(section, field, expected):
    assert tuple(module.get_config()[section][field] for module in (wmt14, lm1b)) == expected


@pytest.mark.parametrize("module", [wmt14, lm1b, multi30k, quickstart])
def test_what_a_file_leaves_to_the_base_is_what_it_always_was(module):
    """A run that was begun before goes on only with the config that it was begun with."""
    kept = json.loads(Path(__file__).with_name("configs.json").read_text())
    name = module.__name__.removeprefix("configs.")
    found = json.loads(module.get_config().to_json())
    assert (found.pop("init_from"), found.pop("init_optimizer")) == ("", "fresh")
    later = (found["data"].pop("subword_samples"), found["data"].pop("subword_alpha"))
    assert later == (0, 0.3)
    names = ("best", "patience", "r_drop", "distillation", "teacher")
    assert tuple(found["train"].pop(name) for name in names) == ("", 0, 0.0, 0.0, "")
    model = {field: found["model"][field] for field in kept[name]["model"]}
    assert found | {"model": model} == kept[name]
    # Fields that came later are as if they were not there.
    was = TransformerConfig(**kept[name]["model"])
    assert TransformerConfig(**module.get_config().model.to_dict()) == was


@pytest.mark.parametrize("module", CONFIGS)
def test_every_config_makes_sense(module):
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        check_config(config, {"data": 1, "fsdp": 1, "tensor": 1})
        assert remarks(config) == []


def converted(directory, config):
    """The directory of a converted run, as far as a config looks."""
    directory.mkdir()
    fields = json.loads(config.to_json()) | {"converted": {"from": "run"}}
    del fields["model"]["qk_norm"]  # Of a version that did not have it.
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("module", CONFIGS)
def test_uptraining_goes_on_from_where_the_run_was_before_its_decay(tmp_path, module):
    was = module.get_config("multi_head")
    config = uptrain.get_config(f"0.1:{converted(tmp_path / 'a:b', was)}")
    check_config(config, {"data": 1, "fsdp": 1, "tensor": 1})
    assert remarks(config) == []
    assert config.init_from == str(tmp_path / "a:b") and "converted" not in config
    now, settings = config.train, was.train
    assert now.steps * 10 == settings.steps
    assert now.evaluate_every * 10 == settings.evaluate_every
    rate_before = rsqrt_schedule(
        settings.learning_rate,
        settings.steps,
        hold_steps=settings.hold_steps,
        warmup_steps=0,
        decay_steps=0,
    )(settings.steps)
    schedule = rsqrt_schedule(
        now.learning_rate,
        now.steps,
        hold_steps=now.hold_steps,
        warmup_steps=now.warmup_steps,
        decay_steps=now.decay_steps,
    )
    rates = [float(schedule(step)) for step in range(now.steps + 1)]
    assert max(rates) == pytest.approx(uptrain.RATE * float(rate_before), rel=1e-3)
    assert rates.index(max(rates)) < 0.11 * now.steps and rates[-1] == 0
    # The data is that of the run, with its tokenizer; all else is as it was.
    expected, found = json.loads(was.to_json()), json.loads(config.to_json())
    expected["data"]["dir"] = ""
    for name in now:
        if now[name] != settings[name]:
            del expected["train"][name], found["train"][name]
    assert len(found["train"]) >= len(settings) - 8
    assert found == expected | {"init_from": config.init_from}


def test_uptraining_what_began_from_another_model_keeps_its_data(tmp_path):
    was = own_language_model.get_config()
    was.init_from, was.data.dir = "somewhere", "data/own"
    found = uptrain.get_config(f"0.003:{converted(tmp_path / 'run', was)}")
    assert (found.data.dir, found.init_from) == ("data/own", str(tmp_path / "run"))
    assert (found.train.steps, found.train.log_every, found.train.evaluate_every) == (6, 1, 2)


def test_uptraining_begins_with_a_fresh_optimizer_and_saves_at_each_evaluation(tmp_path):
    was = quickstart.get_config("multi_head")
    was.init_from, was.init_optimizer = "somewhere", "continued"
    was.train.update(best="loss", evaluate_every=6, checkpoint_every=3)
    config = uptrain.get_config(f"0.5:{converted(tmp_path / 'run', was)}")
    check_config(config)  # 3 and 1.5 are 3 and 2 when each is rounded.
    assert config.init_optimizer == "fresh"
    assert (config.train.evaluate_every, config.train.checkpoint_every) == (4, 2)


def test_what_cannot_be_uptrained_is_refused(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text('{"model_type": "gpt2"}')
    for variant, message in (
        ("0.1", "'0.1' must be SHARE:CONVERTED"),
        ("x:run", "share of the steps must be above 0, not 'x'"),
        ("0:run", "must be above 0, not '0'"),
        (f"0.1:{tmp_path}", "is no converted run: there is no .*config.json"),
        (f"0.1:{tmp_path}/hub", "of the hub, .* own_language_model, with --config.init_from="),
    ):
        with pytest.raises(ValueError, match=message):
            uptrain.get_config(variant)


@pytest.mark.slow
def test_a_language_model_of_ones_own(tmp_path):
    rng = random.Random(0)
    for stem, count in (("train", 300), ("validation", 9)):
        words = [rng.choices(WORDS, k=9) for _ in range(count)]
        (tmp_path / f"{stem}.txt").write_text("".join(" ".join(line) + "\n" for line in words))
    small = ["data.vocab_size=280", "model.num_layers=1", "train.steps=2"]
    small += ["train.log_every=1", "train.batch_size=4"]
    run_well(
        ROOT / "train.py",
        f"--config={ROOT}/configs/own_language_model.py:multi_query",
        *(f"--config.{change}" for change in (f"data.path={tmp_path}", *small)),
        "--workdir=run",
        cwd=tmp_path,
    )
    assert sorted(losses(tmp_path / "run")) == [1, 2]
    (figures,) = records(tmp_path / "run", "validation")
    assert math.isfinite(figures["loss"]) and figures["tokens"] > 9 * 9
