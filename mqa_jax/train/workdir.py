"""What a training run leaves in its working directory so that it can be resumed and decoded with.

.lock                `mqa_jax.core.lock`: one run at a time
config.json          the resolved config
data.json            the manifest of the data that it trains on, and the hash of its tokenizer
tokenizer.model      the tokenizer that the data was prepared with; or tokenizer.zip
checkpoints/         `mqa_jax.train.checkpoint`; each has a signed copy of both JSON files
metrics.jsonl        `mqa_jax.train.metrics`, and TensorBoard's event files

A directory with a config.json is a run's. It becomes one behind the first step, so that a start
that fails may be tried again in another way. A converted run (`mqa_jax.train.converted`) has the
same files, but for the logs, and says in its config what it was made of: it is not gone on with.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mqa_jax.core.checks import check_integer
from mqa_jax.core.config import base_config
from mqa_jax.core.extras import require
from mqa_jax.core.paths import local_path, read_json, write_whole
from mqa_jax.core.quantized import check_weights
from mqa_jax.data.manifest import HUB_TOKENIZER, MANIFEST, TOKENIZER, Manifest
from mqa_jax.data.request import directory_of
from mqa_jax.data.tokenizer import RowTokenizer, Tokenizer
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.transformer import Model, build_model
from mqa_jax.train.checkpoint import RUN, Checkpoints, steps_in
from mqa_jax.train.optimizer import wide

CONFIG = "config.json"
DATA = "data.json"
CHECKPOINTS = "checkpoints"
CONVERTED = "converted"  # In the config of a converted run: how it was made.

# These fields of a config, and all below them, decide nothing about the weights of a step that was
# done (the mesh: nothing but rounding), so a run goes on with others. What the data is, its
# manifest says; what the teacher is, its hash.
FREE = (
    "mesh",
    "data.dir",
    "data.path",
    "data.tfds_dir",
    "model.remat",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.best",
    "train.patience",
    "train.log_every",
    "train.max_skipped_steps",
    "train.steps",
    "train.teacher",
    "evaluate",
)

_NOTHING = "nothing"


class Run(NamedTuple):
    """A run to decode with.

    Attributes:
      config: the resolved config.
      tokenizer: of its data.
      model: its structure, with shapes in place of weights.
      params: the weights, on the first device.
      step: of their checkpoint, the newest of those that they are the mean of.
      data: what it says of its data, as `describe` has it; version 0.1 has only the tokenizer.
    """

    config: ConfigDict
    tokenizer: RowTokenizer
    model: Model
    params: nnx.State
    step: int
    data: Mapping[str, Any]


def load_run(workdir: str | Path, *, step: int | str | None = None, average: int = 1) -> Run:
    """The run in `workdir`, whatever devices it was trained on.

    Args:
      step: of the checkpoint whose weights they are; "best" for that of the best evaluation by
        `config.train.best`; the newest whole one when None.
      average: above 1: the mean of the weights, taken in float32, of so many checkpoints, the
        newest or those up to `step`.

    Raises:
      ValueError: there is no run, no such checkpoint or not as many, or a file is not what the run
        had: the message names it.
      OSError: a file is missing or cannot be read.
    """
    path = local_path("--workdir", workdir)
    config, file = load_config(path), tokenizer_file(path)
    steps, total, at = _steps(path, config, step, average), None, 0
    data = _data_of(file)
    with Checkpoints(path / CHECKPOINTS) as checkpoints:
        for one in steps:
            if signed := checkpoints.run(one):
                data = signed["data"]
                check_unchanged(path, signed)
            at = max(at, checkpoints.whole_step())
            model = nnx.eval_shape(
                lambda: build_model(config.task, config.model.to_dict(), rngs=nnx.Rngs(0))
            )
            params = checkpoints.restore_params(nnx.state(model), one)
            check_weights(str(path / CHECKPOINTS), params)
            if average > 1:
                wider = jax.tree.map(lambda x: x.astype(wide(x)), params)
                total = wider if total is None else jax.tree.map(jnp.add, total, wider)
    if average > 1:
        params = jax.tree.map(lambda x, like: (x / average).astype(like.dtype), total, params)
    return Run(config, load_row_tokenizer(path), model, params, at, data)


def _steps(
    workdir: Path, config: ConfigDict, step: int | str | None, average: int
) -> list[int | None]:
    """The checkpoints that `load_run` is asked for; None for the newest whole one."""
    check_integer("--average", average)
    checkpoints = workdir / CHECKPOINTS
    there = steps_in(checkpoints)
    if step == "best":
        step = _best(workdir, config, there)
    elif step is not None:
        step = check_integer("--step", step, least=0)
    if average == 1:
        return [step]
    steps = there if step is None else [step, *(one for one in there if one < step)]
    if len(steps) < average:
        until = "" if step is None else f" up to step {step}"
        raise ValueError(
            f"--average={average}: {checkpoints} has {len(steps)} checkpoints{until}, of steps "
            f"{', '.join(map(str, steps)) or 'none'}; --config.train.keep_checkpoints keeps more "
            "as it trains"
        )
    return [*steps[:average]]


def _best(workdir: Path, config: ConfigDict, there: Sequence[int]) -> int:
    from mqa_jax.train.progress import best_steps  # Only here: it needs what logs, too.

    if not (name := config.train.get("best")):
        reason = "the run was trained without --config.train.best"
    else:
        # What is logged behind the newest checkpoint will be done again.
        steps, _ = best_steps(workdir, name, max(there, default=0))
        if found := [step for step in steps if step in there]:
            return found[0]
        reason = f"the best {name} is of step {steps[0]}" if steps else f"no {name} is logged"
    raise ValueError(
        f"--step=best: {reason}; {workdir / CHECKPOINTS} has checkpoints of steps "
        f"{', '.join(map(str, there))}"
    )


def load_config(workdir: str | Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      ValueError: there is none, or the file is cut short or something else.
    """
    path = Path(workdir) / CONFIG
    if not path.exists():
        raise ValueError(f"no {path}: {workdir} is not the --workdir of a training run")
    if "model_type" in (config := read_json(path)):
        raise ValueError(
            f"{workdir} is no run, but a model of the hub: give it as --model, to a command that "
            "has that flag"
        )
    return ConfigDict(config)


