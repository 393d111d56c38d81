"""The record of a run: saved, printed, drawn, put into a README and beside the paper."""

import dataclasses
import json

import pytest

from mqa_jax.measure import plots, report
from mqa_jax.measure.cost import FIELDS, Cost

ABOUT = dict(
    date="2026-11-23",
    device="cpu",
    machine="a laptop, 2 cores",
    python="3.13.0",
    jax="0.12.0",
    jaxlib="0.12.0",
    flax="0.12.12",
)
COST = Cost(
    variant="multi_head",
    search="greedy",
    dtype="float32",
    batch=8,
    context_length=128,
    parameters=211_000_000,
    encode_ms=1024.0,
    prefill_ms=700.0,
    steps=32,
    step_ms=40.0,
    step_ms_min=38.5,
    step_ms_max=123.4,
    step_alone_ms=41.0,
    reorder_ms=None,
    encode_us_per_token=1000.0,
    step_us_per_token=5000.0,
    weight_bytes=490_000_000,
    kv_bytes=110_000_000,
    flops=2_000_000_000,
    gb_per_s=15.0,
    probe_gb_per_s=30.0,
    probe_gflop_per_s=180.0,
    roofline_ms=20.0,
    roofline_fraction=0.5,
    compile_seconds=3.0,
)


def cost(variant="multi_head", **changes) -> Cost:
    return dataclasses.replace(COST, variant=variant, **changes)


def run(*costs: Cost) -> report.Run:
    return report.Run(ABOUT, list(costs), is_complete=True)


def grid(variants, batches, lengths) -> list[Cost]:
    return [cost(v, batch=b, context_length=c) for v in variants for b in batches for c in lengths]


def test_every_field_is_documented():
    assert list(FIELDS) == [field.name for field in dataclasses.fields(Cost)]
    assert FIELDS["step_ms"] == "one step inside the on-device loop, median of the runs."
    assert FIELDS["reorder_ms"].endswith("median of the runs, measured alone.")  # a third line


def test_json_comes_back_as_it_was(tmp_path):
    saved = run(cost(), cost("multi_query", search="beam", encode_ms=None, reorder_ms=0.25))
    report.save(saved, tmp_path / "benchmark.json")
    assert report.load(tmp_path / "benchmark.json") == saved
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["fields"] == FIELDS and content["machine"] == "a laptop, 2 cores"
    assert content["costs"][0].keys() == FIELDS.keys()


def test_json_of_another_version_is_refused(tmp_path):
    path = tmp_path / "benchmark.json"
    row = dataclasses.asdict(COST)
    del row["steps"]
    path.write_text(json.dumps({**ABOUT, "costs": [row | {"speed": 1}]}))
    with pytest.raises(ValueError, match="its rows differ in speed, steps"):
        report.load(path)


def test_each_row_is_saved_at_once_and_an_interrupt_keeps_them(tmp_path, capsys):
    path, rows = tmp_path / "benchmark.json", [cost(batch=2), cost(batch=3)]

    def measure(is_interrupted):
        yield rows[0]
        assert report.load(path) == report.Run(ABOUT, rows[:1], is_complete=False)
        yield rows[1]
        if is_interrupted:
            raise KeyboardInterrupt

    assert report.record(measure(False), ABOUT, path) == run(*rows) == report.load(path)
    kept = report.record(measure(True), ABOUT, path)
    assert kept == report.load(path) == report.Run(ABOUT, rows, is_complete=False)
    assert "interrupted: 2 rows are kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_says_once_what_all_rows_share(capsys):
    beam = cost("multi_query_local", context_length=509, search="beam", reorder_ms=0.0625)
    report.print_table(run(cost(), beam))
    lines = capsys.readouterr().out.splitlines()
    assert "random weights, float32, batch 8" in lines[0]
    assert "30 GB/s, 180 GFLOP/s" in lines[-1]
    header = "\n".join(lines[1:5])
    assert "search" in header and "length" in header and "dtype" not in header
    (head,) = (line.split() for line in lines if "multi_head" in line)
    assert {"greedy", "128", "40.0", "38.5", "123", "-", "490", "110", "50"} <= set(head)
    (local,) = (line.split() for line in lines if "multi_query_local" in line)
    assert {"beam", "509", "0.0625"} <= set(local)
    report.print_table(run(cost(encode_ms=None, encode_us_per_token=None)))
    printed = capsys.readouterr().out
    assert "encode" not in printed and "reorder" not in printed


def test_the_paper_is_compared_ratio_by_ratio(capsys):
    query = cost("multi_query", step_us_per_token=500.0, encode_us_per_token=800.0)
    sizes = [
        cost(),
        query,
        cost(batch=3, step_us_per_token=7000.0),
        cost("multi_query", batch=3, step_us_per_token=4000.0),
    ]
    rows = report.compare_with_paper(sizes)
    assert [(r.part, r.us_per_token, r.times_cheaper) for r in rows[2:4] + rows[6:]] == [
        ("encoder", 800, 1.25),
        ("decoder", 500, 10),
        ("encoder", 1000, 1),
        ("decoder", 4000, 1.75),
    ]
    assert [r.paper_us_per_token for r in rows[:4]] == [1.7, 46, 1.5, 3.8]
    assert rows[3].paper_times_cheaper == pytest.approx(46 / 3.8)

    beams = [cost(search="beam"), cost("multi_head_local", search="beam")]
    paper = [r.paper_us_per_token for r in report.compare_with_paper(beams)]
    assert paper == [2.0, 203, 1.9, 47]

    report.print_comparison(run(*sizes, cost("grouped_query_2")))
    printed = capsys.readouterr().out
    assert "12.11" in printed and "10.00" in printed and "grouped_query_2" not in printed


