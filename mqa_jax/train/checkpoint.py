"""Checkpoints of a training run: the one place that knows Orbax.

<directory>/<step>/                a checkpoint: its number is the position in the data
<directory>/<step>/run.json        what the run says of itself, such as its config
<directory>/<step>/manifest.json   the SHA-256 of each of its other files
<directory>/<step>.unsigned*       one being written, or left by a run that was killed meanwhile
<directory>/<step>.damaged         one that was not what its manifest says; safe to delete

A checkpoint is written, read back, then signed with its manifest, then renamed: whatever interrupts
this, a name that is a number alone means a checkpoint that was whole. What happens to its files
later is found by the manifest before a byte of it is used. Whatever else lies in the directory is
not ours, and left as it is.
"""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from mqa_jax.core.checks import check_integer
from mqa_jax.core.paths import local_path, read_json
from mqa_jax.train.state import TrainState

MANIFEST = "manifest.json"
RUN = "run.json"

# Our names, in ASCII digits.
_SIGNED = re.compile("0|[1-9][0-9]{0,8}")
_UNSIGNED = re.compile(r"[0-9]+\.unsigned(\..*)?")


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it stand."""


class Checkpoints:
    """The checkpoints of a working directory, written in the background, each whole or not at all.

    A checkpoint holds the weights and, where there is one, the optimizer's state; the position in
    the data is its step.
    Arrays are stored under their path in the tree (`decoder/layers/0/attention/query`), so that
    what reads them need not know how the trees were nested.

    With several processes each calls the same methods, and all see the same directory. What is read
    is left as it is, but for `restore`, which moves damaged checkpoints out of the way.

    In a `with` statement it is closed at the end; an error inside waits for the save under way, and
    then is the error.

    Args:
      directory: where they lie; made by the first `save`.
      keep: how many of the newest are kept; an older one goes when a newer one has been signed.
      run: what `run` gives back, signed as the arrays are; JSON.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 3, run: Mapping[str, Any] | None = None
    ):
        self._keep = check_integer("keep", keep)
        # Without symbolic links and "..", which Tensorstore would take away by the letter.
        self._directory = local_path("directory", directory).resolve()
        self._run = json.dumps(run or {}, indent=2)
        # Orbax and Tensorstore take these for patterns and slashes: they get a link without them.
        self._link: tempfile.TemporaryDirectory[str] | None = None
        self._plain = self._directory
        if set(str(self._directory)) & set("[]\\"):
            self._link = tempfile.TemporaryDirectory(prefix="mqa_jax-")
            self._plain = Path(self._link.name) / "checkpoints"
            self._plain.symlink_to(self._directory, target_is_directory=True)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            # Else it takes minutes until a directory that cannot be made is an error.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sign")
        self._saving: tuple[int, Future] | None = None
        # Not a look at the directory, which another process may have at another moment.
        self._here: int | None = None
        # What was found whole by the last look at the files, and what newer ones were not.
        self._read: int | None = None
        self._damaged: list[int] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            logging.error("%s", second)

    def save(self, state: TrainState, spared: Collection[int] = ()) -> None:
        """Starts to write `state`; returns when it has been copied to the host.

        Does nothing if `state` is what was saved or restored last. Waits until the save before is
        done: one at a time takes memory of the host.

        Args:
          spared: steps whose checkpoints stay, besides the newest.

        Raises:
          SaveError: this save, or the one before, failed.
        """
        self.wait()
        step = int(state.step)
        if step == self._here:
            return
        items = {"params": _by_path(state.params)}
        if optimizer := _by_path(state.opt_state):
            items["optimizer"] = optimizer
        # On their way before the arrays are, which the next step may overwrite.
        sums = jax.tree.map(_sum_of_bits, items)
        try:
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                for left in self._unfinished():
                    shutil.rmtree(left)
            self._checkpointer.save(
                self._plain / f"{step}.unsigned",
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(arrays) for name, arrays in items.items()}
                ),
                force=True,
            )
        except OSError as error:
            raise self._failure(step, error) from None
        self._here, self._read = step, None
        shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), items)
        self._saving = step, self._pool.submit(self._finish, step, shapes, sums, spared)

    def _finish(self, step: int, shapes: dict, sums: dict, spared: Collection[int]) -> None:
        """In the background: signs what Orbax has written, and lets go of the oldest."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        unsigned = self._plain / f"{step}.unsigned"
        for item, arrays in jax.device_get(sums).items():
            for name, number in arrays.items():
                shape, dtype = shapes[item][name]
                _check_written(unsigned / item, name, shape, dtype, number)
        (unsigned / RUN).write_text(self._run)
        (unsigned / MANIFEST).write_text(json.dumps(_hashes(unsigned), indent=2))
        unsigned.rename(self._plain / str(step))
        # Not newer ones, of which nothing is known: this one is whole.
        older = [old for old in steps_in(self._directory) if old <= step]
        for old in set(older[self._keep :]) - set(spared):
            try:
                shutil.rmtree(self._directory / str(old))
            except OSError as error:
                logging.warning("the old checkpoint %s cannot be deleted: %s", old, error)

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

    def _failure(self, step: int, error: BaseException) -> SaveError:
        return SaveError(
            f"checkpoint {step} could not be written into {self._directory}: {error}. The newest "
            f"one there is of step {self.latest_step()}; make room, and run the same command again"
        )

    def latest_step(self) -> int | None:
        """The newest checkpoint's; whether it is still whole, only reading it tells."""
        return max(steps_in(self._directory), default=None)

    def whole_step(self) -> int:
        """The newest whole checkpoint's, all of whose files are read for it.

        A `run`, `restore` or `restore_params` behind it is of the same one, and does not check it
        again.

        Raises:
          ValueError: there is no checkpoint, or none that is whole.
        """
        return self._read_newest() if self._read is None else self._read

    def restore(self, state: TrainState) -> TrainState:
        """The newest whole checkpoint, with the shapes, dtypes and shardings of `state`.

        Newer ones that are damaged are named in the log, and renamed.

        Raises:
          ValueError: there is no checkpoint, or none that is whole; or it has weights alone.
        """
        restored = self.read(state)
        for damaged in self._damaged:
            aside = self._directory / f"{damaged}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(damaged)).rename(aside)
        self._here, self._damaged = int(restored.step), []
        return restored

    def read(self, state: TrainState) -> TrainState:
        """As `restore`, of another run's checkpoints: they are left as they are."""
        step = self.whole_step()
        self._read = None
        if not has_optimizer(self._directory, step):
            raise ValueError(
                f"checkpoint {step} in {self._directory} has no optimizer to go on with"
            )
        restored = self._checkpointer.restore(
            self._plain / str(step),
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

    def restore_params(self, params: Any, step: int | None = None) -> Any:
        """The weights of a checkpoint; `params` may hold shapes instead of arrays.

        A weight goes where its place in `params` says, and else, as for shapes without a sharding,
        to the first device: wherever the run that saved it had it.

        Args:
          step: of the checkpoint; the newest whole one when None.

        Raises:
          ValueError: there is no such checkpoint, or it is not whole.
        """
        if self._read is None or step not in (None, self._read):
            self._find(step)
        step, self._read = self._read, None
        args = ocp.args.StandardRestore(_by_path(_abstract(params)))
        restored = self._checkpointer.restore(
            self._plain / str(step), args=ocp.args.Composite(params=args)
        )
        return _like(params, restored.params)

    def run(self, step: int | None = None) -> dict[str, Any]:
        """What the run said of itself in a checkpoint; nothing before version 0.2.

        A `restore` or `restore_params` behind it is of the same one, and does not check it again.
        Arguments and errors are those of `restore_params`.
        """
        path = self._directory / str(self._find(step)) / RUN
        return read_json(path) if path.exists() else {}

    def close(self) -> None:
        """Waits until the last save is signed; raises what `wait` does."""
        told: contextlib.AbstractContextManager = contextlib.suppress(OSError)
        try:
            self.wait()
            told = contextlib.nullcontext()  # Else Orbax says again, and less well, what failed.
        finally:
            self._pool.shutdown()
            with told:
                self._checkpointer.close()
            if self._link:
                self._link.cleanup()

    def _unfinished(self) -> list[Path]:
        return [path for path in _folders(self._directory, _UNSIGNED) if not path.is_symlink()]

    def _find(self, step: int | None) -> int:
        """A checkpoint that is whole, which may be read once without another look at its files."""
        if step is None:
            return self._read_newest()
        bad = _damage(self._directory / str(step))
        # Only now: a run that goes on may have let go of it meanwhile.
        if step not in (there := steps_in(self._directory)):
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory}; there are those of steps "
                f"{', '.join(map(str, there)) or 'none'}"
            )
        if bad:
            raise ValueError(
                f"checkpoint {self._directory / str(step)} is damaged: files {bad} are not what "
                "was written. Put them back, or name another --step"
            )
        self._read, self._damaged = step, []
        return step

    def _read_newest(self) -> int:
        """The newest that is whole, which may be read once without another look at its files."""
        # The first process reads the files and decides; -1 says that it found none.
        damaged: dict[int, list[str]] = {}
        step = -1
        if jax.process_index() == 0:
            for unsigned in self._unfinished():
                logging.warning("%s was never finished, and is not used", unsigned)
            looked_at = set[int]()
            # A run that goes on lets go of old ones, for newer ones that were not there before.
            while step < 0 and (rest := sorted({*steps_in(self._directory)} - looked_at)):
                looked_at.add(found := rest[-1])
                if not (bad := _damage(folder := self._directory / str(found))):
                    step = found
                elif folder.is_dir():
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
        self._read, self._damaged = step, list(damaged)
        return step


def steps_in(directory: Path) -> list[int]:
    """Those of the checkpoints in a directory, which need not be there; the newest first."""
    return sorted(
        (
            int(path.name)
            for path in _folders(directory, _SIGNED)
            # Another's folder may have a number for a name.
            if (path / MANIFEST).exists() or (path / "params").exists()
        ),
        reverse=True,
    )


def has_optimizer(directory: Path, step: int) -> bool:
    """Whether a checkpoint has the state of one beside the weights."""
    return (directory / str(step) / "optimizer").is_dir()


def _folders(directory: Path, name: re.Pattern[str]) -> list[Path]:
    """The directories in one whose name is of that kind."""
    if not directory.is_dir():
        return []
    return [
        path for path in sorted(directory.iterdir()) if name.fullmatch(path.name) and path.is_dir()
    ]


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    """Of an array's words of up to 32 bits, modulo 2^32."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    return words.astype(jnp.uint32).sum(dtype=jnp.uint32)


def _check_written(
    folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, sum_of_bits: int
) -> None:
    """Reads an array back that Orbax has written.

    Not by Orbax, with which processes wait for each other; one at a time, as the host may not have
    memory for all.

    Raises:
      ValueError: it is not there, or not what was saved.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{folder}/"},
            "path": f"{name}/",
        },
    }
    array = np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())
    words = array.reshape(-1).view(f"uint{8 * min(array.dtype.itemsize, 4)}")
    if (array.shape, array.dtype) != (shape, dtype) or words.sum(dtype=np.uint32) != sum_of_bits:
        raise ValueError(f"{folder.name}/{name} is not what was written when it is read back")


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
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            # Without one Orbax would ask for the devices that the array was saved from.
            sharding=getattr(x, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0]),
        ),
        tree,
    )
