"""The benchmark's record: JSON, a table, pictures, and the paper's figures beside it.

    python -m mqa_jax.measure.report docs/benchmark.json docs --readme=README.md

draws a run's pictures again, and writes its table between the markers of a README. Knows no JAX.

Array letters: B batch   C context length
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mqa_jax.measure.cost import FIELDS, Cost
from mqa_jax.measure.plots import draw

MARKERS = ("<!-- benchmark -->", "<!-- /benchmark -->")

# What a row is about; where all rows agree, it is said once.
KEYS = ("search", "dtype", "batch", "context_length")
KEY_NAMES = dict(search="search", dtype="dtype", batch="batch", context_length="context length")

# Shazeer 2019, table 2: TPUv2-microseconds per output token, of the encoder and of the decoder.
PAPER = {
    "greedy": {
        "multi_head": (1.7, 46.0),
        "multi_query": (1.5, 3.8),
        "multi_head_local": (1.7, 23.0),
        "multi_query_local": (1.5, 3.3),
    },
    "beam": {
        "multi_head": (2.0, 203.0),
        "multi_query": (1.6, 32.0),
        "multi_head_local": (1.9, 47.0),
        "multi_query_local": (1.6, 16.0),
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the benchmark.

    Attributes:
      about: when and on what it was made: date, device, machine, versions.
      costs: a row for each variant, search, dtype, batch and context length, in order.
      is_complete: False where the run was interrupted or is going on.
    """

    about: dict[str, str]
    costs: list[Cost]
    is_complete: bool


def record(costs: Iterable[Cost], about: dict[str, str], path: str | Path) -> Run:
    """Saves the rows that `costs` yields, the file anew behind each, and tells of them.

    An interrupt (Ctrl-C) ends the run, and what was measured is kept.
    """
    run = Run(about, [], is_complete=False)
    try:
        for cost in costs:
            run.costs.append(cost)
            save(run, path)
            print(
                f"{cost.variant}, {cost.search}, {cost.dtype}, batch {cost.batch}, context "
                f"{cost.context_length}: {cost.step_ms:.3g} ms per step",
                file=sys.stderr,
            )
    except KeyboardInterrupt:
        print(f"interrupted: {len(run.costs)} rows are kept", file=sys.stderr)
        return run
    run = dataclasses.replace(run, is_complete=True)
    save(run, path)
    return run


