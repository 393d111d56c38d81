"""A run as a person reads it: a table, a README's table, the paper beside it."""

import pytest
from costs import ABOUT, cost, grid, run

from mqa_jax.measure import report


def printed(capsys, *args, **options) -> list[str]:
    report.print_table(*args, **options)
    return capsys.readouterr().out.splitlines()


def test_the_table_says_once_what_all_rows_share(capsys):
    beam = cost("multi_query_local", context_length=509, search="beam", reorder_ms=0.0625)
    lines = printed(capsys, run(cost(), beam), wide=True)
    assert "random weights, float32, batch 8" in lines[0]
    assert "30 GB/s, 180 GFLOP/s" in lines[-1]
    header = "\n".join(lines[1:5])
    assert "search" in header and "length" in header and "dtype" not in header
    (head,) = (line.split() for line in lines if "multi_head" in line)
    assert {"greedy", "128", "40.0", "38.5", "123", "-", "490", "110", "50"} <= set(head)
    (local,) = (line.split() for line in lines if "multi_query_local" in line)
    assert {"beam", "509", "0.0625"} <= set(local)
    lines = printed(capsys, run(cost(encode_ms=None, encode_us_per_token=None)), wide=True)
    assert "encode" not in str(lines) and "reorder" not in str(lines)


# Nothing that a run can have is wider: two searches, three dtypes, large sizes and slow steps.
WORST = [
    cost(
        variant,
        search=search,
        dtype=dtype,
        batch=65_536,
        context_length=131_072,
        encode_ms=987_654.3,
        step_ms=123_456.7,
        step_ms_min=112_345.6,
        step_ms_max=134_567.8,
        kv_bytes=1_234_567_000_000,
        roofline_fraction=1.234,
    )
    for search in ("greedy", "beam")
    for dtype in ("float32", "bfloat16", "float16")
    for variant in ("multi_query_local", "my_own_grouped_query_of_4_heads_and_window_256")
]
TYPICAL = [
    cost(variant, search=search, context_length=c)
    for search in ("greedy", "beam")
    for variant in ("multi_head", "multi_query", "multi_head_local", "multi_query_local")
    for c in (128, 512, 2048)
]


@pytest.mark.parametrize("terminal", ["40", "80", "200"])
@pytest.mark.parametrize("rows", [[cost()], TYPICAL, [*TYPICAL, *WORST]], ids=len)
def test_the_table_fits_80_columns_and_cuts_no_figure(rows, terminal, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", terminal)
    behind = {dtype: dict(gb_per_s=29.0, gflop_per_s=170.0) for dtype in {c.dtype for c in rows}}
    lines = printed(capsys, run(*rows, probe_behind=behind))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for row in {id(row): row for row in rows}.values():
        figures = [report.in_digits(row.step_ms), f"{100 * row.roofline_fraction:.0f} %"]
        figures += [report.in_digits(x) for x in (row.step_ms_min, row.step_ms_max, row.encode_ms)]
        figures += [report.in_digits(row.kv_bytes / 1e6)]
        if len(rows) > 1:
            figures += [str(row.context_length)]
        assert any(all(figure in line for figure in figures) for line in lines), row
    folded = "".join(line.strip().split("  ")[0].replace(" ", "") for line in lines)
    assert all(row.variant in folded for row in rows)
    # With two searches or dtypes, what a group of rows is about stands above it.
    if len(rows) > len(TYPICAL):
        for search, dtype in {(c.search, c.dtype) for c in rows}:
            assert f"{search},{dtype}" in folded
    monkeypatch.setenv("COLUMNS", "80")
    wide = printed(capsys, run(*rows, probe_behind=behind), wide=True)
    assert any("GFLOP" in line and len(line) > 80 for line in wide)
    assert "\N{HORIZONTAL ELLIPSIS}" not in "\n".join(wide)


def test_rows_of_a_search_stand_together_under_one_heading(capsys):
    """The benchmark takes the searches in turns, so that they share what is compiled."""
    rows = [
        cost(variant, context_length=c, search=search)
        for variant in ("multi_head", "multi_query")
        for c in (128, 512)
        for search in ("greedy", "beam")
    ]
    report.print_table(run(*rows))
    firsts = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    body = [first for first in firsts if first in ("greedy", "beam", "multi_head", "multi_query")]
    group = ["multi_head"] * 2 + ["multi_query"] * 2
    assert body == ["greedy", *group, "beam", *group]


FAST = cost(roofline_fraction=1.12, roofline_ms=44.8)


@pytest.mark.parametrize(
    ("fast", "about", "behind_gb_per_s", "reason"),
    [
        (FAST, dict(cache_bytes=700_000_000), 60.0, "caches (700 MB) hold all that it reads"),
        (FAST, dict(cache_bytes=64_000_000), 60.0, "the host was busier"),
        (FAST, dict(), 60.0, "the host was busier"),
        (FAST, dict(cache_bytes=64_000_000), 12.0, "caches (64 MB) hold a part of what it reads"),
        (cost(roofline_fraction=1.01), dict(), None, "fall short of what the device can do"),
        (FAST, dict(), None, "either caches hold what it reads, or the host was busy"),
        # Arithmetic is not held in a cache.
        (
            cost(roofline_fraction=1.12, flops=8_000_000_000),
            dict(cache_bytes=700_000_000),
            None,
            "either caches hold",
        ),
    ],
)
def test_above_100_percent_says_why(fast, about, behind_gb_per_s, reason, capsys):
    behind = {}
    if behind_gb_per_s is not None:
        behind = {"float32": dict(gb_per_s=behind_gb_per_s, gflop_per_s=170.0)}
    measured = run(cost(batch=1), fast, about=ABOUT | about, probe_behind=behind)
    lines = printed(capsys, measured)
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "%" in line and line.startswith(" multi_head      8"))
    assert f"a {100 * fast.roofline_fraction:.0f} %" in row
    text = " ".join("\n".join(lines).split())
    assert reason in text and text.count("a: above 100 %") == 1
    assert reason in report.markdown(measured) and "%, a)" in report.markdown(measured)
    if behind:
        assert (
            f"30 GB/s, 180 GFLOP/s before, {behind_gb_per_s:.0f} GB/s, 170 GFLOP/s behind" in text
        )
    assert "above 100 %" not in str(printed(capsys, run(cost())))


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
    text = capsys.readouterr().out
    assert "12.11" in text and "10.00" in text and "grouped_query_2" not in text
    worst = [
        cost(variant, **dict(batch=65_536, context_length=131_072, search=search, dtype=dtype))
        for variant in report.PAPER["beam"]
        for search in report.PAPER
        for dtype in ("float32", "bfloat16")
    ]
    report.print_comparison(run(*worst, cost(batch=1)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and sum("131072" in line for line in lines) == 2 * len(worst)


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


def test_figures_come_from_a_file_without_measuring(tmp_path, monkeypatch, capsys):
    rows = grid(("multi_head", "multi_query"), [8], [128, 512])
    report.save(run(*rows), tmp_path / "benchmark.json")
    (tmp_path / "README.md").write_text("<!-- benchmark --><!-- /benchmark -->")
    args = [tmp_path / "benchmark.json", tmp_path / "docs", f"--readme={tmp_path}/README.md"]
    monkeypatch.setattr("sys.argv", ["report", *map(str, args)])
    report.main()
    assert (tmp_path / "docs/step_against_context.png").exists()
    assert "step_against_context.png" in capsys.readouterr().out
    assert "multi_query" in (tmp_path / "README.md").read_text()
    (tmp_path / "benchmark.json").write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*benchmark\.json is not whole"):
        report.main()
