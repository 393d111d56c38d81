"""The benchmark's pictures, as PNG. Knows no JAX, and matplotlib only when it draws."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mqa_jax.measure.cost import Cost

COLORS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774")
# From here on multi-query pays, we say.
PAYS = 1.5


def draw(costs: Sequence[Cost], about: Mapping[str, str], output_dir: str | Path) -> list[Path]:
    """Draws what the rows allow.

    For each search and dtype:
      `step_cost_SEARCH_DTYPE_batch_B.png`: a step against the context length, a line a variant,
        where there are several context lengths;
      `batch_cost_SEARCH_DTYPE_context_C.png`: a step against the batch, where there are several;
      `roofline_SEARCH_DTYPE.png`: a step's time against the bytes that it reads, beside the least
        time by the probes;
      `ratio_SEARCH_DTYPE.png`: multi_head over multi_query, where both were measured at several
        batch sizes and several context lengths.

    Args:
      costs: the rows.
      about: has the `device` and `machine` that the rows were measured on.
      output_dir: is made when it is missing.

    Returns:
      the files that were written.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    where = about["machine"] if about["device"] == "cpu" else about["device"]
    paths = []

    def save(figure, name: str) -> None:
        figure.text(0.995, 0.005, where, ha="right", va="bottom", fontsize=7, color="gray")
        figure.savefig(output_dir / f"{name}.png", dpi=150)
        paths.append(output_dir / f"{name}.png")

    for (search, dtype), group in _groups(costs, lambda c: (c.search, c.dtype)):
        kind, title = f"{search}_{dtype}", f"{search}, {dtype}"
        for (batch,), part in _groups(group, lambda c: (c.batch,)):
            if len({c.context_length for c in part}) > 1:
                figure = _lines(part, lambda c: c.context_length, "context length")
                _title(figure, f"One decode step against the context: {title}, batch {batch}")
                save(figure, f"step_cost_{kind}_batch_{batch}")
        for (length,), part in _groups(group, lambda c: (c.context_length,)):
            if len({c.batch for c in part}) > 1:
                figure = _lines(part, lambda c: c.batch, "batch", is_log=True)
                _title(figure, f"One decode step against the batch: {title}, context {length}")
                save(figure, f"batch_cost_{kind}_context_{length}")
        figure = _roofline(group)
        _title(figure, f"One decode step and what it reads: {title}")
        save(figure, f"roofline_{kind}")
        if (figure := _ratio(group)) is not None:
            _title(figure, f"multi_head over multi_query, one decode step: {title}")
            save(figure, f"ratio_{kind}")
    return paths


def _groups(costs: Sequence[Cost], key: Callable) -> Iterator[tuple[tuple, list[Cost]]]:
    for value in dict.fromkeys(map(key, costs)):
        yield value, [cost for cost in costs if key(cost) == value]


def _figure():
    # Not pyplot, which would choose a display for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _title(figure, title: str) -> None:
    figure.axes[0].set_title(title, fontsize=10.5)


def _style(variant: str, variants: Sequence[str]) -> dict:
    """Local variants have the colour of the variant that they are of, and a dashed line."""
    bases = list(dict.fromkeys(name.removesuffix("_local") for name in variants))
    color = COLORS[bases.index(variant.removesuffix("_local")) % len(COLORS)]
    is_local = variant.endswith("_local")
    return dict(
        color=color, marker="s" if is_local else "o", linestyle="--" if is_local else "-", ms=4.5
    )


def _set_log(axes, axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, 20, ..."""
    from matplotlib.ticker import LogLocator

    axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _lines(costs: Sequence[Cost], x_of: Callable, x_label: str, is_log: bool = False):
    """Milliseconds of a step against `x_of`, a line a variant, from the fastest run to the slowest
    as a band."""
    figure, axes = _figure()
    variants = list(dict.fromkeys(cost.variant for cost in costs))
    for variant in variants:
        line = sorted((c for c in costs if c.variant == variant), key=x_of)
        style = _style(variant, variants)
        x = [x_of(c) for c in line]
        axes.plot(x, [c.step_ms for c in line], label=variant, **style)
        low, high = [c.step_ms_min for c in line], [c.step_ms_max for c in line]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x_of(c) for c in costs}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:.0f}")
    if is_log:
        _set_log(axes, axes.yaxis)
    else:
        axes.set_ylim(0, None)
    axes.set(xlabel=x_label, ylabel="ms per step")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _roofline(costs: Sequence[Cost]):
    """A point a row, above the line that reading alone would take; a dash where its arithmetic
    takes longer than that."""
    figure, axes = _figure()
    megabytes = lambda c: (c.weight_bytes + c.kv_bytes) / 1e6  # noqa: E731
    variants = list(dict.fromkeys(cost.variant for cost in costs))
    for variant in variants:
        points = [c for c in costs if c.variant == variant]
        style = _style(variant, variants) | dict(linestyle="none")
        axes.plot([*map(megabytes, points)], [c.step_ms for c in points], label=variant, **style)
    rate = costs[0].probe_gb_per_s
    ends = [0.8 * min(map(megabytes, costs)), 1.25 * max(map(megabytes, costs))]
    axes.plot(
        ends, [x / rate for x in ends], color="black", lw=1, label=f"reading at {rate:.0f} GB/s"
    )
    bound = [c for c in costs if c.roofline_ms > 1.001 * megabytes(c) / rate]
    if bound:
        rate = costs[0].probe_gflop_per_s
        axes.plot(
            [*map(megabytes, bound)],
            [c.roofline_ms for c in bound],
            color="black",
            linestyle="none",
            marker="_",
            ms=9,
            label=f"computing at {rate:.0f} GFLOP/s",
        )
    _set_log(axes, axes.xaxis)
    _set_log(axes, axes.yaxis)
    axes.set(xlabel="MB of weights, keys and values read per step", ylabel="ms per step")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _ratio(costs: Sequence[Cost]):
    """A heat map over batch and context length, or None where there are too few of either."""
    step_ms = {(c.variant, c.batch, c.context_length): c.step_ms for c in costs}
    sizes = [
        (batch, length)
        for variant, batch, length in step_ms
        if variant == "multi_head" and ("multi_query", batch, length) in step_ms
    ]
    batches, lengths = (
        (sorted(set(values)) for values in zip(*sizes, strict=True)) if sizes else ((), ())
    )
    if len(batches) < 2 or len(lengths) < 2:
        return None
    ratio = [
        [
            step_ms.get(("multi_head", batch, length), math.nan)
            / step_ms.get(("multi_query", batch, length), math.nan)
            for length in lengths
        ]
        for batch in batches
    ]
    figure, axes = _figure()
    known = [x for row in ratio for x in row if not math.isnan(x)]
    image = axes.imshow(
        ratio,
        origin="lower",
        aspect="auto",
        cmap="YlGnBu",
        vmin=min(1, *known),
        vmax=max(2, *known),
    )
    for i, row in enumerate(ratio):
        for j, x in enumerate(row):
            if not math.isnan(x):
                color = "white" if image.norm(x) > 0.55 else "black"
                axes.text(j, i, f"{x:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(batches)), batches)
    axes.set(xlabel="context length", ylabel="batch")
    colorbar = figure.colorbar(image, ax=axes, label="times cheaper with multi_query")
    if min(known) < PAYS < max(known):
        import numpy as np

        known_only = np.ma.masked_invalid(ratio)
        lines = axes.contour(known_only, levels=[PAYS], colors="#d9730d", linewidths=2)
        colorbar.add_lines(lines)
        colorbar.set_label(f"times cheaper with multi_query (line: {PAYS:g})")
    return figure
