"""The benchmark's pictures, as PNG, one a question.

Knows no JAX, and matplotlib only when it draws.

Array letters: B batch   C context length
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqa_jax.measure.cost import BEAM_SIZE, Cost, in_digits

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

# A variant looks the same in all pictures. Colours are of Okabe and Ito (2008), which the
# colour-blind tell apart; its yellow is left out, being too pale for lines. Local variants have the
# colour of what they are of, with hollow markers and a dashed line.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK, GRAY = "#56B4E9", "#E69F00", "#000000", "#777777"
LOOKS = {
    "multi_head": (BLUE, "o"),
    "multi_query": (VERMILION, "s"),
    "grouped_query_2": (GREEN, "^"),
    "grouped_query_4": (PURPLE, "D"),
    "multi_head_h1": (ORANGE, "v"),
    "multi_head_h2": (SKY, "P"),
    "multi_head_h4": (GRAY, "X"),
    "multi_head_h8_k16": (BLACK, "*"),
}
OTHERS = [(color, marker) for marker in "<>ph" for color in (GREEN, PURPLE, ORANGE, SKY, GRAY)]
BASELINE = "multi_head"


def draw(
    costs: Sequence[Cost],
    about: Mapping[str, Any],
    output_dir: str | Path,
    *,
    behind: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Draws what the rows allow, with a panel for each search and dtype:

      `step_against_context.png`: what does a step cost as the context grows? Where there are
        several context lengths; a row of panels for each batch;
      `step_against_batch.png`: and as the batch grows? Where there are several; a row of panels
        for each context length;
      `roofline.png`: how near is a step to what the device can do? With several context lengths a
        row of panels for each batch;
      `times_cheaper.png`: how many times cheaper than multi_head is each of the others? Where it
        was measured beside them, at several sizes.

    Args:
      costs: the rows.
      about: has the `device` and `machine` that the rows were measured on, and perhaps the `model`.
      output_dir: is made when it is missing.
      behind: by dtype, the limits as they were measured behind the rows (`Run.probe_behind`).

    Returns:
      the files that were written.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    what = _what(costs, about)
    figures = {
        "step_against_context": _lines(costs, what, "context length", "batch"),
        "step_against_batch": _lines(costs, what, "batch", "context length"),
        "roofline": _roofline(costs, what, behind or {}),
        "times_cheaper": _times_cheaper(costs, what),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(output_dir / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _what(costs: Sequence[Cost], about: Mapping[str, Any]) -> str:
    """`wmt14, 211 M parameters, random weights, on ...`: what was measured, and where."""
    sizes = sorted({f"{c.parameters / 1e6:.3g}" for c in costs}, key=float)
    size = " to ".join(dict.fromkeys((sizes[0], sizes[-1])))
    where = about["machine"] if about["device"] == "cpu" else about["device"]
    model = f"{about['model']}, " if "model" in about else ""
    return f"{model}{size} M parameters, random weights, on {where}"


def look(variant: str) -> dict[str, Any]:
    """How a variant's line is drawn, in every picture alike: arguments of `Axes.plot`."""
    base = variant.removesuffix("_local")
    color, marker = LOOKS.get(base) or OTHERS[zlib.crc32(base.encode()) % len(OTHERS)]
    local = dict(linestyle="--", markerfacecolor="white") if base != variant else {}
    return dict(color=color, marker=marker, linestyle="-", markersize=5) | local


def label_points(
    axes: "Axes",
    points: Iterable[tuple[float, float, str]],
    color: Sequence[str] | str,
    left: bool = False,
) -> None:
    """Writes beside each point (x, y, text), at the right or at the left, moved apart where two
    would meet. To be called when the limits of the axes are final.

    Args:
      axes: where the points are.
      points: in any order.
      color: of all of them, or of each.
      left: at the left of each point.
    """
    from matplotlib.patheffects import withStroke

    points = list(points)
    colors = [color] * len(points) if isinstance(color, str) else color
    size, pixels = 8, axes.figure.dpi / 72  # of the letters in points, and of a point
    labels = sorted(zip(points, colors, strict=True), key=lambda label: label[0][1::-1])
    places = [axes.transData.transform(point[:2])[1] for point, _ in labels]
    step = 1.25 * size * pixels
    # Up from the lowest, down from the highest: both keep their distance, and so does the middle.
    up = itertools.accumulate(places, lambda below, at: max(at, below + step))
    down = itertools.accumulate(places[::-1], lambda above, at: min(at, above - step))
    moved = [(a + b) / 2 for a, b in zip(up, [*down][::-1], strict=True)]
    for ((x, y, text), of), at, placed in zip(labels, places, moved, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(-6 if left else 6, (placed - at) / pixels),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=of,
            fontsize=size,
            annotation_clip=False,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # readable across lines
        )


SIZES: dict[str, Callable[[Cost], int]] = {
    "batch": lambda cost: cost.batch,
    "context length": lambda cost: cost.context_length,
}


