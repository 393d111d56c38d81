"""What a config may hold: each value that makes no sense is named by its flag, before any work."""

import json
import math

import pytest
from ml_collections import ConfigDict

from configs import lm1b, multi30k, quickstart
from mqa_jax.core.config import base_config
from mqa_jax.train.config import check_config, remarks


def config_with(**changes):
    """Changes are `section__field=value`; of any kind, as a config file may hold them."""
    config = quickstart.get_config().to_dict()
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
    return ConfigDict(config)


ZERO_IS_TOO_FEW = [
    "model.vocab_size",
    "model.d_model",
    "model.d_ff",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.max_length",
    "model.window",
    "model.num_encoder_layers",
    "model.encoder_kv_heads",
    "model.cross_kv_heads",
    "data.target_length",
    "data.vocab_size",
    "train.steps",
    "train.batch_size",
    "train.accumulate",
    "train.log_every",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_skipped_steps",
    "evaluate.batch_size",
]
ZERO_IS_WELL = [
    "train.hold_steps",
    "train.warmup_steps",
    "train.decay_steps",
    "train.seed",
    "train.patience",
    "evaluate.lines",
    "data.source_length",
]
RATES = [
    "model.dropout_rate",
    "model.attention_dropout_rate",
    "model.relu_dropout_rate",
    "train.label_smoothing",
]
NUMBERS = [
    *RATES,
    *("train.learning_rate", "train.weight_decay", "train.z_loss"),
    *("train.r_drop", "train.distillation"),
]
BAD = [
    *((name, value) for name in ZERO_IS_TOO_FEW for value in (0, -1, 1.5, "2", math.nan, True)),
    *((name, value) for name in ZERO_IS_WELL for value in (-1, 0.5, "2", math.nan, True)),
    *((name, value) for name in NUMBERS for value in (-0.5, math.nan, math.inf, "0.1", True)),
    *((name, value) for name in RATES for value in (1.0, 1.5)),
    ("train.distillation", 1.5),
    ("train.seed", 2**32),
    *((f"train.{name}", 10**9) for name in ("steps", "hold_steps", "warmup_steps", "decay_steps")),
    ("train.optimizer", "sgd"),
    ("train.optimizer", None),
    ("train.best", "perplexity"),
    ("train.best", None),
    ("task", "poetry"),
    ("task", 1),
    ("init_optimizer", "kept"),
    ("init_optimizer", ""),
    ("model.dtype", "fp16"),
    ("model.dtype", "int32"),
    ("model.param_dtype", ""),
    ("model.remat", 1),
    ("model.norm", "batch"),
    ("model.norm_epsilon", 0.0),
    ("model.block", "prenorm"),
    ("model.parallel_norms", 3),
    ("model.positions", "alibi"),
    ("model.attention_scale", math.inf),
    ("model.attention_softcap", 0.0),
    ("model.logits_softcap", -1.0),
    ("model.logits_scale", math.nan),
    ("model.embedding_scale", 0.0),
    ("model.qk_norm", 1),
    ("model.gated", "no"),
    ("model.tied_softmax", 0),
    ("model.activation", "swish"),
    ("model.bias", "qkv"),
    ("model.bias", ("q",)),
    ("data.pack", "yes"),
    ("data.on_invalid", "ignore"),
    *((f"mesh.{axis}", value) for axis in ("data", "fsdp", "tensor") for value in (-2, 1.0, "1")),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_value_that_makes_no_sense_is_named_by_its_flag(name, value):
    with pytest.raises(ValueError) as caught:
        check_config(config_with(**{name.replace(".", "__"): value}))
    lines = str(caught.value).splitlines()
    assert any(f"--config.{name}" in line and repr(value) in line for line in lines), lines


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__source_length=129), "data.source_length 129 is more than the 128 positions"),
        (dict(data__target_length=129), "data.target_length 129 is more than the 128 positions"),
        (dict(model__vocab_size=511), "model.vocab_size 511 is less than --config.data.vocab_size"),
        (dict(model__num_kv_heads=3), "--config.model.num_kv_heads=3 does not divide num_heads=4"),
        (dict(model__block="parallel"), "--config.model.block parallel leaves no place"),
        (dict(task="language_model"), "--config.task 'language_model' with --config.data.source"),
        (dict(mesh__data=0), "--config.mesh has an axis of 0 devices"),
        (dict(mesh__fsdp=-1), "--config.mesh has more than one axis of -1"),
        (dict(train__ziel=1), "--config.train.ziel is unknown; there are accumulate, "),
        (dict(train=dict(steps=3)), "--config.train.accumulate is missing.* it is 1 where"),
        (dict(evaluate=3), "--config.evaluate must have the fields .*, and is 3"),
        (dict(model__quantized="int8"), "model.quantized int8: weights of eight bits have no grad"),
        (dict(train__r_drop=5.0, model__dropout_rate=0.0), "train.r_drop 5.0 without dropout"),
        (dict(train__distillation=0.5), "distillation 0.5 without --config.train.teacher: name"),
        (dict(train__teacher="runs/a"), "teacher 'runs/a' with a share of 0 of the loss: set"),
        (dict(train__teacher=3, train__distillation=0.5), "train.teacher must be a directory"),
        (dict(train__patience=2), "train.patience 2 without --config.train.best: name the figure"),
        (
            dict(train__best="loss", train__evaluate_every=9, train__checkpoint_every=2),
            "evaluate_every, 9, a multiple of --config.train.checkpoint_every, 2",
        ),
        (dict(train__best="chrf", evaluate__lines=0), "best 'chrf' is of what is translated: set"),
        (dict(init_optimizer="continued"), "init_optimizer continued without --config.init_from"),
        (dict(notes="mine"), "--config.notes is unknown"),
    ],
)
def test_fields_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(config_with(**changes))


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(ValueError) as caught:
        check_config(config_with(train__evaluate_every=0, evaluate__lines=-1, model__dtype="fp16"))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("section, size", [("train", 6), ("evaluate", 2)])
def test_batches_are_split_over_the_mesh(section, size):
    mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    check_config(config_with(), mesh)
    message = rf"--config.{section}.batch_size {size} cannot be split over the 4 parts"
    with pytest.raises(ValueError, match=message):
        check_config(config_with(**{f"{section}__batch_size": size}), mesh)
    with pytest.raises(ValueError, match="train.batch_size 32 .* 3 at a time: .* multiple of 12"):
        check_config(config_with(train__accumulate=3), mesh)


def test_what_is_more_than_needed_is_well():
    check_config(config_with(model__vocab_size=640))
    check_config(config_with(model__max_length=999, train__hold_steps=10**6, train__seed=2**32 - 1))
    check_config(ConfigDict(json.loads(lm1b.get_config().to_json())))  # As a run keeps it.


def test_a_config_from_before_a_field_of_the_model_with_a_default():
    config = quickstart.get_config().to_dict()
    del config["model"]["remat"], config["model"]["window"]
    check_config(ConfigDict(config))
    del config["model"]["d_ff"]
    with pytest.raises(ValueError, match="--config.model.d_ff is missing"):
        check_config(ConfigDict(config))


def test_a_schedule_longer_than_the_run_gets_a_remark():
    config = multi30k.get_config()
    assert remarks(config) == []
    config.train.steps = 3_000
    (remark,) = remarks(config)
    assert "warmup_steps 400 and decay_steps 3,000 are more than the 3,000 steps" in remark


def test_the_base_has_one_number_for_both_vocabularies():
    config = base_config(dict(num_kv_heads=1))
    config.model.vocab_size = 640
    assert config.data.vocab_size == 640 and config.model.num_kv_heads == 1
