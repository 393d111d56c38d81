"""What the comparisons with other libraries share: contestants that take turns, and their table.

A contestant is a name, a package that is installed here or with `--peers_python`, and a kind: a
variant of the model and a precision. Each is measured in a process of its own, alone, and prints
its records as JSON.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags

ROUNDS = flags.DEFINE_integer("rounds", 2, "How often they take turns.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Where to write the figures as JSON.")
PEERS_PYTHON = flags.DEFINE_string("peers_python", sys.executable, "Interpreter of the peers.")
WORKER = flags.DEFINE_string("worker", None, "Used inside: measure this contestant, print JSON.")

Run = Callable[[], float]  # Decodes; the seconds that one step took. Warm when it is returned.


def take_turns(workers: list[tuple[str, str]], arguments: list[str], records: list[dict]) -> None:
    """Adds what each `(name, kind)` measures to `records`; `arguments` are of this script."""
    try:
        for _ in range(ROUNDS.value):
            for name, kind in workers:
                python = sys.executable if name == "ours" else PEERS_PYTHON.value
                command = [python, *arguments, f"--worker={name} {kind}"]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if result.returncode:
                    print(f"{name} {kind} failed, see above; it needs {name} installed")
                    continue
                records += json.loads(result.stdout.splitlines()[-1])
                write(records)
                print(f"{name} {kind}: done", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far follows", file=sys.stderr)


def write(records: list[dict]) -> None:
    """To `--output`, after each contestant: nothing that was measured gets lost."""
    if OUTPUT.value:
        record = dict(machine=f"{platform.machine()}, {os.cpu_count()} cores")
        record |= dict(date=datetime.date.today().isoformat(), rows=summary(records))
        Path(OUTPUT.value).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def worker() -> tuple[str, str, str]:
    """Name, variant and precision of the contestant that this process is to measure."""
    name, variant, precision = WORKER.value.split(" ", 2)
    return name, variant, precision


def record(name: str, ms: float, package: str | None = None, **setting: object) -> dict:
    """What a contestant needed in a setting, and with which version of its package."""
    package = package or {"ours": "jax"}.get(name, name)
    version = f"{package} {importlib.metadata.version(package)}"
    head = dict(contestant=name, version=version, python=platform.python_version())
    return head | setting | dict(ms=ms)


def read_bandwidth() -> float:
    """Bytes a second of a plain sum over 1 GiB, the best of several."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**28, jnp.float32)
    total, best = jax.jit(jnp.sum), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(total(x))
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def difference(seconds_to: Callable[[int], float], steps: int, repeats: int) -> Run:
    """Of a step, from the seconds to a number of tokens."""
    for tokens in (1, 1 + steps):
        seconds_to(tokens)

    def run() -> float:
        behind = statistics.median(seconds_to(1 + steps) for _ in range(repeats))
        return (behind - statistics.median(seconds_to(1) for _ in range(repeats))) / steps

    return run


def summary(records: list[dict]) -> list[dict]:
    """A row a setting: the median over the rounds, the least and the most."""
    groups = {}
    for record in records:
        value = record.get("ms", record.get("gigabytes_per_second"))
        key = tuple((k, v) for k, v in record.items() if k not in ("ms", "gigabytes_per_second"))
        groups.setdefault(key, []).append(value)
    return [
        dict(key) | dict(median=statistics.median(values), min=min(values), max=max(values))
        for key, values in groups.items()
    ]


def print_table(rows: list[dict], settings: tuple[str, ...]) -> None:
    """`settings` are the columns that say what was decoded, and that ours is compared by."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"ms per decode step, median of {ROUNDS.value} rounds (least - most)")
    for column in (*settings, "contestant", "ms", "over ours"):
        table.add_column(column, no_wrap=True)
    measured = [row for row in rows if row["contestant"] != "read"]
    for row in measured:
        mine = [
            r["median"]
            for r in measured
            if r["contestant"] == "ours" and all(r[k] == row[k] for k in settings)
        ]
        table.add_row(
            *(str(row[k]) for k in settings),
            f"{row['contestant']}, {row['version']}",
            f"{row['median']:.3g} ({row['min']:.3g} - {row['max']:.3g})",
            f"{row['median'] / mine[0]:.2f}" if mine else "-",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for row in rows:
        if row["contestant"] == "read":
            console.print(f"a plain sum reads {row['median']:.1f} GB/s")