def data_of_run(workdir: Path, directory: str | None = None) -> tuple[Path, Manifest]:
    """The prepared data that a run was trained on; that its files are as they were is not checked.

    Args:
      directory: where it lies; where the run had it when None.

    Raises:
      ValueError: it is not there, or is other data.
    """
    about = read_json(workdir / DATA) if (workdir / DATA).is_file() else {}
    if (was := about.get("manifest")) is None:  # Of version 0.1, and what was made of it.
        raise ValueError(
            f"{workdir} has no {DATA} that says what data it was trained on: give --input, a text"
        )
    data = load_config(workdir).data
    path = directory_of(data, was["request"])
    if directory is not None:
        path = local_path("--data_dir", directory)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"the data of {workdir} is not at {path.absolute()}: give --data_dir")
    manifest = Manifest.read(path)
    if lines := [line for _, line in _differences("data", was, dataclasses.asdict(manifest))]:
        raise ValueError(f"{path} is not the data of {workdir}:\n  " + "\n  ".join(lines))
    return path, manifest


def tokenizer_file(directory: Path) -> Path:
    """Where the tokenizer of a run, or of prepared data, is."""
    path = directory / HUB_TOKENIZER
    return path if path.is_file() else directory / TOKENIZER


def load_row_tokenizer(directory: Path) -> RowTokenizer:
    """The tokenizer of a run, or of prepared data.

    Raises:
      ValueError: there is none, or it is damaged; the message names the file.
    """
    path = tokenizer_file(directory)
    if path.name == TOKENIZER:
        return Tokenizer.load(path)
    require("hub", str(path))

    from mqa_jax.hub.row_tokenizer import HubRowTokenizer

    return HubRowTokenizer.load(path)


def describe(
    config: ConfigDict, data: Manifest | None = None, teacher_sha256: str | None = None
) -> dict[str, Any]:
    """All that decides what a run comes to, as JSON: its config and, once they are there, its data
    and, if it learns from another model, that one."""
    about = {"config": json.loads(config.to_json())}
    if data is not None:
        digest = {"tokenizer_sha256": data.tokenizer_sha256}
        if teacher_sha256 is not None:
            digest["teacher_sha256"] = teacher_sha256
        about["data"] = digest | {"manifest": dataclasses.asdict(data)}
    return about


def check(workdir: Path, about: Mapping[str, Any]) -> None:
    """Finds that `workdir` is no run's yet, or that of a run that `about` describes too.

    A field that an earlier version did not have is taken to have been the default.

    Args:
      about: of `describe`; without data, only the config is compared.

    Raises:
      ValueError: it belongs to another run, and the message lists the differences; or that has
        done more steps than there are to be.
    """
    checkpoints = workdir / CHECKPOINTS
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ValueError(f"{checkpoints} is a file: move it away, or name another --workdir")
    if not (workdir / CONFIG).exists():
        return
    if CONVERTED in (kept := read_json(workdir / CONFIG)):
        if kept["model"].get("quantized"):  # Which an earlier version did not have.
            raise ValueError(
                f"--workdir {workdir} has weights in eight bits, which are not trained further: "
                "train the run that they were made of"
            )
        raise ValueError(
            f"--workdir {workdir} is a converted model, no run to go on with: give it as "
            f"--config.init_from={workdir}, and another --workdir"
        )
    config = list(_changes(workdir, about))
    if lines := [line for field, line in config if not _is_free(field)]:
        raise ValueError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(lines)
            + "\nname another --workdir, or give the config that it was started with"
        )
    steps, done = about["config"]["train"]["steps"], max(steps_in(checkpoints), default=0)
    if steps < done:
        raise ValueError(
            f"--config.train.steps {steps:,} is less than the {done:,} of the newest checkpoint in "
            f"{checkpoints}: give {done:,} or more, or name another --workdir"
        )
    if "data" not in about:
        return
    was = asked = about["data"]
    if (workdir / DATA).exists():
        was = read_json(workdir / DATA)
    elif tokenizer_file(workdir).exists():  # Version 0.1 kept the tokenizer alone.
        was = asked | _data_of(tokenizer_file(workdir))
    if (hashes := [x.get("teacher_sha256") for x in (was, asked)])[0] != hashes[1]:
        raise ValueError(
            f"{workdir} holds a run that learnt from another --config.train.teacher than "
            f"{about['config']['train']['teacher']!r}, or from that one as it was (sha256 "
            f"{hashes[0]}, now {hashes[1]}): put it back, or name another --workdir"
        )
    if lines := [line for _, line in _differences("data", was, asked)]:
        raise ValueError(
            f"{workdir} holds a run on other data:\n  "
            + "\n  ".join(lines)
            + "\nname another --workdir, or prepare the data as it was"
        )


