"""Learning curves: of working directories, and of the file that keeps them."""

import json

import pytest
from running import ROOT, run_well

from mqa_jax.measure import plots

SCRIPT = ROOT / "benchmarks/learning_curves.py"


@pytest.mark.slow
def test_curves_are_kept_and_drawn_again_from_what_was_kept(tmp_path):
    for seed, values in (("0", [4.0, 2.0]), ("1", [3.0, 1.5])):
        workdir = tmp_path / f"multi_query-{seed}"
        workdir.mkdir()
        lines = [
            dict(kind="validation", step=100 * (i + 1), ln_perplexity=x)
            for i, x in enumerate([9.0, *values])
        ]
        lines[1]["step"] = 100  # logged again, by a run that was resumed
        (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    runs = ["multi_query-0", "multi_query-1"]
    run_well(SCRIPT, "--output=a.png", "--record=a.json", "--title=small", *runs, cwd=tmp_path)
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept == dict(
        title="small",
        metric="ln_perplexity",
        runs={runs[0]: {"100": 4.0, "300": 2.0}, runs[1]: {"100": 3.0, "300": 1.5}},
    )
    run_well(SCRIPT, "--output=b.png", "--record=b.json", "a.json", cwd=tmp_path)
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


DRAWN = """
import sys
from absl import flags
sys.path.insert(0, "benchmarks")
import learning_curves
flags.FLAGS(["", "--output=a.png"])
figure = learning_curves.draw(None, {
    "multi_query-0": {100: 4.0, 200: 2.0, 300: 9.0},
    "multi_query-1": {100: 3.0, 200: 1.5},
    "mine": {100: 4.0, 200: 1.25},
})
for line in figure.axes[0].lines:
    print(line.get_color())
for text in figure.axes[0].texts:
    print(text.get_color(), text.get_text())
"""


@pytest.mark.slow
def test_a_curve_has_its_variants_colour_and_its_last_value_at_its_end():
    """The mean of the runs, at the last step that all of them have."""
    colors = [plots.look(name)["color"] for name in ("multi_query", "mine")]
    *lines, first, second = run_well("-c", DRAWN, cwd=ROOT).stdout.splitlines()
    assert lines == colors
    assert {first, second} == {f"{colors[0]} multi_query 1.750", f"{colors[1]} mine 1.250"}
