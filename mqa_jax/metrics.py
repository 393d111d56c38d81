"""How good translations are, and where the figures of a run go."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import sacrebleu
from tensorboardX import SummaryWriter
from tqdm import tqdm


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU by sacrebleu with its defaults, and the signature that says which these are.

    Raises:
      ValueError: not as many hypotheses as references, or none at all.
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return score, str(metric.get_signature())


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The share of hypotheses that are their reference to the letter."""
    pairs = list(zip(hypotheses, references, strict=True))
    return sum(hypothesis == reference for hypothesis, reference in pairs) / len(pairs)


class MetricLog:
    """Writes figures to `metrics.jsonl` and to TensorBoard event files in a working directory.

    On a terminal a progress bar shows the newest ones; elsewhere each is a plain line.

    Args:
      workdir: an existing directory.
      total_steps: where the progress bar ends.
      step: where it starts.
    """

    def __init__(self, workdir: str | Path, total_steps: int, step: int = 0):
        # Line-buffered, so that a killed run loses at most the line being written.
        path = Path(workdir) / "metrics.jsonl"
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir))
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not is_terminal)
        self._step = step

    def write(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        """Logs `figures`, of a `kind` such as "train" or "validation", as they are after `step`."""
        figures = {name: float(value) for name, value in figures.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **figures}))
        self._file.write("\n")
        for name, value in figures.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar.disable or kind != "train":
            self.print(f"step {step:>7,} {kind:>10}  {shown}")
        else:
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._step)
        self._step = step

    def print(self, text: str) -> None:
        """A line that does not break the progress bar."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._tensorboard.close()
        self._file.close()
