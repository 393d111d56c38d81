"""What values of a config make sense, by themselves and beside each other."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.config import base_config
from mqa_jax.core.sharding import ShardingRules
from mqa_jax.data import request
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.transformer import MODELS
from mqa_jax.train.metrics import DECODED
from mqa_jax.train.optimizer import OPTIMIZERS
from mqa_jax.train.progress import FIGURES
from mqa_jax.train.state import MAX_SEED

DTYPES = ("float32", "bfloat16", "float16")
INIT_OPTIMIZERS = ("fresh", "continued")
DROPOUT_RATES = ("dropout_rate", "attention_dropout_rate", "relu_dropout_rate")
MOST_STEPS = 999_999_999  # As many digits as the name of a checkpoint has.


def check_config(config: ConfigDict, mesh: Mapping[str, int] | None = None) -> None:
    """Whether a config makes sense, before anything is done with it.

    Args:
      config: as a config file gives it.
      mesh: the sizes of the mesh's axes, once they are known; what is split over them is then
        checked too.

    Raises:
      ValueError: it does not; the message names all fields that do not, as flags, a line each.
    """
    problems = list(_unknown_and_missing(config)) or list(_problems(config, mesh))
    if problems:
        raise ValueError("\n".join(problems))


def remarks(config: ConfigDict) -> list[str]:
    """What makes sense and yet is likely not meant."""
    settings, said = config.train, []
    if settings.warmup_steps + settings.decay_steps > settings.steps:
        said.append(
            f"--config.train.warmup_steps {settings.warmup_steps:,} and decay_steps "
            f"{settings.decay_steps:,} are more than the {settings.steps:,} steps: the learning "
            "rate never reaches its full height"
        )
    return said


def _unknown_and_missing(config: ConfigDict) -> Iterator[str]:
    base = base_config()
    # A model's newer fields have defaults, which a config file may have been written before.
    optional = {
        f"model.{field.name}"
        for field in dataclasses.fields(TransformerConfig)
        if field.default is not dataclasses.MISSING
    } | {"init_from", "init_optimizer"}
    yield from _compared("", base, config, optional)


def _compared(name: str, base: Any, found: Any, optional: set[str]) -> Iterator[str]:
    if not isinstance(base, ConfigDict):
        return
    if not isinstance(found, ConfigDict):
        yield f"--config.{name} must have the fields {sorted(base)}, and is {found!r}"
        return
    if name == "data":  # Which looks after itself.
        return
    dot = f"{name}." if name else ""
    for key in sorted(set(found) - set(base)):
        yield f"--config.{dot}{key} is unknown; there are {', '.join(sorted(base))}"
    for key in sorted(set(base) - set(found)):
        if f"{dot}{key}" not in optional:
            yield (
                f"--config.{dot}{key} is missing: an older config, perhaps; it is {base[key]!r} "
                "where a config file says nothing"
            )
    for key in sorted(set(base) & set(found)):
        yield from _compared(f"{dot}{key}", base[key], found[key], optional)


# Fields of each kind and their limits.
_INTEGERS: dict[str, dict[str, int]] = {
    **dict.fromkeys(
        [
            *(f"model.{name}" for name in ("vocab_size", "d_model", "d_ff", "num_layers")),
            *(f"model.{name}" for name in ("num_heads", "num_kv_heads", "head_dim", "max_length")),
            *("train.batch_size", "train.accumulate"),
            *("train.log_every", "train.evaluate_every"),
            *("train.checkpoint_every", "train.keep_checkpoints", "train.max_skipped_steps"),
            "evaluate.batch_size",
        ],
        {},
    ),
    **dict.fromkeys(["train.patience", "evaluate.lines"], {"least": 0}),
    "train.steps": {"most": MOST_STEPS},
    **dict.fromkeys(
        ["train.hold_steps", "train.warmup_steps", "train.decay_steps"],
        {"least": 0, "most": MOST_STEPS},
    ),
    "train.seed": {"least": 0, "most": MAX_SEED},
    **dict.fromkeys(["mesh.data", "mesh.fsdp", "mesh.tensor"], {"least": -1}),
}
_NUMBERS: dict[str, dict[str, float]] = {
    **dict.fromkeys(
        ["train.learning_rate", "train.weight_decay", "train.z_loss", "train.r_drop"], {"least": 0}
    ),
    **dict.fromkeys(
        ["train.label_smoothing", *(f"model.{name}" for name in DROPOUT_RATES)],
        {"least": 0, "below": 1},
    ),
    "train.distillation": {"least": 0, "most": 1},
}
_CHOICES: dict[str, Sequence[Any]] = {
    "task": tuple(MODELS),
    "init_optimizer": INIT_OPTIMIZERS,
    "model.dtype": DTYPES,
    "model.param_dtype": DTYPES,
    "model.remat": (False, True),
    "train.optimizer": OPTIMIZERS,
    "train.best": ("", *FIGURES),
}


def _problems(config: ConfigDict, mesh: Mapping[str, int] | None) -> Iterator[str]:
    """Fields by themselves; and where these are right, fields beside fields."""
    problems = list(_problems_of_fields(config))
    yield from problems
    if not problems:
        yield from _problems_between_fields(config)
        yield from _problems_of_the_best(config)
        if mesh is not None:
            yield from _problems_with_a_mesh(config, mesh)


def _get(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _problems_of_fields(config: ConfigDict) -> Iterator[str]:
    checks: list[tuple[Callable[..., Any], str, Mapping[str, float]]] = [
        *((check_integer, name, limits) for name, limits in _INTEGERS.items()),
        *((check_number, name, limits) for name, limits in _NUMBERS.items()),
    ]
    for check, name, limits in checks:
        section, field = name.split(".")
        if field in config[section]:
            try:
                check(f"--config.{name}", config[section][field], **limits)
            except ValueError as error:
                yield str(error)
    for name, choices in _CHOICES.items():
        section, _, field = name.rpartition(".")
        value = (_get(config, section) if section else config).get(field, choices[0])
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            named = ", ".join(str(choice) or "''" for choice in choices)
            yield f"--config.{name} is none of {named}: {value!r}"
    yield from request.problems(config.data)
    if any(config.mesh[axis] == 0 for axis in config.mesh):
        yield f"--config.mesh has an axis of 0 devices: {config.mesh.to_dict()}"
    if list(config.mesh.values()).count(-1) > 1:
        yield f"--config.mesh has more than one axis of -1: {config.mesh.to_dict()}"


def _problems_between_fields(config: ConfigDict) -> Iterator[str]:
    model, data = config.model, config.data
    try:
        TransformerConfig(**model.to_dict())
    except ValueError as error:
        yield f"--config.model.{error}"  # It begins with the field.
    if scheme := model.get("quantized"):
        yield (
            f"--config.model.quantized {scheme}: weights of eight bits have no gradients; train "
            "without, and quantize what comes out"
        )
    if model.get("block") == "parallel" and config.task == "translation":
        yield "--config.model.block parallel leaves no place for what a translation attends to"
    if config.get("init_optimizer") == "continued" and not config.get("init_from"):
        yield (
            "--config.init_optimizer continued without --config.init_from: name the workdir of the "
            "run whose optimizer it is"
        )
    if config.train.r_drop and not any(model.get(name) for name in DROPOUT_RATES):
        yield (
            f"--config.train.r_drop {config.train.r_drop} without dropout: two readings of a batch "
            "differ by their dropout alone; set --config.model.dropout_rate"
        )
    if not isinstance(config.train.teacher, str):
        yield f"--config.train.teacher must be a directory, not {config.train.teacher!r}"
    elif (share := config.train.distillation) == 0 and config.train.teacher:
        yield (
            f"--config.train.teacher {config.train.teacher!r} with a share of 0 of the loss: set "
            "--config.train.distillation, to 0.5 say"
        )
    elif share and not config.train.teacher:
        yield (
            f"--config.train.distillation {share} without --config.train.teacher: name the "
            "directory of a trained model to learn from, or set --config.train.distillation=0"
        )
    larger = "raise --config.model.max_length"
    if config.get("init_from"):
        larger = "begin from a model that has more"
    for side in ("source", "target"):
        if (length := data[f"{side}_length"]) > model.max_length:
            yield (
                f"--config.data.{side}_length {length} is more than the {model.max_length} "
                f"positions that the model has: lower it, or {larger}"
            )
    if data.vocab_size > model.vocab_size:
        yield (
            f"--config.model.vocab_size {model.vocab_size} is less than --config.data.vocab_size "
            f"{data.vocab_size}: the data would have ids that the model has no vector for"
        )
    is_translation = config.task == "translation"
    if is_translation != bool(data.source):
        yield (
            f"--config.task {config.task!r} with --config.data.source {data.source!r}: a "
            "translation has a source, a language model an empty one, and source_length 0"
        )


def _problems_of_the_best(config: ConfigDict) -> Iterator[str]:
    settings = config.train
    if settings.patience and not settings.best:
        yield (
            f"--config.train.patience {settings.patience} without --config.train.best: name the "
            f"figure that is to get better, one of {', '.join(FIGURES)}"
        )
    if settings.best and settings.evaluate_every % settings.checkpoint_every:
        yield (
            f"--config.train.best {settings.best!r} needs a checkpoint of each evaluation: make "
            f"--config.train.evaluate_every, {settings.evaluate_every:,}, a multiple of "
            f"--config.train.checkpoint_every, {settings.checkpoint_every:,}"
        )
    is_decoded = config.task == "translation" and config.evaluate.lines
    if settings.best in DECODED and not is_decoded:
        yield (
            f"--config.train.best {settings.best!r} is of what is translated: set "
            "--config.evaluate.lines, of a translation, or choose loss"
        )


def _problems_with_a_mesh(config: ConfigDict, mesh: Mapping[str, int]) -> Iterator[str]:
    axes = ShardingRules().B
    parts = math.prod(mesh[axis] for axis in axes)
    for name, times in (("train", config.train.accumulate), ("evaluate", 1)):
        size = config[name].batch_size
        if size % (parts * times):
            yield (
                f"--config.{name}.batch_size {size} cannot be split over the {parts} parts of the "
                f"mesh axes {axes} (mesh {dict(mesh)}), {times} at a time: give a multiple of "
                f"{parts * times}"
            )