def _distinct(costs: Sequence[Cost], key: Callable) -> list:
    return list(dict.fromkeys(map(key, costs)))


def _kind(cost: Cost) -> tuple[str, str]:
    return f"beam {BEAM_SIZE}" if cost.search == "beam" else cost.search, cost.dtype


def _panels(title: str, rows: int, columns: int, height: float = 3.4) -> tuple["Figure", Any]:
    """A figure, and its axes in rows and columns."""
    # Not pyplot, which would choose a display for the whole process.
    from matplotlib.figure import Figure

    size = (max(6.4, 0.3 + 4.2 * columns), 1.1 + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _legend(
    figure: "Figure", costs: Sequence[Cost], *more: "Artist", title: str | None = None
) -> None:
    """One for all panels: the variants, and what else there is."""
    from matplotlib.lines import Line2D

    variants = _distinct(costs, lambda c: c.variant)
    handles = [*(Line2D([], [], label=v, **look(v)) for v in variants), *more]
    figure.legend(
        handles=handles,
        title=title,
        loc="outside lower center",
        ncols=min(len(handles), 3 if figure.get_figwidth() < 12 else 6),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )


def _lines(costs: Sequence[Cost], what: str, x_name: str, row_name: str) -> "Figure | None":
    """Milliseconds of a step against batch or context length, both from 0 and linear, as the cost
    is: a line a variant, and from the fastest run to the slowest a band. None where it never
    varies."""
    from matplotlib.patches import Patch

    x_of, row_of = SIZES[x_name], SIZES[row_name]
    lines: dict[tuple, set[int]] = {}
    for cost in costs:
        lines.setdefault((row_of(cost), _kind(cost), cost.variant), set()).add(x_of(cost))
    several = [line for line, values in lines.items() if len(values) > 1]
    if not several:
        return None
    rows, kinds = (list(dict.fromkeys(line[i] for line in several)) for i in range(2))
    question = f"What does one decode step cost as the {x_name.split()[0]} grows?"
    figure, grid = _panels(f"{question}\n{what}", len(rows), len(kinds))
    labels = []
    for (row, kind), axes in zip(itertools.product(rows, kinds), grid.flat, strict=True):
        panel = sorted((c for c in costs if _kind(c) == kind and row_of(c) == row), key=x_of)
        ends = {}
        for variant in _distinct(panel, lambda c: c.variant):
            line = [c for c in panel if c.variant == variant]
            style, x = look(variant), [x_of(c) for c in line]
            axes.plot(x, [c.step_ms for c in line], **style)
            low, high = [c.step_ms_min for c in line], [c.step_ms_max for c in line]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
            end = x[-1], line[-1].step_ms, f"{variant} {in_digits(line[-1].step_ms)}"
            ends[end] = style["color"]
        labels.append((axes, list(ends), list(ends.values())))
        axes.set(xlim=(0, None), ylim=(0, None), xlabel=x_name, ylabel="ms per step")
        axes.set_title(f"{', '.join(kind)}, {row_name} {row}", fontsize=9.5)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.grid(alpha=0.25)
    _legend(figure, [], Patch(color=GRAY, alpha=0.3, label="from the fastest run to the slowest"))
    figure.draw_without_rendering()  # Sizes of panels are not known before.
    for label in labels:
        label_points(*label)
    return figure


def _set_log(axis: "XAxis | YAxis") -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, 20, ..."""
    from matplotlib.ticker import LogLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _roofline(
    costs: Sequence[Cost], what: str, behind: Mapping[str, Mapping[str, float]]
) -> "Figure":
    """A point a row, above the line that reading alone would take; a dash below it where its
    arithmetic takes longer than that. A variant's rows are joined in order of what varies."""
    from matplotlib.lines import Line2D

    kinds, gigabytes = _distinct(costs, _kind), lambda c: (c.weight_bytes + c.kv_bytes) / 1e9
    x_name = "context length" if len({c.context_length for c in costs}) > 1 else "batch"
    is_named = len({SIZES[x_name](c) for c in costs}) > 1
    batches = _distinct(costs, SIZES["batch"]) if x_name != "batch" else [None]
    question = "How near is one decode step to what the device can do?"
    figure, grid = _panels(f"{question}\n{what}", len(batches), len(kinds))
    dash: dict[str, Any] = dict(linestyle="none", marker="_", markersize=11)
    has_dashes, labels = False, []
    for (batch, kind), axes in zip(itertools.product(batches, kinds), grid.flat, strict=True):
        panel = [c for c in costs if _kind(c) == kind and batch in (None, c.batch)]
        if not panel:
            axes.set_visible(False)
            continue
        sizes = [*map(gigabytes, panel)]
        middle = math.sqrt(min(sizes) * max(sizes))
        for variant in _distinct(panel, lambda c: c.variant):
            line = sorted((c for c in panel if c.variant == variant), key=SIZES[x_name])
            style, x = look(variant), [*map(gigabytes, line)]
            axes.plot(x, [c.step_ms for c in line], **style)
            bound = [c for c in line if c.roofline_ms > 1.001e3 * gigabytes(c) / c.probe_gb_per_s]
            dashes = [*map(gigabytes, bound)], [c.roofline_ms for c in bound]
            axes.plot(*dashes, color=style["color"], **dash)
            has_dashes |= bool(bound)
            texts = [
                f"{f'{SIZES[x_name](c)}: ' if is_named else ''}{100 * c.roofline_fraction:.0f} %"
                for c in line
            ]
            points = list(zip(x, [c.step_ms for c in line], texts, strict=True))
            is_left = math.prod(x) ** (1 / len(x)) < middle  # where no other line is
            labels.append((axes, points, style["color"], is_left))

        rate, rate_behind = panel[0].probe_gb_per_s, behind.get(kind[1], {}).get("gb_per_s")
        ends = [min(sizes) / 2.5, 2.5 * max(sizes)]
        axes.plot(ends, [1e3 * x / rate for x in ends], color=BLACK, lw=1)
        limits = f"reading {in_digits(rate)} GB/s"
        if rate_behind:
            axes.plot(ends, [1e3 * x / rate_behind for x in ends], color=BLACK, lw=1, ls=":")
            limits += f", behind the run {in_digits(rate_behind)}"
        values = {name: {*map(of, panel)} for name, of in SIZES.items()}
        same = [f"{name} {of.pop()}" for name, of in values.items() if len(of) == 1]
        computing = f"computing {in_digits(panel[0].probe_gflop_per_s)} GFLOP/s"
        axes.set_title(f"{', '.join([*kind, *same])}\n{limits}\n{computing}", fontsize=9.5)
        for axis in (axes.xaxis, axes.yaxis):
            _set_log(axis)
        least_ms = min(min(c.roofline_ms, c.step_ms) for c in panel)
        axes.set(
            xlim=ends,
            ylim=(0.6 * least_ms, 1.7 * max(c.step_ms for c in panel)),
            xlabel="GB of weights, keys and values read per step",
            ylabel="ms per step",
        )
        axes.grid(alpha=0.25)
    notes = [Line2D([], [], color=BLACK, lw=1, label="least time: reading")]
    if behind:
        notes.append(Line2D([], [], color=BLACK, lw=1, ls=":", label="measured behind the run"))
    if has_dashes:
        notes.append(Line2D([], [], color=GRAY, label="least time: computing", **dash))
    name = f"{x_name}, and " if is_named else ""
    _legend(figure, costs, *notes, title=f"at a point: {name}the least time in % of the step's")
    figure.draw_without_rendering()  # Sizes of panels are not known before.
    for label in labels:
        label_points(*label)
    return figure


def _times_cheaper(costs: Sequence[Cost], what: str) -> "Figure | None":
    """How many times as much multi_head costs, over batch and context length: a row of heat maps
    for each other variant. None where fewer than two sizes can be compared."""
    import numpy as np
    from matplotlib.colors import LogNorm

    step_ms = {(c.variant, _kind(c), c.batch, c.context_length): c.step_ms for c in costs}
    ratios = {
        key: step_ms[BASELINE, *key[1:]] / ms
        for key, ms in step_ms.items()
        if key[0] != BASELINE and (BASELINE, *key[1:]) in step_ms
    }
    variants = list(dict.fromkeys(key[0] for key in ratios))
    kinds = list(dict.fromkeys(key[1] for key in ratios))
    batches, lengths = sorted({key[2] for key in ratios}), sorted({key[3] for key in ratios})
    if len(batches) * len(lengths) < 2:
        return None
    question = f"How many times cheaper than {BASELINE} is one decode step?"
    height = 0.7 + 0.45 * len(batches)
    figure, grid = _panels(f"{question}\n{what}", len(variants), len(kinds), height)
    norm = LogNorm(min(1, *ratios.values()), max(2, *ratios.values()))
    for (variant, kind), axes in zip(itertools.product(variants, kinds), grid.flat, strict=True):
        cells = np.array(
            [[ratios.get((variant, kind, b, c), math.nan) for c in lengths] for b in batches]
        )
        image = axes.imshow(cells, origin="lower", aspect="auto", cmap="cividis", norm=norm)
        for (i, j), x in np.ndenumerate(cells):
            if not math.isnan(x):
                color = "black" if norm(x) > 0.5 else "white"
                axes.text(j, i, f"{x:.2f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(batches)), batches)
        axes.set(xlabel="context length", ylabel="batch")
        axes.set_title(f"{variant}, {', '.join(kind)}", fontsize=9.5)
    bar = figure.colorbar(image, ax=grid, label="times cheaper", fraction=0.05, format="{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    return figure
