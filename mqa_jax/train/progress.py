"""Whether a run was evaluated, and still gets better: from its log alone, so that one that is
resumed comes to the same."""

import math
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mqa_jax.train.metrics import DECODED, read_metrics

LOWER_IS_BETTER = ("loss", "ln_perplexity")
FIGURES = (*LOWER_IS_BETTER, "accuracy", *DECODED)


class Best:
    """The best evaluation of a run, by the figure `config.train.best`; nothing if that is empty.

    Attributes:
      steps: that of the evaluation, and behind it those that its weights may be saved as instead:
        the steps from there on were skipped. Known to the first process alone.
    """

    def __init__(self, workdir: Path, config: ConfigDict):
        self._workdir = workdir
        self._name, self._patience = config.train.best, config.train.patience
        self.steps: tuple[int, ...] = ()

    def look(self, step: int) -> bool:
        """Takes in what is logged up to a step; what a run did behind it before it was killed is
        not done yet.

        Returns:
          whether `config.train.patience` evaluations since the best were no better.
        """
        if not self._name:
            return False
        waited = 0
        if jax.process_index() == 0:
            self.steps, waited = best_steps(self._workdir, self._name, step)
        is_over = 0 < self._patience <= waited
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(is_over)))

    def __str__(self) -> str:
        best = f"that of step {self.steps[0]:,}" if self.steps else "yet to come"
        return (
            f"the best {self._name} is {best}, and --config.train.patience={self._patience} ends a "
            "run after as many evaluations without a better"
        )


def best_steps(workdir: Path, name: str, step: int | None = None) -> tuple[tuple[int, ...], int]:
    """The steps of `Best`, none if no figure was finite, and how many evaluations came since.

    Args:
      name: one of `FIGURES`.
      step: what is behind it does not count; all that is logged does when None.
    """
    figures = {
        record["step"]: float(record[name])  # Of a step that was done twice, the later one.
        for record in read_metrics(workdir, "validation")
        if name in record and (step is None or record["step"] <= step)
    }
    sign = -1 if name in LOWER_IS_BETTER else 1
    finite = [step for step, figure in figures.items() if math.isfinite(figure)]
    # Of equal ones the first.
    best = max(finite, key=lambda step: (sign * figures[step], -step), default=None)
    if best is None:
        return (), len(figures)
    steps = [best]
    skipped = {record["step"] for record in read_metrics(workdir, "skipped")}
    while steps[-1] in skipped:
        steps.append(steps[-1] - 1)
    return tuple(steps), sum(step > best for step in figures)


def lacks_evaluation(workdir: Path, config: ConfigDict, step: int) -> bool:
    """Whether the run ended, by a kill or a signal, between a save and the evaluation behind it."""
    is_due = step > 0 and (step % config.train.evaluate_every == 0 or step == config.train.steps)
    if not is_due:
        return False
    is_there = jax.process_index() == 0 and any(
        record["step"] == step and math.isfinite(record.get("loss", math.nan))
        for record in read_metrics(workdir, "validation")
    )
    # The first process keeps the log, and all of them evaluate or none.
    return not multihost_utils.broadcast_one_to_all(np.bool_(is_there))
