"""`benchmark` as a user types it."""

import json
import re
import signal
import subprocess
import time

import pytest
from running import ROOT, TINY, behind, command, run_well

from mqa_jax.cli import main


@pytest.mark.slow
def test_benchmark_needs_jax_and_flax_alone(tmp_path):
    # Not to be found, as where they are not installed. Flax itself wants optax and msgpack.
    absent = ("grain", "orbax", "sentencepiece", "tensorflow_datasets", "sacrebleu", "tensorboardX")
    result = run_well(
        "-c",
        behind(f"sys.modules.update(dict.fromkeys({absent}))"),
        ROOT / "decode.py",
        "--benchmark",
        *TINY[:7],
        "--quick",
        "--context_lengths=11,13",
        "--compare=paper",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert "multi_query" in result.stdout and "12.11" in result.stdout  # 46 / 3.8, the paper's
    content = json.loads((tmp_path / "out/benchmark.json").read_text())
    # Where no flag says otherwise, a quick one is small.
    rows = [(cost["variant"], cost["batch"], cost["context_length"]) for cost in content["costs"]]
    assert rows == [(v, 8, n) for v in ("multi_head", "multi_query") for n in (11, 13)]
    assert content["is_complete"]
    assert all(cost["step_ms"] > 0 for cost in content["costs"])
    assert content["model"] == "multi30k (changed)"
    assert content["probe_behind"]["float32"].keys() == {"gb_per_s", "gflop_per_s"}
    assert max(map(len, result.stdout.splitlines())) <= 80
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {"roofline", "step_against_context"} <= pictures


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_what_fits_is_told_and_nothing_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["benchmark", "--config=wmt14", "--variants=multi_head,multi_query"]
    args += ["--dtypes=bfloat16", "--quantize=none,int8", "--cache_dtype=none,int8"]
    assert main([*args, "--memory=16GB", "--context_lengths=512,8192"]) == 0
    first, heading, *rows = capsys.readouterr().out.splitlines()
    assert "fit into 16 GB" in first and heading.split() == ["context", "512", "8,192"]
    # 16 GB less 211 M weights, by keys and values of 2 x 512 tokens in six layers, and logits.
    a_row = 2 * 6 * 8 * 128 * 2 * 512 * 2 + 4 * 33_792
    assert rows[0].split()[:3] == ["multi_head,", "bfloat16", str(int((16e9 - 2 * 211e6) / a_row))]
    found = {
        row[:45].strip(): [int(n.replace(",", "")) for n in row[45:].split()[::2]] for row in rows
    }
    assert [*found][1::2] == [
        *("multi_query, bfloat16", "multi_query, bfloat16 int8-caches"),
        *("multi_query, bfloat16 int8", "multi_query, bfloat16 int8 int8-caches"),
    ]
    columns = (f"multi_query, bfloat16{x} int8-caches" for x in (" int8", ""))
    for wide, caches, both in zip(
        found["multi_head, bfloat16"], *(found[name] for name in [*columns][::-1]), strict=True
    ):
        assert both > caches > 7 * wide
    assert not list(tmp_path.iterdir())
    for text in ("16", "0GB", "16 KB", "much"):
        assert main([*args, f"--memory={text}"]) == 2
        assert f"--memory must be such as 16GB or 80GiB, or device, not '{text}'" in (
            capsys.readouterr().err
        )
    assert main([*args, "--variants=multi_query", "--quantize=none", "--memory=device"]) == 0
    assert capsys.readouterr().out
    assert main([*args, "--memory=16GB", "--cache_dtype=int4"]) == 2
    assert capsys.readouterr().out == ""  # No heading of a table that does not come.


@pytest.mark.slow
def test_an_interrupted_benchmark_keeps_its_rows(tmp_path):
    args = [*TINY[:7], "--batch_sizes=2,3", "--context_lengths=11,13,17,19", "--output_dir=out"]
    process = subprocess.Popen(
        **command("-c", behind(""), ROOT / "decode.py", "--benchmark", *args, cwd=tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    path = tmp_path / "out/benchmark.json"
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors[-3000:]
    content = json.loads(path.read_text())
    assert 1 <= len(content["costs"]) < 4 * 2 * 4 and not content["is_complete"]
    assert "interrupted" in errors and "The cost of decoding" in printed
    assert any((tmp_path / "out").glob("roofline.png"))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--variants=multi_query", "--compare=paper"], "and multi_head"),
        (["--batch_sizes=2,two"], "--batch_sizes takes whole numbers, not ['2', 'two']"),
        (["--context_lengths=8,1"], "a context length must be from 2 to"),
        (["--context_lengths=3000000"], "GB, but the device has"),
        (["--variants=many_query"], "'many_query' is not one of"),
    ],
    ids=str,
)
def test_a_benchmark_that_cannot_be_is_refused(args, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["decode", "--benchmark", *TINY[:7], "--output_dir=out", *args]) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", errors) and reason in errors
    assert not list(tmp_path.glob("out/*"))
