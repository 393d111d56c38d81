"""Checkpoints of a training run: the one place that knows Orbax."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mqa_jax.training import TrainState

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of a working directory, written in the background, each whole or not at all.

    A checkpoint holds the weights, the optimizer's state and the position in the data. Arrays are
    stored under their path in the tree (`decoder/layers/0/attention/query`), so that what reads
    them need not know how the trees were nested.

    Args:
      directory: where they lie, one folder a step.
      keep: how many of the newest are kept.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )

    def save(self, state: TrainState) -> None:
        """Starts to write `state`; returns before that is done.

        Raises whatever an earlier save failed with.
        """
        step = int(state.step)
        self._manager.wait_until_finished()
        self._sign()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(_by_path(state.params)),
                optimizer=ocp.args.StandardSave(_by_path(state.opt_state)),
                position=ocp.args.JsonSave({"step": step, "batches": step}),
            ),
        )

    def _sign(self) -> None:
        """Writes the hashes of a checkpoint's files beside them, once it is whole."""
        directory = Path(self._manager.directory)
        for step in directory.iterdir():
            if step.name.isdigit() and not (step / MANIFEST).exists() and jax.process_index() == 0:
                partial = directory / f"{step.name}.{MANIFEST}"
                partial.write_text(json.dumps(_hashes(step), indent=2))
                os.replace(partial, step / MANIFEST)

    def _verify(self, step: int) -> None:
        directory = Path(self._manager.directory) / str(step)
        if (directory / MANIFEST).exists():
            kept, found = json.loads((directory / MANIFEST).read_text()), _hashes(directory)
            if bad := sorted(name for name in kept if found.get(name) != kept[name]):
                raise ValueError(
                    f"checkpoint {directory} is damaged, files {bad} are not what was written: "
                    "delete it, and the one before is used"
                )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint, with the shapes, dtypes and shardings of `state`.

        Raises:
          ValueError: there is no checkpoint.
        """
        step = self._step()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_by_path(_abstract(state.params))),
                optimizer=ocp.args.StandardRestore(_by_path(_abstract(state.opt_state))),
            ),
        )
        return TrainState(
            jax.device_put(jax.numpy.int32(step), state.step.sharding),
            _like(state.params, restored.params),
            _like(state.opt_state, restored.optimizer),
        )

    def restore_params(self, params: Any) -> Any:
        """The weights of the newest checkpoint alone; `params` may hold shapes instead of arrays.

        Raises:
          ValueError: there is no checkpoint.
        """
        args = ocp.args.StandardRestore(_by_path(_abstract(params)))
        restored = self._manager.restore(self._step(), args=ocp.args.Composite(params=args))
        return _like(params, restored.params)

    def close(self) -> None:
        """Waits until the last save is on disk; raises whatever it failed with."""
        self._manager.wait_until_finished()
        self._sign()
        self._manager.close()

    def _step(self) -> int:
        step = self._manager.latest_step()
        if step is None:
            raise ValueError(
                f"no checkpoint in {self._manager.directory}: train first, or name another workdir"
            )
        self._verify(step)
        return step


def _hashes(directory) -> dict[str, str]:
    hashes = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                hashes[str(path.relative_to(directory))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return hashes


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _like(tree: Any, by_path: dict[str, Any]) -> Any:
    """The arrays of `by_path` in the shape of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [by_path[name] for name in _by_path(tree)])


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )
