"""One training run in several processes: how they meet, what each reads, and when they stop."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mqa_jax.core.sharding import ShardingRules


def initialize(peer_timeout: int) -> None:
    """Joins the other processes: before anything else is asked of jax.

    On Cloud TPU and under Slurm or Open MPI jax finds them by itself; elsewhere the environment
    says where the first process listens and which one this is: JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. All see the same working directory. When one dies or
    hangs, the others end with an error within about `peer_timeout` seconds.
    """
    count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    jax.distributed.initialize(
        num_processes=int(count) if count else None,
        process_id=int(index) if index else None,
        heartbeat_timeout_seconds=peer_timeout,
        shutdown_timeout_seconds=peer_timeout,
    )


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The other processes find what the first one made; or make it, where no disk is shared."""
    if jax.process_index() != 0:
        multihost_utils.sync_global_devices("made")
    yield
    if jax.process_index() == 0:
        multihost_utils.sync_global_devices("made")


def row_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which share of a batch's rows the devices of this process hold, of how many shares.

    Processes whose devices differ along `tensor` alone hold the same one.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ShardingRules().B))
    rows = sharding.addressable_devices_indices_map((batch_size,)).values()
    starts, stops, _ = zip(*(row[0].indices(batch_size) for row in rows if row), strict=True)
    size = max(stops) - min(starts)
    return min(starts) // size, batch_size // size


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch as its part of the global arrays."""
    sharding = NamedSharding(mesh, PartitionSpec(ShardingRules().B))
    # In one call: the loader's threads would hold up each array's.
    return jax.make_array_from_process_local_data(sharding, dict(batch))


class Stop:
    """Whether to stop behind a step: SIGTERM or SIGINT has come, to this process or to another.

    A thread answers the signal, with a word and by making the next SIGINT kill: Python itself acts
    on one between two of its own instructions, which while XLA compiles is minutes later.
    """

    def __init__(self) -> None:
        self._is_one_of_many = jax.process_count() > 1
        self._is_asked = False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(reading,), name="stop", daemon=True)
        thread.start()
        # Else Python would not tell the thread; that is all that they are for.
        signal.signal(signal.SIGINT, lambda *_: None)
        if not self._is_one_of_many:
            signal.signal(signal.SIGTERM, lambda *_: None)

    def _answer(self, reading: int) -> None:
        while number := os.read(reading, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            self._is_asked = True
            # The C function behind `signal.signal`, which is for the main thread alone.
            ctypes.pythonapi.PyOS_setsig(int(signal.SIGINT), None)
            name = signal.Signals(number[0]).name
            # Not `print`, whose lock the main thread may hold.
            word = f"\n{name}: stopping behind this step, with a checkpoint; Ctrl-C again to kill\n"
            with contextlib.suppress(OSError):
                os.write(2, word.encode())
            if self._is_one_of_many:
                # Which jax.distributed tells all processes of, and they agree on a step.
                os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        if self._is_one_of_many:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_asked