def save(run: Run, path: str | Path) -> None:
    """Writes a run as JSON, with a line on each field; a reader never sees half of it."""
    path = Path(path)
    content = {
        **run.about,
        "is_complete": run.is_complete,
        "fields": FIELDS,
        "costs": [dataclasses.asdict(cost) for cost in run.costs],
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load(path: str | Path) -> Run:
    """The run of a file that `save` wrote.

    Raises:
      ValueError: its rows have other fields.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = content.pop("costs")
    names = {field.name for field in dataclasses.fields(Cost)}
    for row in rows:
        if differing := sorted(row.keys() ^ names):
            raise ValueError(
                f"{path} is of another version, its rows differ in {', '.join(differing)}: run "
                "the benchmark again"
            )
    content.pop("fields")
    is_complete = content.pop("is_complete")
    return Run(content, [Cost(**row) for row in rows], is_complete)


def print_table(run: Run) -> None:
    """Prints a row for each figure."""
    common, keys = _common(run.costs)
    optional = ("encode_ms", "encode_us_per_token", "reorder_ms")
    absent = {name for name in optional if all(getattr(c, name) is None for c in run.costs)}
    columns = {
        "variant": ("variant", lambda c: c.variant),
        **{
            key: (KEY_NAMES[key].replace(" ", "\n"), lambda c, k=key: getattr(c, k)) for key in keys
        },
        "encode_ms": ("encode\nms", lambda c: c.encode_ms),
        "prefill_ms": ("prefill\nms", lambda c: c.prefill_ms),
        "step_ms": ("step\nms", lambda c: c.step_ms),
        "spread": ("min - max", lambda c: f"{_text(c.step_ms_min)} - {_text(c.step_ms_max)}"),
        "reorder_ms": ("reorder\nms", lambda c: c.reorder_ms),
        "encode_us_per_token": ("encode\nus/token", lambda c: c.encode_us_per_token),
        "step_us_per_token": ("decode\nus/token", lambda c: c.step_us_per_token),
        "weights": ("weights\nMB", lambda c: c.weight_bytes / 1e6),
        "kv": ("KV\nMB", lambda c: c.kv_bytes / 1e6),
        "flops": ("GFLOP", lambda c: c.flops / 1e9),
        "gb_per_s": ("GB/s", lambda c: c.gb_per_s),
        "roofline": ("of the\nroofline", lambda c: f"{100 * c.roofline_fraction:.0f} %"),
    }
    table = Table(title=f"The cost of decoding, random weights{common}", caption=_limits(run.costs))
    shown = [column for name, column in columns.items() if name not in absent]
    for name, _ in shown:
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for cost in run.costs:
        table.add_row(*(_text(value(cost)) for _, value in shown))
    _print(table)


def _print(table: Table) -> None:
    # Wider than some terminals: a line that breaks is better than a figure that is not there.
    Console(width=max(Console().width, 165)).print(table)


def _text(value: float | int | str | None) -> str:
    """A figure in three digits or all before the point."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _common(costs: Sequence[Cost]) -> tuple[str, list[str]]:
    """`, greedy, batch 8`: what all rows agree in; and the names of the keys they do not."""
    common, keys = "", []
    for key in KEYS:
        values = {getattr(cost, key) for cost in costs}
        if len(values) > 1:
            keys.append(key)
        else:
            (value,) = values
            common += f", {value}" if isinstance(value, str) else f", {KEY_NAMES[key]} {value}"
    return common, keys


def _limits(costs: Sequence[Cost]) -> str:
    """What the probes measured, for each dtype."""
    limits = {
        c.dtype: f"{c.probe_gb_per_s:.0f} GB/s, {c.probe_gflop_per_s:.0f} GFLOP/s" for c in costs
    }
    return "; ".join(f"measured limits in {dtype}: {limit}" for dtype, limit in limits.items())


def markdown(run: Run) -> str:
    """The milliseconds of a step as a Markdown table, a column a variant."""
    common, keys = _common(run.costs)
    variants = list(dict.fromkeys(cost.variant for cost in run.costs))
    rows = {}
    for cost in run.costs:
        rows.setdefault(tuple(getattr(cost, key) for key in keys), {})[cost.variant] = cost
    lines = [
        " | ".join([*(KEY_NAMES[key] for key in keys), *variants]),
        "|".join(["---"] * (len(keys) + len(variants))),
    ]
    for values, by_variant in rows.items():
        cells = [
            f"{_text(by_variant[v].step_ms)} ({100 * by_variant[v].roofline_fraction:.0f} %)"
            if v in by_variant
            else "-"
            for v in variants
        ]
        lines.append(" | ".join([*map(str, values), *cells]))
    about = run.about
    caption = (
        f"Milliseconds of one decode step, random weights{common}; in brackets the share of the "
        f"roofline ({_limits(run.costs)}). {about['date']}, {about['device']} "
        f"({about['machine']}), Python {about['python']}, jax {about['jax']}, flax {about['flax']}."
    )
    return "\n".join([caption, "", *(f"| {line} |" for line in lines)])


def rewrite_readme(path: str | Path, run: Run) -> None:
    """Puts `markdown(run)` between the markers of a file.

    Raises:
      ValueError: the markers are not there, once each and in order.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    begin, end = (text.find(marker) for marker in MARKERS)
    if not 0 <= begin < end or any(text.count(marker) > 1 for marker in MARKERS):
        raise ValueError(
            f"{path} must have {MARKERS[0]} and, behind it, {MARKERS[1]}, once each: the table "
            "goes between them"
        )
    before, after = text[: begin + len(MARKERS[0])], text[end:]
    path.write_text(f"{before}\n\n{markdown(run)}\n\n{after}", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Compared:
    """A part of a variant's cost beside the paper's.

    Attributes:
      cost: the row.
      part: `encoder` or `decoder`.
      us_per_token: microseconds per output token in this run.
      times_cheaper: how many of that multi_head takes at the same size in this run.
      paper_us_per_token: the paper's TPUv2-microseconds per output token (Shazeer 2019, table 2).
      paper_times_cheaper: how many of that the paper's multi_head takes.
    """

    cost: Cost
    part: str
    us_per_token: float
    times_cheaper: float
    paper_us_per_token: float
    paper_times_cheaper: float


def compare_with_paper(costs: Sequence[Cost]) -> list[Compared]:
    """Encoder and decoder of each row that the paper's table 2 has beside a multi_head of its size.

    Raises:
      ValueError: there is none.
    """
    heads = {_size(c): c for c in costs if c.variant == "multi_head"}
    compared = []
    for cost, (i, part) in itertools.product(costs, enumerate(("encoder", "decoder"))):
        paper, head = PAPER[cost.search], heads.get(_size(cost))
        if cost.encode_us_per_token is None or cost.variant not in paper or head is None:
            continue
        name = ("encode_us_per_token", "step_us_per_token")[i]
        ours, theirs = getattr(cost, name), paper[cost.variant][i]
        compared.append(
            Compared(
                cost=cost,
                part=part,
                us_per_token=ours,
                times_cheaper=getattr(head, name) / ours,
                paper_us_per_token=theirs,
                paper_times_cheaper=paper["multi_head"][i] / theirs,
            )
        )
    if not compared:
        raise ValueError(
            f"nothing to compare: the paper's table 2 has {', '.join(PAPER['greedy'])}, all "
            "translating, and ratios need multi_head"
        )
    return compared


def _size(cost: Cost) -> tuple:
    return tuple(getattr(cost, key) for key in KEYS)


def print_comparison(run: Run) -> None:
    """Prints `compare_with_paper`."""
    common, keys = _common(run.costs)
    table = Table(
        title=f"Beside table 2 of the paper{common}",
        caption="times cheaper: multi_head's cost over the variant's. The paper: one TPUv2 of 8 "
        "cores, 1024 sentences at once, 128 source and 128 target tokens",
    )
    for name in ("variant", "part", *(KEY_NAMES[key] for key in keys)):
        table.add_column(name)
    for name in ("us/token", "the paper's", "times cheaper", "in the paper"):
        table.add_column(name, justify="right")
    for row in compare_with_paper(run.costs):
        table.add_row(
            row.cost.variant,
            row.part,
            *(str(getattr(row.cost, key)) for key in keys),
            *map(_text, (row.us_per_token, row.paper_us_per_token)),
            *(f"{ratio:.2f}" for ratio in (row.times_cheaper, row.paper_times_cheaper)),
        )
    _print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", help="what decode.py --benchmark wrote")
    parser.add_argument("output_dir", help="where the pictures go")
    parser.add_argument("--readme", help="a file whose table is rewritten")
    args = parser.parse_args()
    run = load(args.json)
    for path in draw(run.costs, run.about, args.output_dir):
        print(path)
    if args.readme is not None:
        rewrite_readme(args.readme, run)


if __name__ == "__main__":
    main()
