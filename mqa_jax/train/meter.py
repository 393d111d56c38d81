"""The metrics of steps between two lines of the log: their means, the speed, what was skipped."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mqa_jax.core.devices import PEAK_TFLOP_PER_S
from mqa_jax.train.loss import Batch
from mqa_jax.train.metrics import MetricLog


class NoLog:
    """What all processes but the first have for a log."""

    def print(self, *_: Any, **__: Any) -> None: ...

    write = close = print


class Meter:
    """Means of the train metrics, and the speed, since the last reading.

    Target tokens a second; model flops a second of a device (`train_flops` has the formula), and
    their share of its published peak in bfloat16 where that is known: the MFU.

    Args:
      log: is told of each skipped step.
      tflop: model flops of a step for each device, in units of 1e12.
      diagnose: says why a step was skipped, from weights, batch and position; see `diagnose`.

    Attributes:
      skipped_in_a_row: how many of the last steps were skipped.
      cause: why the last of them was.
    """

    def __init__(
        self,
        log: MetricLog | NoLog,
        tflop: float,
        diagnose: Callable[[nnx.State, Batch, int], str],
    ):
        self._log, self._tflop, self._diagnose = log, tflop, diagnose
        self.skipped_in_a_row, self.cause = 0, ""
        self.restart()

    def restart(self) -> None:
        self._started = time.perf_counter()
        self._seen: list[Mapping[str, Any]] = []

    def add(
        self, step: int, metrics: Mapping[str, jax.Array], batch: Batch, params: nnx.State
    ) -> None:
        """Takes in a step; the weights are those of now, if the step was skipped not its own."""
        metrics = jax.device_get(metrics)
        self._seen.append(metrics)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped"] else 0
        if metrics["skipped"]:
            # The batch as `loader.train_batches` counts them, from 0.
            figures = {"batch": step - 1, "in_a_row": self.skipped_in_a_row}
            self.cause = self._diagnose(params, batch, step - 1)
            self._log.write("skipped", step, figures, cause=self.cause)

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
