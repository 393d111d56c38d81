"""How good translations are, and where the figures of a run go."""

import json
import operator
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sacrebleu
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tqdm import tqdm

from mqa_jax.core.checks import check_integer

METRICS = "metrics.jsonl"
FLUSH_SECONDS = 60

# The figures of what is decoded, of all that a validation may have.
DECODED = ("bleu", "chrf", "exact_match")


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU by sacrebleu with its defaults, and the signature that says which these are.

    Raises:
      ValueError: not as many hypotheses as references, or none at all.
    """
    _check(hypotheses, references)
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return score, str(metric.get_signature())


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus chrF by sacrebleu with its defaults, and its signature; raises as `bleu` does."""
    _check(hypotheses, references)
    metric = sacrebleu.CHRF()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return score, str(metric.get_signature())


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The share of hypotheses that are their reference to the letter; raises as `bleu` does."""
    _check(hypotheses, references)
    return sum(map(operator.eq, hypotheses, references)) / len(references)


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")


def read_metrics(workdir: str | Path, kind: str) -> list[dict[str, Any]]:
    """What a run has logged of a `kind` until now, line by line.

    Raises:
      ValueError: a line is not what `MetricLog` writes.
    """
    path, records = Path(workdir) / METRICS, []
    # Behind the last line break is what a kill has left of a line, if anything.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["kind"] == kind:
                records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{path}:{number}: not what a run has written ({error!r}): delete the line"
            ) from None
    return records


class MetricLog:
    """Writes figures to `metrics.jsonl` and to TensorBoard event files in a working directory.

    On a terminal a progress bar shows the newest ones; elsewhere each is a plain line.

    Args:
      workdir: an existing directory.
      total_steps: where the progress bar ends.
      step: where it starts.

    Raises:
      ValueError: a negative number.
    """

    def __init__(self, workdir: str | Path, total_steps: int, step: int = 0):
        check_integer("total_steps", total_steps, least=0)
        check_integer("step", step, least=0)
        # Line-buffered, so that a killed run loses at most the line being written, of which it may
        # have left a part.
        path = Path(workdir) / METRICS
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the run then waits
        # for it forever. By its time alone a file would replace that of a run a second before.
        prefix, suffix = Path(workdir) / "events", f".{time.time_ns()}"
        self._events = EventsWriter(str(prefix), filename_suffix=suffix)
        self._flushed = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not is_terminal)
        self._step = step

    def write(self, kind: str, step: int, figures: Mapping[str, float], *, cause: str = "") -> None:
        """Logs `figures`, of a `kind` such as "train" or "validation", as they are after `step`.

        Args:
          cause: why they are so, in words, where that is known.

        Raises:
          OSError: the disk is full, say; it names a file of the directory.
        """
        figures = {name: float(value) for name, value in figures.items()}
        now = time.time()
        try:
            record = {"kind": kind, "step": step, "time": now, **figures}
            self._file.write(json.dumps(record | ({"cause": cause} if cause else {})) + "\n")
            for name, value in figures.items():
                scalar = summary.scalar(f"{kind}/{name}", value)
                self._events.write_event(Event(wall_time=now, step=step, summary=scalar))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            # Python's own message does not say which file.
            raise OSError(error.errno, error.strerror, self._file.name) from None
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        shown += f"  {cause}" if cause else ""
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
        self._events.close()
        self._file.close()