def claim(workdir: Path, about: Mapping[str, Any], data: Path) -> list[str]:
    """Makes `workdir` the directory of the run that `about` describes, and that trains on `data`.

    Returns:
      the changes, a line each, of fields that may change, if it was its directory before.

    Raises:
      ValueError: as `check` does.
    """
    check(workdir, about)
    workdir.mkdir(parents=True, exist_ok=True)
    is_ours = (workdir / CONFIG).exists()
    changes = []
    if is_ours:
        was = read_json(workdir / CONFIG)
        changes = [
            line + _of_schedule(was, about["config"]) * (field == "config.train.steps")
            for field, line in _changes(workdir, about)
        ]
    tokenizer = tokenizer_file(data)
    partial = workdir / f"{tokenizer.name}.partial"
    shutil.copyfile(tokenizer, partial)
    os.replace(partial, workdir / tokenizer.name)
    write_json(workdir / DATA, about["data"])
    write_json(workdir / CONFIG, about["config"])  # The last: it makes the directory a run's.
    return changes


def check_unchanged(workdir: Path, signed: Mapping[str, Any]) -> None:
    """Finds that config and tokenizer of a run are those that a checkpoint of it was trained with.

    Args:
      signed: of `Checkpoints.run`; nothing before version 0.2, and then nothing is found.

    Raises:
      ValueError: they are not; the message lists what is different now.
    """
    if signed:
        digest = {"tokenizer_sha256": signed["data"]["tokenizer_sha256"]}
        found = describe(load_config(workdir)) | {"data": _data_of(tokenizer_file(workdir))}
        check_signed(workdir, {**signed, "data": digest}, found)


def check_signed(workdir: Path, signed: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Finds that a checkpoint was made by the run that `about` describes.

    Args:
      signed: what `Checkpoints.run` gives back.

    Raises:
      ValueError: it was not; the message lists what is different now.
    """
    lines = [
        line
        for name in signed
        for field, line in _differences(name, signed[name], about[name], _defaults().get(name))
        if name != "config" or not _is_free(field)
    ]
    if lines:
        tokenizer = tokenizer_file(workdir)
        raise ValueError(
            f"{workdir / CONFIG}, {tokenizer} or the data is not what the checkpoint was trained "
            "with (there: in the checkpoint, asked: now):\n  "
            + "\n  ".join(lines)
            + f"\nput it back; {RUN} in the folder of a checkpoint has the config"
        )


def _data_of(tokenizer: Path) -> dict[str, Any]:
    return {"tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest()}


def _changes(workdir: Path, about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    was = read_json(workdir / CONFIG)
    return _differences("config", was, about["config"], _defaults()["config"])


def _of_schedule(was: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What another number of steps does to the learning rate, behind the line that tells it."""
    steps, decay = config["train"]["steps"], config["train"].get("decay_steps", 0)
    if not decay:
        return ""
    falls = f"; the learning rate now falls over steps {max(steps - decay, 0):,} to {steps:,}"
    return falls + ", and rises again if it had fallen" * (steps > was["train"]["steps"])


def _defaults() -> dict[str, Any]:
    config = describe(base_config())["config"]
    fields = dataclasses.fields(TransformerConfig)
    has_default = [field for field in fields if field.default is not dataclasses.MISSING]
    config["model"] = {field.name: field.default for field in has_default} | config["model"]
    return {"config": config}


def _is_free(field: str) -> bool:
    return any(f"{field}.".startswith(f"config.{free}.") for free in FREE)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The file appears with all of its text, or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _differences(
    name: str, found: Any, asked: Any, defaults: Any = None
) -> Iterator[tuple[str, str]]:
    """Each field that differs, by its dotted name, and a line that says how."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in sorted(found.keys() | asked.keys()):
            default = defaults.get(key, _NOTHING) if isinstance(defaults, Mapping) else _NOTHING
            yield from _differences(
                f"{name}.{key}", found.get(key, default), asked.get(key, default), default
            )
    elif found != asked:
        yield name, f"{name}: {found!r} there, {asked!r} asked"