@pytest.mark.parametrize(
    "costs",
    [[cost("multi_query")], [cost("grouped_query_2")], [cost(encode_us_per_token=None)]],
    ids=["no multi_head", "not in the paper", "no encoder"],
)
def test_nothing_to_compare_with_the_paper(costs):
    with pytest.raises(ValueError, match="ratios need multi_head"):
        report.compare_with_paper(costs)


def test_markdown_has_a_column_a_variant_and_what_is_missing():
    costs = [
        cost(),
        cost("multi_query", step_ms=25.04, roofline_fraction=0.634),
        cost(context_length=2048, step_ms=1234.5),
    ]
    caption, blank, *table = report.markdown(run(*costs)).splitlines()
    assert "random weights, greedy, float32, batch 8" in caption and "jax 0.12.0" in caption
    assert blank == ""
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == [
        ["context length", "multi_head", "multi_query"],
        ["---", "---", "---"],
        ["128", "40.0 (50 %)", "25.0 (63 %)"],
        ["2048", "1234 (50 %)", "-"],
    ]


def test_the_readme_gets_the_table_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nafter\n")
    report.rewrite_readme(readme, run(cost()))
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmark -->\n\nMilliseconds of one decode step")
    assert text.endswith("|\n\n<!-- /benchmark -->\nafter\n")
    assert "old" not in text and "40.0 (50 %)" in text
    report.rewrite_readme(readme, run(cost()))
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- benchmark -->",
        "<!-- /benchmark --> <!-- benchmark -->",
        "<!-- benchmark --> <!-- benchmark --> <!-- /benchmark -->",
    ],
)
def test_a_readme_without_markers_is_left_alone(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="must have <!-- benchmark --> and"):
        report.rewrite_readme(readme, run(cost()))
    assert readme.read_text() == text


BOTH = ("multi_head", "multi_query")


@pytest.mark.parametrize(
    ("costs", "names"),
    [
        ([cost()], ["roofline_greedy_float32"]),
        (
            grid(["multi_head", "multi_head_local"], [8], [128, 512]),
            ["step_cost_greedy_float32_batch_8", "roofline_greedy_float32"],
        ),
        (
            grid(BOTH, [1, 8], [128]),
            ["batch_cost_greedy_float32_context_128", "roofline_greedy_float32"],
        ),
        (
            grid(BOTH, [1, 8], [128, 512])[:-1],  # interrupted before the last
            [
                "step_cost_greedy_float32_batch_1",
                "step_cost_greedy_float32_batch_8",
                "batch_cost_greedy_float32_context_128",
                "batch_cost_greedy_float32_context_512",
                "roofline_greedy_float32",
                "ratio_greedy_float32",
            ],
        ),
        (
            [cost(), cost(search="beam", context_length=512), cost(dtype="bfloat16", batch=1)],
            ["roofline_greedy_float32", "roofline_beam_float32", "roofline_greedy_bfloat16"],
        ),
    ],
    ids=["one row", "contexts", "batches", "both", "nothing alike"],
)
def test_what_the_rows_allow_is_drawn(costs, names, tmp_path):
    paths = plots.draw(costs, ABOUT, tmp_path / "new")
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert set((tmp_path / "new").iterdir()) == set(paths)
    assert all(path.read_bytes()[1:4] == b"PNG" for path in paths)


def test_the_heat_map_has_the_ratios_and_the_line_where_multi_query_pays():
    step_ms = dict(zip([(1, 128), (1, 512), (8, 128), (8, 512)], [1.0, 1.2, 1.4, 3.0], strict=True))
    heads = [cost(batch=b, context_length=c, step_ms=7 * ms) for (b, c), ms in step_ms.items()]
    queries = [dataclasses.replace(c, variant="multi_query", step_ms=7.0) for c in heads]
    axes = plots._ratio(heads + queries).axes[0]
    assert [text.get_text() for text in axes.texts[:4]] == ["1.00", "1.20", "1.40", "3.00"]
    ((vertices,),) = (
        contour.allsegs for contour in axes.collections if hasattr(contour, "allsegs")
    )
    # Between 1.4 and 3 it is reached at a sixteenth of the way, between 1.2 and 3 at a sixth.
    ends = sorted(tuple(vertex) for vertex in (vertices[0][0], vertices[0][-1]))
    assert ends[0] == pytest.approx((1 / 16, 1)) and ends[1] == pytest.approx((1, 1 / 6))
    # Nowhere reached: no line.
    axes = plots._ratio([c for c in heads + queries if c.batch == 1] + grid(BOTH, [2], [128, 512]))
    assert not any(hasattr(contour, "allsegs") for contour in axes.axes[0].collections)


def test_figures_come_from_a_file_without_measuring(tmp_path, monkeypatch, capsys):
    report.save(run(*grid(BOTH, [8], [128, 512])), tmp_path / "benchmark.json")
    (tmp_path / "README.md").write_text("<!-- benchmark --><!-- /benchmark -->")
    args = [tmp_path / "benchmark.json", tmp_path / "docs", f"--readme={tmp_path}/README.md"]
    monkeypatch.setattr("sys.argv", ["report", *map(str, args)])
    report.main()
    assert (tmp_path / "docs/step_cost_greedy_float32_batch_8.png").exists()
    assert "step_cost_greedy_float32_batch_8.png" in capsys.readouterr().out
    assert "multi_query" in (tmp_path / "README.md").read_text()
