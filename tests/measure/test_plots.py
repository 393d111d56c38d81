"""The benchmark's pictures: one a question, with what a reader needs in it."""

import dataclasses

import pytest
from costs import ABOUT, cost, grid

from mqa_jax.measure import plots

BOTH = ("multi_head", "multi_query")
ABOUT = ABOUT | dict(model="wmt14")


@pytest.mark.parametrize(
    ("costs", "names"),
    [
        ([cost()], ["roofline"]),
        (
            grid(["multi_query", "multi_query_local"], [8], [128, 512]),
            ["step_against_context", "roofline"],
        ),
        (grid(BOTH, [1, 8], [128]), ["step_against_batch", "roofline", "times_cheaper"]),
        (
            grid(BOTH, [1, 8], [128, 512])[:-1],  # interrupted before the last
            ["step_against_context", "step_against_batch", "roofline", "times_cheaper"],
        ),
        (
            [cost(), cost(search="beam", context_length=512), cost(dtype="bfloat16", batch=1)],
            ["roofline"],
        ),
        (
            [cost(), cost(context_length=512), cost(search="beam", batch=1)],
            ["step_against_context", "roofline"],
        ),
    ],
    ids=["one row", "contexts", "batches", "both", "nothing alike", "a panel without rows"],
)
def test_what_the_rows_allow_is_drawn_one_file_a_question(costs, names, tmp_path):
    paths = plots.draw(costs, ABOUT, tmp_path / "new")
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert set((tmp_path / "new").iterdir()) == set(paths)
    assert all(path.read_bytes()[1:4] == b"PNG" for path in paths)


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_step_against_the_context_is_a_straight_line_where_it_is_one():
    rows = [
        cost(v, search=search, context_length=c, step_ms=float(c), step_ms_min=c / 2)
        for search in ("greedy", "beam")
        for v in ("multi_head", "multi_head_local")
        for c in (512, 128, 2048)
    ]
    figure = plots._lines(rows, "wmt14", "context length", "batch")
    assert figure.get_suptitle().startswith("What does one decode step cost as the context grows?")
    assert [axes.get_title() for axes in figure.axes] == [
        "greedy, float32, batch 8",
        "beam 4, float32, batch 8",
    ]
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
        assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
        assert axes.get_ylabel() == "ms per step"
        for line in axes.lines:  # joined in order
            assert list(line.get_xdata()) == list(line.get_ydata()) == [128, 512, 2048]
    assert texts(figure) == 2 * ["multi_head 2048", "multi_head_local 2048"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["from the fastest run to the slowest"]


def test_labels_that_would_meet_are_moved_apart():
    rows = grid([*BOTH, "multi_query_local", "grouped_query_2"], [8], [128, 2048])
    figure = plots._lines(rows, "", "context length", "batch")
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda b: b.y0)
    assert len(boxes) == 4
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


def test_titles_of_the_roofline_side_by_side_are_not_cut():
    rows = [cost(search=search) for search in ("greedy", "beam")]
    figure = plots._roofline(rows, "", {"float32": dict(gb_per_s=25.0, gflop_per_s=170.0)})
    left, right = (axes.title.get_window_extent() for axes in figure.axes)
    assert left.x0 >= 0 and left.x1 < right.x0 and right.x1 <= figure.bbox.x1


def test_the_roofline_names_points_limits_and_what_is_a_share_of_what():
    rows = grid(BOTH, [8], [512, 128]) + grid(BOTH, [1], [512])
    behind = {"float32": dict(gb_per_s=25.0, gflop_per_s=170.0)}
    figure = plots._roofline(rows, "wmt14, 211 M parameters", behind)
    assert [axes.get_title().splitlines()[0] for axes in figure.axes] == [
        "greedy, float32, batch 8",
        "greedy, float32, batch 1, context length 512",
    ]
    for axes in figure.axes:
        assert "reading 30.0 GB/s, behind the run 25.0\ncomputing 180" in axes.get_title()
    assert sorted(texts(figure)) == 2 * ["128: 50 %"] + 4 * ["512: 50 %"]
    legend = figure.legends[0]
    assert legend.get_title().get_text() == (
        "at a point: context length, and the least time in % of the step's"
    )
    assert [text.get_text() for text in legend.get_texts()] == [
        *BOTH,
        "least time: reading",
        "measured behind the run",
    ]
    bound = [cost(roofline_ms=30.0), cost(batch=1)]
    legend = plots._roofline(bound, "", {}).legends[0]
    assert legend.get_texts()[-1].get_text() == "least time: computing"
    assert legend.get_title().get_text().startswith("at a point: batch, and")


def test_the_model_and_the_machine_are_named():
    large = cost("multi_query", parameters=215_400_000)
    assert plots._what([cost(), large], ABOUT) == (
        "wmt14, 211 to 215 M parameters, random weights, on a laptop, 2 cores"
    )
    unnamed = {k: v for k, v in ABOUT.items() if k != "model"} | dict(device="NVIDIA H200")
    assert plots._what([large], unnamed) == "215 M parameters, random weights, on NVIDIA H200"


def test_a_variant_looks_the_same_in_all_pictures_and_unlike_the_others():
    looks = [plots.look(name) for name in (*plots.LOOKS, "multi_head_local", "multi_query_local")]
    assert len({tuple(look.items()) for look in looks}) == len(looks)
    assert len({look["color"] for look in looks[:8]}) == 8  # of which no two are alike
    assert plots.look("multi_query_local")["color"] == plots.look("multi_query")["color"]
    # Own variants too, whatever else is drawn.
    assert plots.look("mine") == plots.look("mine") != plots.look("yours")


def test_lines_points_and_what_is_written_beside_them_have_their_variants_colour():
    variants = ("multi_query", "mine", "multi_head")  # in another order than usual
    colors = [plots.look(variant)["color"] for variant in variants]
    rows = grid(variants, [8], [128, 512])
    for figure in (
        plots._lines(rows, "", "context length", "batch"),
        plots._roofline(rows, "", {}),
    ):
        [axes] = figure.axes
        lines = [line.get_color() for line in axes.lines]
        assert [*dict.fromkeys(lines)] == [*colors, plots.BLACK][: len({*lines})]
        assert {text.get_color() for text in axes.texts} == {*colors}
    legend = figure.legends[0].get_lines()
    assert [line.get_color() for line in legend[:3]] == colors


def test_the_heat_map_has_the_ratios_to_multi_head():
    step_ms = dict(zip([(1, 128), (1, 512), (8, 128), (8, 512)], [1.0, 1.2, 1.4, 3.0], strict=True))
    heads = [cost(batch=b, context_length=c, step_ms=7 * ms) for (b, c), ms in step_ms.items()]
    queries = [dataclasses.replace(c, variant="multi_query", step_ms=7.0) for c in heads]
    local = [dataclasses.replace(c, variant="multi_query_local", step_ms=3.5) for c in heads[:3]]
    figure = plots._times_cheaper([*heads, *queries, *local], "")
    assert texts(figure) == ["1.00", "1.20", "1.40", "3.00", "2.00", "2.40", "2.80"]
    assert figure.axes[1].get_title() == "multi_query_local, greedy, float32"
    assert plots._times_cheaper([heads[0], queries[0]], "") is None  # one figure is no picture
    assert plots._times_cheaper(queries, "") is None
