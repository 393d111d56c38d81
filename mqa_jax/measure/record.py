"""A run of the benchmark as a file: its rows, on what it was made, and the limits behind it.

Knows no JAX.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mqa_jax.measure.cost import FIELDS, Cost

# Of a dtype, what the probes reach: `gb_per_s` and `gflop_per_s`.
Limits = Mapping[str, float]
LIMITS = ("gb_per_s", "gflop_per_s")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the benchmark.

    Attributes:
      about: when and on what it was made: date, device, machine, versions; the `model` where it has
        a name, and `cache_bytes`, what the caches of the processor hold, where that is known.
      costs: a row for each variant, search, dtype, batch and context length, in order.
      is_complete: False where the run was interrupted or is going on.
      probe_behind: by dtype, the limits as the same probes measured them again behind the last
        row; empty where they did not (a run that was interrupted, a file of version 0.1).
    """

    about: dict[str, Any]
    costs: list[Cost]
    is_complete: bool
    probe_behind: dict[str, Limits] = dataclasses.field(default_factory=dict)

    def fraction_behind(self, cost: Cost) -> float | None:
        """`cost.roofline_fraction` by the limits behind the run, or None without any."""
        limits = self.probe_behind.get(cost.dtype)
        if limits is None:
            return None
        num_bytes = cost.weight_bytes + cost.kv_bytes
        least_ms = max(num_bytes / limits["gb_per_s"], cost.flops / limits["gflop_per_s"]) / 1e6
        return least_ms / cost.step_ms


def record(
    costs: Iterable[Cost],
    about: dict[str, Any],
    path: str | Path,
    *,
    probe: Callable[[str], Limits] | None = None,
) -> Run:
    """Saves the rows that `costs` yields, the file anew behind each, and tells of them.

    An interrupt (Ctrl-C) ends the run, and what was measured is kept.

    Args:
      costs: the rows, such as `benchmark.sweep` yields.
      about: on what they are measured, such as `benchmark.describe` tells.
      path: the file.
      probe: measures the limits of a dtype again, behind the last row.
    """
    run = Run(about, [], is_complete=False)
    try:
        for cost in _interruptible(costs):
            run.costs.append(cost)
            save(run, path)
            print(
                f"{cost.variant}, {cost.search}, {cost.dtype}, batch {cost.batch}, context "
                f"{cost.context_length}: {cost.step_ms:.3g} ms per step",
                file=sys.stderr,
            )
        if probe is not None:
            for dtype in dict.fromkeys(cost.dtype for cost in run.costs):
                run.probe_behind[dtype] = probe(dtype)
    except KeyboardInterrupt:
        print(f"interrupted: {len(run.costs)} rows are kept", file=sys.stderr)
        return run
    run = dataclasses.replace(run, is_complete=True)
    save(run, path)
    return run


def _interruptible(costs: Iterable[Cost]) -> Iterator[Cost]:
    """`costs`, up to an interrupt: in a callback of the garbage collector, of which JAX has one,
    the KeyboardInterrupt itself is printed and gone."""
    interrupts: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        # A thread beside the main one may not set it, and who ignores it has a reason.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, interrupt))
        for cost in costs:
            yield cost
            if interrupts:
                raise KeyboardInterrupt


def save(run: Run, path: str | Path) -> None:
    """Writes a run as JSON, with a line on each field; a reader never sees half of it."""
    path = Path(path)
    content = {
        **run.about,
        "is_complete": run.is_complete,
        "probe_behind": run.probe_behind,
        "fields": FIELDS,
        "costs": [dataclasses.asdict(cost) for cost in run.costs],
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load(path: str | Path) -> Run:
    """The run of a file that `save` wrote.

    Raises:
      ValueError: it is no JSON (cut short, say), or not a run, or of another version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(
            f"{path} is not whole, or no JSON ({error}): run the benchmark again"
        ) from None
    rows = content.get("costs") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no record of the benchmark: it has no list of costs")
    names = {field.name for field in dataclasses.fields(Cost)}
    for row in rows:
        if differing := sorted(row.keys() ^ names):
            raise ValueError(
                f"{path} is of another version, its rows differ in {', '.join(differing)}: run "
                "the benchmark again"
            )
    probe_behind = content.pop("probe_behind", {})
    for dtype, limits in probe_behind.items():
        if sorted(limits) != sorted(LIMITS):
            raise ValueError(
                f"{path} is of another version, its probe_behind of {dtype} has "
                f"{', '.join(sorted(limits))} where {', '.join(LIMITS)} are expected: run the "
                "benchmark again"
            )
    if "is_complete" not in content:
        raise ValueError(f"{path} is of another version, without is_complete: run it again")
    about = {k: v for k, v in content.items() if k not in ("costs", "fields", "is_complete")}
    return Run(about, [Cost(**row) for row in rows], content["is_complete"], probe_behind)
