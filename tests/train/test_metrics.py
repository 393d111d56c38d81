"""BLEU and exact match by hand, and the log of a run as others read it."""

import io
import json
import resource
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from mqa_jax.train import metrics
from mqa_jax.train.metrics import MetricLog, bleu, chrf, exact_match

SENTENCES = ["the cat sat on the mat today", "a b c d e f", "one two three four, five"]


def test_bleu_of_the_references_themselves():
    score, signature = bleu(SENTENCES, SENTENCES)
    np.testing.assert_allclose(score, 100, rtol=1e-9)
    assert (
        signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )


@pytest.mark.parametrize(
    "hypotheses, references, expected",
    [
        # 4/5, 3/4, 2/3 and 1/2 of the n-grams are right.
        (["a b c d e"], ["a b c d f"], 100 * 0.2**0.25),
        # All are, but the hypothesis is shorter.
        (["a b c d"], ["a b c d e"], 100 * np.exp(1 - 5 / 4)),
        # Of a corpus the n-grams are counted together: 9/10, 7/8, 5/6, 3/4.
        (["a b c d e", "f g h i j"], ["a b c d x", "f g h i j"], 100 * 0.4921875**0.25),
        # Upper and lower case differ: 2/4; and of none, 0/n is smoothed to 1/2n, 1/4n, 1/8n.
        (["a b c d"], ["a B c D"], 100 * (1 / 2 * 1 / 6 * 1 / 8 * 1 / 8) ** 0.25),
        # The full stop is a token of its own.
        (["a b c d."], ["a b c d ."], 100),
    ],
)
def test_bleu_by_hand(hypotheses, references, expected):
    np.testing.assert_allclose(bleu(hypotheses, references)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("hypotheses, references", [(["a"], ["a", "b"]), ([], [])])
@pytest.mark.parametrize("metric", [bleu, chrf, exact_match])
def test_what_does_not_match_is_refused(metric, hypotheses, references):
    message = f"{len(hypotheses)} hypotheses for {len(references)} references"
    with pytest.raises(ValueError, match=message):
        metric(hypotheses, references)


def test_chrf():
    score, signature = chrf(SENTENCES, SENTENCES)
    np.testing.assert_allclose(score, 100, rtol=1e-9)
    assert signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    # Of "ab" and "ac" half of the characters are right, and none of the pairs: F is 1/4.
    np.testing.assert_allclose(chrf(["ab"], ["ac"])[0], 25, rtol=1e-6)


def test_exact_match():
    assert exact_match(["a b", "c", "d"], ["a b", "C", "d "]) == 1 / 3
    assert exact_match(SENTENCES, SENTENCES) == 1


def tensorboard(directory):
    """Tag, step and value of all scalars in the event files, in order of the steps."""
    scalars = []
    for path in directory.glob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            # A record: length, its checksum, the event, its checksum.
            length = int.from_bytes(content[:8], "little")
            data, checksum = content[12 : 12 + length], content[12 + length : 16 + length]
            assert int.from_bytes(checksum, "little") == masked_crc32c(data)
            content = content[16 + length :]
            event = Event.FromString(data)
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return sorted(scalars)


def json_lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_and_its_resumption_leave_one_log(tmp_path, capsys):
    log = MetricLog(tmp_path, 70)
    log.write("train", 10, {"loss": jnp.float32(2.5), "tokens": np.int64(12)})
    assert json_lines(tmp_path)[0]["loss"] == 2.5, "what is logged is on disk at once"
    log.write("validation", 10, {"loss": 3.25})
    log.print("a remark")
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # as a kill may leave it
    # In the same second.
    log = MetricLog(str(tmp_path), 70, step=10)
    log.write("train", 20, {"loss": 1.5, "tokens": 13})
    log.close()

    lines = json_lines(tmp_path)
    times = [line.pop("time") for line in lines]
    assert times == sorted(times) and times[0] > 1.6e9
    assert lines == [
        {"kind": "train", "step": 10, "loss": 2.5, "tokens": 12.0},
        {"kind": "validation", "step": 10, "loss": 3.25},
        {"kind": "train", "step": 20, "loss": 1.5, "tokens": 13.0},
    ]
    assert tensorboard(tmp_path) == [
        (10, "train/loss", 2.5),
        (10, "train/tokens", 12.0),
        (10, "validation/loss", 3.25),
        (20, "train/loss", 1.5),
        (20, "train/tokens", 13.0),
    ]
    # Not on a terminal: plain lines, and nothing that would draw over itself.
    out, err = capsys.readouterr()
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "step 10 train loss 2.5 tokens 12",
        "step 10 validation loss 3.25",
        "a remark",
        "step 20 train loss 1.5 tokens 13",
    ]
    assert err == "" and "\r" not in out


def test_a_full_disk_is_an_error_that_names_a_file_and_nothing_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0)
    log = MetricLog(tmp_path, 70)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*metrics.jsonl'"):
            for step in range(30):  # The event file grows faster.
                log.write("train", step, {f"{i}": 0.5 for i in range(20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    steps = [line["step"] for line in json_lines(tmp_path)]
    assert steps == list(range(len(steps))) and 0 < len(steps) < 30
    assert {step for step, *_ in tensorboard(tmp_path)} >= set(steps[:-1])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_shows_the_newest(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = MetricLog(tmp_path, 70, step=30)
    log.write("train", 40, {"loss": 2.5})
    log.write("validation", 40, {"loss": 3.25})
    log.print("a remark")
    log.write("train", 70, {"loss": 1.5})
    log.close()
    shown = terminal.getvalue()
    assert "30/70" in shown and "70/70" in shown and "loss 1.5" in shown
    out = capsys.readouterr().out
    assert "a remark" in out and "3.25" in out and "2.5" not in out.replace("3.25", "")
    assert [line["step"] for line in json_lines(tmp_path)] == [40, 40, 70]
