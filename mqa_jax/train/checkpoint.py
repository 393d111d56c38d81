"""Checkpoints of a training run: the one place that knows Orbax.

<directory>/<step>/                a checkpoint: its number is the position in the data
<directory>/<step>/manifest.json   the SHA-256 of each of its other files
<directory>/<step>.unsigned*       one being written, or left by a run that was killed meanwhile
<directory>/<step>.damaged         one that was not what its manifest says; safe to delete

A checkpoint is written, then signed with its manifest, then renamed: whatever interrupts this, a
name that is a number alone means a checkpoint that was whole. What happens to its files later is
found by the manifest before a byte of it is used.
"""

import hashlib
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from mqa_jax.train.state import TrainState

MANIFEST = "manifest.json"


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it stand."""


class Checkpoints:
    """The checkpoints of a working directory, written in the background, each whole or not at all.

    A checkpoint holds the weights and the optimizer's state; the position in the data is its step.
    Arrays are stored under their path in the tree (`decoder/layers/0/attention/query`), so that
    what reads them need not know how the trees were nested.

    With several processes each calls the same methods, and all see the same directory. What is read
    is left as it is, but for `restore`, which moves damaged checkpoints out of the way.

    Args:
      directory: where they lie; made by the first `save`.
      keep: how many of the newest are kept; an older one goes when a newer one has been signed.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            # Else it takes minutes until a directory that cannot be made is an error.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sign")
        self._saving: tuple[int, Future] | None = None
        # Not a look at the directory, which another process may have at another moment.
        self._here: int | None = None

    def save(self, state: TrainState) -> None:
        """Starts to write `state`; returns when it has been copied to the host.

        Does nothing if `state` is what was saved or restored last. Waits until the save before is
        done: one at a time takes memory of the host.

        Raises:
          SaveError: this save, or the one before, failed.
        """
        self.wait()
        step = int(state.step)
        if step == self._here:
            return
        unsigned = self._directory / f"{step}.unsigned"
        try:
            if jax.process_index() == 0:
                for left in self._directory.glob("*.unsigned*"):
                    shutil.rmtree(left)
            self._checkpointer.save(
                unsigned,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(_by_path(state.params)),
                    optimizer=ocp.args.StandardSave(_by_path(state.opt_state)),
                ),
                force=True,
            )
        except OSError as error:
            raise self._failure(step, error) from None
        self._here = step
        self._saving = step, self._pool.submit(self._finish, unsigned, step)

    def _finish(self, unsigned: Path, step: int) -> None:
        """In the background: signs what Orbax has written, and lets go of the oldest."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            (unsigned / MANIFEST).write_text(json.dumps(_hashes(unsigned), indent=2))
            unsigned.rename(self._directory / str(step))
            for old in self._steps()[self._keep :]:
                shutil.rmtree(self._directory / str(old))

    def check(self) -> None:
        """Raises what `wait` would, and does not wait."""
        if self._saving and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is signed.

        Raises:
          SaveError: it failed.
        """
        if self._saving:
            (step, future), self._saving = self._saving, None
            if error := future.exception():
                raise self._failure(step, error)

    def _failure(self, step: int, error: Exception) -> SaveError:
        return SaveError(
            f"checkpoint {step} could not be written into {self._directory}: {error}. The newest "
            f"one there is of step {self.latest_step()}; make room, and run the same command again"
        )

    def latest_step(self) -> int | None:
        """The newest checkpoint's; whether it is still whole, only reading it tells."""
        return max(self._steps(), default=None)

    def restore(self, state: TrainState) -> TrainState:
        """The newest whole checkpoint, with the shapes, dtypes and shardings of `state`.

        Newer ones that are damaged are named in the log, and renamed.

        Raises:
          ValueError: there is no checkpoint, or none that is whole.
        """
        step = self._here = self._newest_whole(set_aside=True)
        restored = self._checkpointer.restore(
            self._directory / str(step),
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_by_path(_abstract(state.params))),
                optimizer=ocp.args.StandardRestore(_by_path(_abstract(state.opt_state))),
            ),
        )
        return TrainState(
            jax.device_put(np.int32(step), state.step.sharding),
            _like(state.params, restored.params),
            _like(state.opt_state, restored.optimizer),
        )

    def restore_params(self, params: Any) -> Any:
        """The weights of the newest whole checkpoint; `params` may hold shapes instead of arrays.

        Raises:
          ValueError: there is no checkpoint, or none that is whole.
        """
        step = self._newest_whole(set_aside=False)
        args = ocp.args.StandardRestore(_by_path(_abstract(params)))
        restored = self._checkpointer.restore(
            self._directory / str(step), args=ocp.args.Composite(params=args)
        )
        return _like(params, restored.params)

    def close(self) -> None:
        """Waits until the last save is signed; raises what `wait` does."""
        self.wait()
        self._pool.shutdown()
        self._checkpointer.close()

    def _steps(self) -> list[int]:
        """The newest first."""
        names = (path.name for path in self._directory.glob("*"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def _newest_whole(self, *, set_aside: bool) -> int:
        # The first process reads the files and decides; -1 says that it found none.
        damaged, step = {}, -1
        if jax.process_index() == 0:
            for unsigned in self._directory.glob("*.unsigned*"):
                logging.warning("%s was never finished, and is not used", unsigned)
            for found in self._steps():
                bad = _damage(self._directory / str(found))
                if not bad:
                    step = found
                    break
                damaged[found] = bad
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step < 0:
            raise ValueError(
                f"no checkpoint in {self._directory}: train first, or name another workdir"
                if not damaged
                else f"no checkpoint in {self._directory} is whole. Not what was written are, by "
                f"step: {damaged}. Put the files back, or delete the directory to start anew"
            )
        for found, bad in damaged.items():
            folder = self._directory / str(found)
            logging.warning(
                "checkpoint %s is damaged: files %s are not what was written. Going back to the "
                "newest one that is whole, of step %d",
                *(folder, bad, step),
            )
            if set_aside:
                aside = folder.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        return step


def _damage(folder: Path) -> list[str]:
    """The files of a checkpoint that are not what its manifest says."""
    try:
        signed = dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError):
        return [MANIFEST]
    found = _hashes(folder)
    return sorted(name for name in signed if found.get(name) != signed[name])


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            hashes[str(path.relative_to(folder))] = digest.hexdigest()
    return hashes


def _by_path(tree: Any) -> dict[str, Any]:
    # An `nnx.Variable` is one more step of the path to its array, and no part of the name.
    leaves = jax.tree_util.tree_leaves_with_path(nnx.as_pure(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _like(tree: Any, by_path: dict[str, Any]) -> Any:
    """The arrays of `by_path` in the shape of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [by_path[name] for name in _by_path(tree)])


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )
