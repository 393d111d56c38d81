"""The training loop."""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mqa_jax.core.devices import PEAK_TFLOP_PER_S
from mqa_jax.core.sharding import ShardingRules, make_mesh
from mqa_jax.data import loader
from mqa_jax.data.prepare import prepare
from mqa_jax.data.tokenizer import Tokenizer
from mqa_jax.train import workdir as workdirs
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.evaluate import make_evaluate
from mqa_jax.train.metrics import MetricLog
from mqa_jax.train.processes import Stop, first_process_first, put_batch, row_share
from mqa_jax.train.setup import set_up, train_flops

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later.


def train(config: ConfigDict, workdir: str) -> int:
    """Returns the exit code."""
    mesh = make_mesh(**config.mesh)
    check(config, mesh)
    with first_process_first():
        path = workdirs.claim(workdir, config)
        data = prepare(config.data)
        tokenizer = Tokenizer.load(workdirs.keep_tokenizer(path, data / "tokenizer.model"))

    settings = config.train
    model, state, train_step, schedule = set_up(config, mesh)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    checkpoints = Checkpoints(path / workdirs.CHECKPOINTS, keep=settings.keep_checkpoints)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
    start = int(state.step)
    evaluate = make_evaluate(config, model, tokenizer, data, mesh)

    log = MetricLog(path, settings.steps, start) if jax.process_index() == 0 else NoLog()
    log.print(
        f"{parameters:,} parameters, {mesh.size} {mesh.devices.flat[0].platform} device(s), "
        f"step {start:,} to {settings.steps:,}"
    )
    index, count = row_share(mesh, settings.batch_size)
    batches = loader.train_batches(
        data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        start=start,
        process_index=index,
        process_count=count,
    )
    stop = Stop()
    # The metrics of a step are fetched a step late, so that the device never waits for the host:
    # but at once where something hangs on whether the step was skipped.
    flops = train_flops(
        model, settings.batch_size, config.data.source_length, config.data.target_length
    )
    waiting, meter = None, Meter(log, 1e-12 * flops / mesh.size)
    step, is_stopped = start, False
    while step < settings.steps and not is_stopped:
        state, metrics = train_step(state, put_batch(mesh, next(batches)))
        step += 1
        if waiting:
            meter.add(*waiting)
        waiting = step, metrics
        is_last, is_stopped = step == settings.steps, stop(step)
        is_logged = step % settings.log_every == 0 or is_last or is_stopped
        is_saved = step % settings.checkpoint_every == 0 or is_last or is_stopped
        if is_logged or is_saved or meter.skipped_in_a_row + 1 >= settings.max_skipped_steps:
            meter.add(*waiting)
            waiting = None
        if is_logged:
            log.write("train", step, meter.read() | {"learning_rate": schedule(step - 1)})
            checkpoints.check()
        skipped = meter.skipped_in_a_row
        is_hopeless = skipped >= settings.max_skipped_steps
        if is_saved or is_hopeless:
            # From before the skipped steps, so that a resumed run comes to the same end.
            position = step if is_last and not is_hopeless else step - skipped
            checkpoints.save(dataclasses.replace(state, step=jnp.int32(position)))
        if is_hopeless:
            checkpoints.close()
            raise RuntimeError(
                f"the loss or the gradient of {skipped} steps in a row, {position + 1} to {step}, "
                f"was not finite. The checkpoint of step {position}, before them, is saved: lower "
                "the learning rate, or look at the data"
            )
        if (step % settings.evaluate_every == 0 and not is_stopped) or is_last:
            log.write("validation", step, evaluate(state.params, log.print))
            meter.restart()
    checkpoints.close()
    is_done = step >= settings.steps
    if not is_done:
        log.print(f"stopped by a signal; the checkpoint of step {position:,} is saved")
    log.close()
    return 0 if is_done else STOPPED


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a ValueError, before anything is compiled, for sizes that make no sense."""
    axes = ShardingRules().B
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if (accumulate := config.train.accumulate) < 1:
        raise ValueError(f"config.train.accumulate must be at least 1, not {accumulate}")
    for name, times in (("train", accumulate), ("evaluate", 1)):
        size = config[name].batch_size
        if size < 1 or size % (parts * times):
            raise ValueError(
                f"config.{name}.batch_size {size} cannot be split over the {parts} parts of the "
                f"mesh axes {axes} (mesh {dict(mesh.shape)}), {times} at a time: give a multiple "
                f"of {parts * times}"
            )
    if config.train.max_skipped_steps < 1:
        raise ValueError(f"max_skipped_steps {config.train.max_skipped_steps} is not 1 or more")


class NoLog:
    """What all processes but the first have for a log."""

    def print(self, *_) -> None: ...

    write = close = print


class Meter:
    """Means of the train metrics, and the speed, since the last reading.

    Target tokens a second; model flops a second of a device (`train_flops` has the formula), and
    their share of its published peak in bfloat16 where that is known: the MFU.

    Args:
      log: is told of each skipped step.
      tflop: model flops of a step for each device, in units of 1e12.

    Attributes:
      skipped_in_a_row: how many of the last steps were skipped.
    """

    def __init__(self, log: MetricLog | NoLog, tflop: float):
        self._log, self._tflop = log, tflop
        self.skipped_in_a_row = 0
        self.restart()

    def restart(self) -> None:
        self._started = time.perf_counter()
        self._seen = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        metrics = jax.device_get(metrics)
        self._seen.append(metrics)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped"] else 0
        if metrics["skipped"]:
            # The batch as `loader.train_batches` counts them, from 0.
            figures = {"batch": step - 1, "in_a_row": self.skipped_in_a_row}
            self._log.write("skipped", step, figures)

    def read(self) -> dict[str, float]:
        """The means are of the steps that were not skipped, and not there when all were."""
        figures = {"skipped": sum(metrics["skipped"] for metrics in self._seen)}
        tokens = sum(int(metrics["tokens"]) for metrics in self._seen)
        done = [metrics for metrics in self._seen if not metrics["skipped"]]
        for name in done[0] if done else ():
            if name not in ("tokens", "skipped"):
                figures[name] = np.mean([metrics[name] for metrics in done], dtype=np.float64)
        seconds = time.perf_counter() - self._started
        figures["tokens_per_second"] = tokens / seconds
        figures["tflop_per_second"] = self._tflop * len(self._seen) / seconds
        if peak := PEAK_TFLOP_PER_S.get(jax.devices()[0].device_kind):
            figures["mfu"] = figures["tflop_per_second"] / peak
        self.restart()
        return figures
