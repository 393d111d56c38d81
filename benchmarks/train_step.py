"""What a training step costs: model flops against the device, the loader against a constant batch,
and this project against PyTorch.

    python benchmarks/train_step.py --config=configs/wmt14.py:multi_query [--peak_tflops=790]
    python benchmarks/train_step.py --config=configs/multi30k.py:multi_head --data=DIR
    python benchmarks/train_step.py --config=configs/multi30k.py:multi_head --torch_python=PATH

The first trains on one batch of random tokens. `--data`, where `mqa_jax.data.prepare` put data of
that config, measures the same on batches that the loader reads, in turns with one of them over and
over. `--torch_python`, an interpreter with torch 2.13.0, absl-py and ml_collections, measures
`torch.nn.Transformer` of the same size, eager and with AdamW, in turns with ours.

A step's time is the mean of `--steps` in a row, and each figure the median of `--rounds` (least -
most), after one round that does not count.
"""

import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py:VARIANT")
STEPS = flags.DEFINE_integer("steps", 10, "Steps of a round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Of which the median is taken.", lower_bound=1)
PEAK = flags.DEFINE_float("peak_tflops", None, "What the MFU is of; the published peak by default.")
DATA = flags.DEFINE_string("data", None, "Prepared data, to measure the loader with.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "An interpreter that has torch.")
TORCH_WORKER = flags.DEFINE_string("torch_worker", None, "Used inside: sizes, as JSON.")

Step = Callable[[], None]


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    if TORCH_WORKER.value:
        torch_rounds(json.loads(TORCH_WORKER.value))
        return
    if CONFIG.value is None:
        raise app.UsageError("give --config")
    ours()


def seconds(run: Step, finish: Step) -> float:
    """Of one step."""
    start = time.perf_counter()
    for _ in range(STEPS.value):
        run()
    finish()
    return (time.perf_counter() - start) / STEPS.value


def show(name: str, times: list[float], tokens: int, note: str = "") -> None:
    median, least, most = (1e3 * f(times) for f in (statistics.median, min, max))
    print(
        f"{name}: {median:.1f} ms a step ({least:.1f} - {most:.1f}), "
        f"{1e3 * tokens / median:,.0f} tokens/s{note}",
        flush=True,
    )


def ours() -> None:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from mqa_jax.core.devices import PEAK_TFLOP_PER_S
    from mqa_jax.core.sharding import ShardingRules, make_mesh
    from mqa_jax.data import loader
    from mqa_jax.train.setup import set_up, train_flops

    config = CONFIG.value
    mesh = make_mesh(**config.mesh)
    model, state, train_step, _ = set_up(config, mesh)
    size, lengths = config.train.batch_size, (config.data.source_length, config.data.target_length)
    random = np.random.default_rng(0)
    # No EOS among them: one sentence fills a row.
    batch = {
        f"{side}_tokens": random.integers(3, config.model.vocab_size, (size, length), np.int32)
        for side, length in zip(("source", "target"), lengths, strict=True)
        if length
    }
    if DATA.value:
        batches = loader.train_batches(DATA.value, batch_size=size, seed=0, start=0)
        batch = next(batches)

    sharding = NamedSharding(mesh, PartitionSpec(ShardingRules().B))
    put = functools.partial(jax.device_put, device=sharding)

    def round_of(batches: Iterator) -> float:
        nonlocal state

        def run() -> None:
            nonlocal state
            state, _ = train_step(state, next(batches))

        return seconds(run, lambda: jax.block_until_ready(state))

    # Padding is no token: only the loader's batches have any.
    tokens = int(sum(np.sum(x > 0) for x in batch.values()))
    flops, device = train_flops(model, size, *lengths), jax.devices()[0].device_kind
    peak = PEAK.value or PEAK_TFLOP_PER_S.get(device)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(
        f"{mesh.size} x {device}, jax {jax.__version__}: {parameters:,} parameters in "
        f"{config.model.dtype}, a batch of {size} x {lengths}, {1e-12 * flops:.3g} TFLOP"
    )
    contestants = {"ours": itertools.repeat(put(batch))}
    if DATA.value:
        contestants["ours, from the loader"] = map(put, batches)
    times = {name: [] for name in contestants}
    other = torch_process(config) if TORCH_PYTHON.value else None
    for _ in range(ROUNDS.value + 1):
        for name, batches in contestants.items():
            times[name].append(round_of(batches))
        if other:
            times.setdefault("torch", []).append(next(other))
    for name, measured in times.items():
        tflops = 1e-12 * flops / statistics.median(measured[1:]) / mesh.size
        note = f", {tflops:.4g} TFLOP/s a device"
        show(
            name,
            measured[1:],
            tokens,
            note + (f", MFU {100 * tflops / peak:.1f} %" if peak else ""),
        )
    for name in list(times)[1:]:
        ratio = statistics.median(times[name][1:]) / statistics.median(times["ours"][1:])
        print(f"{name}: {ratio:.3f} of ours")


def torch_process(config) -> Iterator[float]:
    """The seconds of a step in each round of another process, which runs when it is asked to."""
    if config.model.num_heads * config.model.head_dim != config.model.d_model:
        raise app.UsageError("torch.nn.Transformer has heads of d_model / num_heads only")
    sizes = dict(
        config.model,
        batch=config.train.batch_size,
        lengths=(config.data.source_length, config.data.target_length),
        label_smoothing=config.train.label_smoothing,
    )
    worker = subprocess.Popen(
        [
            TORCH_PYTHON.value,
            __file__,
            f"--torch_worker={json.dumps(sizes)}",
            f"--steps={STEPS.value}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while True:
        print("go", file=worker.stdin, flush=True)
        yield float(worker.stdout.readline())


def torch_rounds(sizes: dict) -> None:
    """A round for each line of standard input; prints the seconds of a step."""
    import torch
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, sizes["dtype"])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(sizes["vocab_size"], sizes["d_model"])
            self.source_positions, self.target_positions = (
                nn.Embedding(sizes["max_length"], sizes["d_model"]) for _ in range(2)
            )
            self.dropout = nn.Dropout(sizes["dropout_rate"])
            self.transformer = nn.Transformer(
                sizes["d_model"],
                sizes["num_heads"],
                sizes["num_layers"],
                sizes["num_layers"],
                sizes["d_ff"],
                sizes["dropout_rate"],
                batch_first=True,
                norm_first=True,
                bias=False,
            )

        def forward(self, source, target):
            sides = [
                self.dropout(
                    self.embedding(ids) + positions(torch.arange(ids.shape[1], device=device))
                )
                for ids, positions in (
                    (source, self.source_positions),
                    (target, self.target_positions),
                )
            ]
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=device)
            output = self.transformer(*sides, tgt_mask=mask, tgt_is_causal=True)
            return output @ self.embedding.weight.T

    torch.manual_seed(0)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_of = nn.CrossEntropyLoss(label_smoothing=sizes["label_smoothing"])
    source, inputs, targets = (
        torch.randint(3, sizes["vocab_size"], (sizes["batch"], length), device=device)
        for length in (*sizes["lengths"], sizes["lengths"][1])
    )

    def run() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = model(source, inputs)
            loss = loss_of(logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in sys.stdin:
        print(seconds(run, finish), flush=True)


if __name__ == "__main__":
    app.run(main)
