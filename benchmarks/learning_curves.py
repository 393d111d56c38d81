"""Validation curves of training runs, as one picture.

    python benchmarks/learning_curves.py --output=curves.png runs/multi_head-0 runs/multi_head-1 ...
    python benchmarks/learning_curves.py --output=curves.png --record=curves.json runs/*-?
    python benchmarks/learning_curves.py --output=curves.png curves.json

Each is the `--workdir` of a run of train.py, or a file that `--record` wrote. Runs whose names
differ behind the last "-" alone, by a seed say, are one line: their mean, and a band from the least
to the most.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mqa_jax.measure import plots

OUTPUT = flags.DEFINE_string("output", None, "Where the picture goes, as PNG.", required=True)
RECORD = flags.DEFINE_string("record", None, "Where the points go, as JSON, to be drawn again.")
METRIC = flags.DEFINE_string("metric", "ln_perplexity", "What train.py logs of validation data.")
TITLE = flags.DEFINE_string("title", None, "Above the picture; by default what a file has.")

Curve = dict[int, float]  # the metric by step


def curve(workdir: Path) -> Curve:
    """The metric by step. A resumed run may have logged a step twice; the later one counts.

    Raises:
      ValueError: the run did not log it.
    """
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = {
        line["step"]: line[METRIC.value]
        for line in lines
        if line["kind"] == "validation" and METRIC.value in line
    }
    if not points:
        names = sorted({name for line in lines if line["kind"] == "validation" for name in line})
        raise ValueError(f"{path} has no validation {METRIC.value}; it has {names}")
    return points


def recorded(path: Path) -> tuple[str | None, dict[str, Curve]]:
    """The title of a file that `record` wrote, and its curves by run.

    Raises:
      ValueError: the file is not whole, or has another metric.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metric, runs = content["metric"], content["runs"]
        curves = {n: {int(step): x for step, x in points.items()} for n, points in runs.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what --record writes: {error!r}") from None
    if metric != METRIC.value:
        raise ValueError(f"{path} has {metric}, not {METRIC.value}")
    return content.get("title"), curves


def record(path: Path, title: str | None, curves: dict[str, Curve]) -> None:
    """Writes the curves, a line a run."""
    lines = [f"  {json.dumps(name)}: {json.dumps(points)}" for name, points in curves.items()]
    head = [f' "{k}": {json.dumps(v)},' for k, v in dict(title=title, metric=METRIC.value).items()]
    text = "\n".join(["{", *head, ' "runs": {', ",\n".join(lines), " }", "}", ""])
    path.write_text(text, encoding="utf-8")


def draw(title: str | None, curves: dict[str, Curve]) -> Figure:
    """A line a variant with its last value at its end, over the steps that all of its runs have."""
    runs = defaultdict(list)
    for name, points in curves.items():
        runs[name.rpartition("-")[0] or name].append(points)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ends, colors = [], []
    for name, points in runs.items():
        steps = sorted(set.intersection(*map(set, points)))
        values = np.array([[run[step] for step in steps] for run in points])
        style = plots.look(name) | dict(markersize=3)
        axes.plot(steps, values.mean(axis=0), **style)
        axes.fill_between(
            steps, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0
        )
        last = values[:, -1].mean()
        ends.append((steps[-1], last, f"{name} {last:.3f}"))
        colors.append(style["color"])
    counts = sorted({len(points) for points in runs.values()})
    of = "a run" if counts == [1] else f"mean of {' or '.join(map(str, counts))} runs"
    axes.set(
        xlabel="step", ylabel=f"{METRIC.value} of validation data", yscale="log", xlim=(0, None)
    )
    axes.set_ylim(bottom=0.93 * axes.get_ylim()[0])  # room for the labels of the ends
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10.5)
    band = Patch(color=plots.GRAY, alpha=0.3, label="from the least of the runs to the most")
    axes.legend(handles=[band], title=f"{of}; at the end the last value", frameon=False, fontsize=9)
    figure.draw_without_rendering()  # The size of the axes is not known before.
    plots.label_points(axes, ends, colors)
    return figure


def main(argv: list[str]) -> None:
    title, curves = None, {}
    for path in map(Path, argv[1:]):
        if path.suffix == ".json":
            title, read = recorded(path)
            curves |= read
        else:
            curves[path.name] = curve(path)
    if not curves:
        raise app.UsageError("give the working directories of runs, or a file of --record")
    title = TITLE.value or title
    if RECORD.value:
        record(Path(RECORD.value), title, curves)
    draw(title, curves).savefig(OUTPUT.value, dpi=150)


if __name__ == "__main__":
    app.run(main)
