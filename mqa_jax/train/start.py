"""What a run starts from: weights that are drawn, or `config.init_from`.

That is a directory of the Hugging Face hub, or the workdir of another run. The model and the
tokenizer are then that one's, and the config's model says only how it is trained.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mqa_jax.core.extras import require
from mqa_jax.core.paths import local_path, read_json
from mqa_jax.data.tokenizer import RowTokenizer
from mqa_jax.train.checkpoint import Checkpoints, has_optimizer, steps_in
from mqa_jax.train.state import TrainState
from mqa_jax.train.workdir import (
    CHECKPOINTS,
    CONFIG,
    check_unchanged,
    load_config,
    load_row_tokenizer,
    load_run,
)

if TYPE_CHECKING:
    from mqa_jax.hub import Pretrained

# The fields of `config.model` that say how a model is trained, not which one it is.
OWN_FIELDS = (
    *("dropout_rate", "attention_dropout_rate", "relu_dropout_rate"),
    *("remat", "dtype", "param_dtype", "cache_dtype"),
)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
      config: the run's, with the model that it is of.
      tokenizer: of the text; None to train one.
      params: from the shapes and places of the weights to the weights; None to draw them.
      continued: in place of `params`, from the state before the first step to the one with the
        weights and the moments of a run.
    """

    config: ConfigDict
    tokenizer: RowTokenizer | None = None
    params: Callable[[nnx.State, Mesh], nnx.State] | None = None
    continued: Callable[[TrainState], TrainState] | None = None


def find_start(config: ConfigDict, workdir: Path | None = None) -> Start:
    """Resolves `config.init_from`; no weight is read.

    Args:
      config: as a config file gives it.
      workdir: the run's own. Once there is a checkpoint in it, of a run that began so, what that
        run began from need not be there any more.

    Raises:
      ValueError: `init_from` is not a directory of a model, or the model is of another task; or
        it has no optimizer that `init_optimizer` could continue.
    """
    if not (text := config.get("init_from", "")):
        return Start(config)
    if not isinstance(text, str):
        raise ValueError(f"--config.init_from must be a directory, not {text!r}")
    path = local_path("--config.init_from", text)
    if workdir is not None and (workdir / CONFIG).is_file():
        # Before its first checkpoint a run begins again as it began.
        has_weights = bool(steps_in(workdir / CHECKPOINTS))
        path = workdir if has_weights and load_config(workdir).get("init_from") else path
    is_run, model, tokenizer, params = read_model(f"--config.init_from {text!r}", path, config)
    # A copy: fields that follow a field of the model keep the values that they have.
    fields = config.to_dict()
    fields["model"] = model | {name: config.model[name] for name in OWN_FIELDS}
    fields["data"]["vocab_size"] = model["vocab_size"]
    if config.get("init_optimizer") == "continued" and path != workdir:
        _check_optimizer(path, is_run, config)
        return Start(ConfigDict(fields), tokenizer, continued=functools.partial(_continued, path))
    return Start(ConfigDict(fields), tokenizer, params)


def pretrained(
    workdir: str | Path, *, step: int | str | None = None, average: int = 1
) -> "Pretrained":
    """A run that began from a directory of the hub, as `mqa_jax.hub.save` writes it back.

    Args:
      step: as for `load_run`.
      average: likewise.

    Raises:
      ValueError: it did not, or as `load_run`.
    """
    run = load_run(workdir, step=step, average=average)
    require("hub", "a directory of the hub")

    from mqa_jax.hub import Pretrained
    from mqa_jax.hub.row_tokenizer import HubRowTokenizer

    if not isinstance(tokenizer := run.tokenizer, HubRowTokenizer):
        raise ValueError(
            f"{workdir} has a tokenizer of its own, which no library of the hub's knows: "
            "`hub.save(directory, model, family=...)` writes the model alone"
        )
    model = nnx.merge(nnx.graphdef(run.model), run.params)
    return Pretrained(model, tokenizer.tokenizer, tokenizer.generation, tokenizer.family)


def read_model(
    name: str, path: Path, config: ConfigDict
) -> tuple[bool, dict[str, Any], RowTokenizer, Callable[[nnx.State, Mesh], nnx.State]]:
    """What a directory holds; no weight is read.

    Args:
      name: of the directory, in errors.
      path: of the hub, or of a run.
      config: of the run that it is for.

    Returns:
      whether it is a run's; the model's fields; its tokenizer; and what reads the weights, as for
      `Start`.

    Raises:
      ValueError: it holds none, or one of another task.
    """
    if path.is_file():
        raise ValueError(f"{name} is a file: give the directory that it is in")
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"{name} has no {CONFIG}: give a directory of the hub, or the workdir of a run"
        )
    is_run = "model_type" not in read_json(path / CONFIG)
    task, model, tokenizer, params = _of_run(path) if is_run else _of_hub(name, path, config)
    if task != config.task:
        raise ValueError(
            f"{name} is a {task}, and the config's task is {config.task!r}: give a config of that "
            "task"
        )
    if tokenizer.vocab_size > model["vocab_size"]:
        raise ValueError(
            f"{name}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, its model vectors "
            f"for {model['vocab_size']}: they do not belong together"
        )
    return is_run, model, tokenizer, params


def _check_optimizer(path: Path, is_run: bool, config: ConfigDict) -> None:
    """Raises a ValueError if there is no optimizer that goes on as the config's."""
    checkpoints, asked = path / CHECKPOINTS, config.train.optimizer
    newest = steps_in(checkpoints)[:1]
    if not is_run or not all(has_optimizer(checkpoints, step) for step in newest):
        what = "is a model of the hub" if not is_run else "has weights alone"
        reason = f"{path} {what}, without an optimizer"
    elif (found := load_config(path).train.optimizer) != asked:
        reason = f"{path} was trained with {found!r}, and --config.train.optimizer is {asked!r}"
    else:
        return
    raise ValueError(
        f"--config.init_optimizer continued: {reason}; --config.init_optimizer=fresh begins with "
        "the weights alone"
    )


def _continued(path: Path, state: TrainState) -> TrainState:
    """The step stays: from it the schedule follows, see `mqa_jax.train.optimizer.at_step`."""
    with Checkpoints(path / CHECKPOINTS) as checkpoints:
        check_unchanged(path, checkpoints.run())
        return dataclasses.replace(checkpoints.read(state), step=state.step)


def _of_run(path: Path) -> tuple[str, dict[str, Any], RowTokenizer, Any]:
    config = load_config(path)

    def params(like: nnx.State, _: Mesh) -> nnx.State:
        with Checkpoints(path / CHECKPOINTS) as checkpoints:
            check_unchanged(path, checkpoints.run())
            return checkpoints.restore_params(like)

    return config.task, config.model.to_dict(), load_row_tokenizer(path), params


def _of_hub(
    name: str, path: Path, config: ConfigDict
) -> tuple[str, dict[str, Any], RowTokenizer, Any]:
    require("hub", name)

    from mqa_jax import hub
    from mqa_jax.hub.row_tokenizer import HubRowTokenizer

    task, model = hub.read_config(path)

    def params(like: nnx.State, mesh: Mesh) -> nnx.State:
        loaded = hub.load(path, dtype=config.model.param_dtype, mesh=mesh)
        found = nnx.as_pure(nnx.state(loaded.model))
        return jax.tree.map(lambda x, y: jax.device_put(x.astype(y.dtype), y.sharding), found, like)

    return task, dataclasses.asdict(model), HubRowTokenizer.of(path), params
