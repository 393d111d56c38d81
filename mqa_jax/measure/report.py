"""The benchmark's record as a person reads it: a table, a README's table, the paper beside it.

    python -m mqa_jax.measure.report docs/benchmark.json docs --readme=README.md

draws a run's pictures again, and writes its table between the markers of a README. Knows no JAX.

Array letters: B batch   C context length
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mqa_jax.measure.cost import KEYS, Cost, in_digits
from mqa_jax.measure.paper import PAPER, Compared, compare_with_paper
from mqa_jax.measure.plots import draw
from mqa_jax.measure.record import Run, load, record, save

__all__ = ["PAPER", "Compared", "Run", "compare_with_paper", "load", "record", "save"]

MARKERS = ("<!-- benchmark -->", "<!-- /benchmark -->")
KEY_NAMES = dict(search="search", dtype="dtype", batch="batch", context_length="context length")
COLUMNS = 80  # of a terminal that nobody has made wider
# A probe is a plain sum, and a program that reads better is ahead of it by no more than this.
SLACK = 1.05


def print_table(run: Run, *, wide: bool = False) -> None:
    """Prints a row for each figure: within 80 columns what says the most, or with `wide` all."""
    common, keys = _common(run.costs)
    headings = () if wide else _headings(keys)
    marks, reasons = explain(run)

    def share(cost: Cost) -> str:
        return f"{marks.get(cost, '')} {percent(cost.roofline_fraction)}".lstrip()

    spread = lambda c: f"{in_digits(c.step_ms_min)} - {in_digits(c.step_ms_max)}"  # noqa: E731
    behind = lambda c: percent(run.fraction_behind(c))  # noqa: E731
    columns: list[tuple[str, Callable[[Cost], object], bool]] = [  # heading, cell, compact too
        *((KEY_NAMES[k].replace(" ", "\n"), lambda c, k=k: getattr(c, k), True) for k in keys),
        ("encode\nms", lambda c: c.encode_ms, True),
        ("prefill\nms", lambda c: c.prefill_ms, False),
        ("step\nms", lambda c: c.step_ms, True),
        ("min - max", spread, True),
        ("alone\nms", lambda c: c.step_alone_ms, False),
        ("reorder\nms", lambda c: c.reorder_ms, False),
        ("encode\nus/token", lambda c: c.encode_us_per_token, False),
        ("decode\nus/token", lambda c: c.step_us_per_token, False),
        ("weights\nMB", lambda c: c.weight_bytes / 1e6, False),
        ("KV\nMB", lambda c: c.kv_bytes / 1e6, True),
        ("GFLOP", lambda c: c.flops / 1e9, False),
        ("GB/s", lambda c: c.gb_per_s, False),
        ("of the\nroofline", share, True),
        ("by that\nbehind", behind, False),
    ]
    columns = [
        (name, value, is_compact)
        for name, value, is_compact in columns
        if (wide or is_compact)
        and name.lower() not in headings
        and not all(in_digits(value(cost)) == "-" for cost in run.costs)
    ]
    table = _table(
        f"The cost of decoding, random weights{common}",
        "\n".join([_limits(run), *reasons]),
        ["variant", *(name for name, *_ in columns)],
    )
    cells = [[c.variant, *(in_digits(value(c)) for _, value, _ in columns)] for c in run.costs]
    _fill(table, [tuple(getattr(c, key) for key in headings) for c in run.costs], cells)
    _print(table, wide)


def print_comparison(run: Run) -> None:
    """Prints `compare_with_paper`."""
    common, keys = _common(run.costs)
    headings = _headings(keys)
    keys = [key for key in keys if key not in headings]
    table = _table(
        f"Beside table 2 of the paper{common}",
        "times cheaper: multi_head's cost over the variant's. The paper: one TPUv2 of 8 cores, "
        "1024 sentences at once, 128 source and 128 target tokens",
        [
            *("variant", "part", *(KEY_NAMES[key].replace(" ", "\n") for key in keys)),
            *("us/token", "the\npaper's", "times\ncheaper", "in the\npaper"),
        ],
    )
    rows = compare_with_paper(run.costs)
    cells = [
        [
            *(row.cost.variant, row.part, *(str(getattr(row.cost, key)) for key in keys)),
            *map(in_digits, (row.us_per_token, row.paper_us_per_token)),
            *(f"{ratio:.2f}" for ratio in (row.times_cheaper, row.paper_times_cheaper)),
        ]
        for row in rows
    ]
    _fill(table, [tuple(getattr(row.cost, key) for key in headings) for row in rows], cells)
    _print(table)


def _headings(keys: Sequence[str]) -> list[str]:
    """Of the keys, those that stand above rows in the place of a column."""
    return [key for key in keys if key in ("search", "dtype")]


def _table(title: str, caption: str, names: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding, table.caption_justify = True, "left"
    table.add_column(names[0], overflow="fold")  # a name that is too long goes on below
    for name in names[1:]:
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    return table


def _fill(table: Table, headings: Sequence[tuple], cells: Sequence[list[str]]) -> None:
    """Adds the rows, those with the same heading together."""
    for heading in dict.fromkeys(headings):
        if heading:
            table.add_section()
            table.add_row(f"[bold]{', '.join(map(str, heading))}[/bold]")
        for other, row in zip(headings, cells, strict=True):
            if other == heading:
                table.add_row(*row)


def _print(table: Table, wide: bool = False) -> None:
    # What is wide may break on a terminal: better than a figure that is not there.
    console = Console(width=10_000 if wide else COLUMNS)
    if wide:
        console.width = max(COLUMNS, Measurement.get(console, console.options, table).maximum)
    console.print(table)


def percent(fraction: float | None) -> str:
    """`47 %`; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.0f} %"


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


def _limits(run: Run) -> str:
    """What the probes measured, for each dtype, before the rows and behind them."""
    rates = lambda gb, gflop: f"{gb:.0f} GB/s, {gflop:.0f} GFLOP/s"  # noqa: E731
    limits = {c.dtype: rates(c.probe_gb_per_s, c.probe_gflop_per_s) for c in run.costs}
    for dtype, behind in run.probe_behind.items():
        limits[dtype] += f" before, {rates(behind['gb_per_s'], behind['gflop_per_s'])} behind"
    return "; ".join(f"measured limits in {dtype}: {limit}" for dtype, limit in limits.items())


def explain(run: Run) -> tuple[dict[Cost, str], list[str]]:
    """Why rows are above 100 % of the roofline: a letter for each of them, and what it means."""
    rows: dict[str, list[Cost]] = {}
    for cost in run.costs:
        if round(100 * cost.roofline_fraction) > 100:
            rows.setdefault(_reason(run, cost), []).append(cost)
    letters = dict(zip(rows, "abcde", strict=False))
    marks = {cost: letters[reason] for reason, costs in rows.items() for cost in costs}
    return marks, [f"{letters[reason]}: {reason}" for reason in rows]


def _reason(run: Run, cost: Cost) -> str:
    num_bytes, cache_bytes = cost.weight_bytes + cost.kv_bytes, run.about.get("cache_bytes", 0)
    is_reading = num_bytes / cost.probe_gb_per_s >= cost.flops / cost.probe_gflop_per_s
    caches = f"the processor's caches ({cache_bytes / 1e6:.0f} MB)"
    behind = run.fraction_behind(cost)
    if is_reading and num_bytes <= cache_bytes:
        return f"above 100 % because {caches} hold all that it reads"
    if behind is not None and round(100 * behind) <= 100:
        return (
            "above 100 % because the host was busier when the limits were measured before the "
            "rows: by those behind it is within them"
        )
    if is_reading and num_bytes <= 20 * cache_bytes:
        return f"above 100 % because {caches} hold a part of what it reads"
    if cost.roofline_fraction <= SLACK:
        return (
            "above 100 % by no more than the probes, plain sums and products, fall short of what "
            "the device can do"
        )
    return (
        "above 100 %: either caches hold what it reads, or the host was busy whenever the limits "
        "were measured. Measure again"
    )


def markdown(run: Run) -> str:
    """The milliseconds of a step as a Markdown table, a column a variant."""
    common, keys = _common(run.costs)
    variants = list(dict.fromkeys(cost.variant for cost in run.costs))
    marks, reasons = explain(run)
    rows: dict[tuple, dict[str, Cost]] = {}
    for cost in run.costs:
        rows.setdefault(tuple(getattr(cost, key) for key in keys), {})[cost.variant] = cost
    lines = [
        " | ".join([*(KEY_NAMES[key] for key in keys), *variants]),
        "|".join(["---"] * (len(keys) + len(variants))),
    ]

    def cell(cost: Cost | None) -> str:
        if cost is None:
            return "-"
        mark = f", {marks[cost]}" if cost in marks else ""
        return f"{in_digits(cost.step_ms)} ({percent(cost.roofline_fraction)}{mark})"

    for values, by_variant in rows.items():
        lines.append(" | ".join([*map(str, values), *(cell(by_variant.get(v)) for v in variants)]))
    about = run.about
    model = f", {about['model']}" if "model" in about else ""
    caption = (
        f"Milliseconds of one decode step{model}, random weights{common}; in brackets the share of "
        f"the roofline ({_limits(run)}). {about['date']}, {about['device']} "
        f"({about['machine']}), Python {about['python']}, jax {about['jax']}, flax {about['flax']}."
    )
    table = [f"| {line} |" for line in lines]
    return "\n".join([caption, "", *table, *(["", ". ".join(reasons) + "."] if reasons else [])])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", help="what the benchmark wrote")
    parser.add_argument("output_dir", help="where the pictures go")
    parser.add_argument("--readme", help="a file whose table is rewritten")
    args = parser.parse_args()
    try:
        run = load(args.json)
        for path in draw(run.costs, run.about, args.output_dir, behind=run.probe_behind):
            print(path)
        if args.readme is not None:
            rewrite_readme(args.readme, run)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
