"""One decode step on a GPU: this project beside the same step in PyTorch, as one CUDA graph.

    pip install --editable ".[plot]" torch
    python benchmarks/gpu_peers.py [--sizes=1024x128,64x8192,8x128,1x128] [--output=FILE]

The paper's model as in `peers.py`, with random weights, in bfloat16: rows x context, as many source
tokens as decoded ones, then the 32 steps behind these, greedily. Contestants take turns for
`--rounds` rounds, each alone on the GPU.

  ours            `greedy` over `EncoderDecoder`, the whole loop one program
  torch           its own kernels, one step captured as a `torch.cuda.CUDAGraph` and replayed; all
                  heads that share keys are rows of one matrix of queries
  torch_compile   the same step behind `torch.compile`, max-autotune, captured likewise

Their step writes all rows' tokens to one position, and looks for no NaN; ours lets each row have
its own, and does.
"""

import json
import statistics
import sys
import time

from absl import app, flags
from paper_model import (
    D_FF,
    D_FF_MULTI_QUERY,
    D_MODEL,
    HEAD_DIM,
    HEADS,
    LAYERS,
    STEPS,
    VOCAB,
    ours,
)
from turns import WORKER, print_table, read_bandwidth, record, summary, take_turns, worker

# Their precisions, as the benchmark of the package names them.
CONTESTANTS = {
    "torch": ("bfloat16",),
    "torch_compile": ("bfloat16",),
    "ours": (
        *("bfloat16", "bfloat16 int8-caches", "bfloat16 fp8-caches"),
        "bfloat16 int8_weights int8-caches",
    ),
}

ONLY = flags.DEFINE_list("contestants", list(CONTESTANTS), "Who takes part.")
VARIANTS = flags.DEFINE_list("variants", ["multi_head", "multi_query"], "Of the model.")
SIZES = flags.DEFINE_list("sizes", ["1024x128", "64x8192", "8x128", "1x128"], "Rows x context.")

SETTINGS = "size", "variant", "dtype"


def main(_) -> None:
    if WORKER.value:
        print(json.dumps(measure(*worker())))
        return
    workers = [
        (name, f"{variant} {precision}")
        for variant in VARIANTS.value
        for name in ONLY.value
        for precision in CONTESTANTS[name]
    ]
    records: list[dict] = []
    take_turns(workers, sys.argv, records)
    print_table(summary(records), SETTINGS)


def measure(name: str, variant: str, precision: str) -> list[dict]:
    """All sizes of one contestant, in this process."""
    records = []
    for size in SIZES.value:
        rows, context = map(int, size.split("x"))
        if name == "ours":
            ms = 1e3 * ours(variant, precision, context=context)(rows, 1)()
        else:
            ms = 1e3 * torch_step(variant, rows, context, is_compiled=name == "torch_compile")
        package = "torch" if name == "torch_compile" else None
        setting = dict(size=size, variant=variant, dtype=precision)
        records.append(record(name, ms, package, **setting))
    if name == "ours":
        records.append(dict(contestant="read", gigabytes_per_second=read_bandwidth() / 1e9))
    return records


def torch_step(variant: str, rows: int, context: int, is_compiled: bool) -> float:
    """Seconds, the median of five runs of `STEPS` steps."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    kv_heads = 1 if variant == "multi_query" else HEADS
    d_ff = D_FF_MULTI_QUERY if variant == "multi_query" else D_FF
    slots, width = context + STEPS, HEADS * HEAD_DIM
    options = dict(device="cuda", dtype=torch.bfloat16)

    def weight(*shape: int):
        return torch.randn(*shape, **options) * shape[-1] ** -0.5

    def cache(length: int):
        return torch.randn(rows * kv_heads, length, HEAD_DIM, **options)

    norm = torch.ones(D_MODEL, **options)
    table, positions = weight(VOCAB, D_MODEL), weight(slots, D_MODEL)
    layers = [
        dict(
            qkv=weight(width + 2 * kv_heads * HEAD_DIM, D_MODEL),
            out=weight(D_MODEL, width),
            key=cache(slots),
            value=cache(slots),
            cross_query=weight(width, D_MODEL),
            cross_out=weight(D_MODEL, width),
            cross_key=cache(context),
            cross_value=cache(context),
            wi=weight(d_ff, D_MODEL),
            wo=weight(D_MODEL, d_ff),
        )
        for _ in range(LAYERS)
    ]
    slot = torch.arange(slots, device="cuda")
    scale = HEAD_DIM**-0.5

    def normed(x):
        return functional.rms_norm(x, (D_MODEL,), norm)

    def attended(query, key, value, bias):
        """The queries of all heads that share keys are rows of one matrix."""
        query = query.reshape(rows * kv_heads, HEADS // kv_heads, HEAD_DIM)
        logits = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
        return torch.bmm(logits.softmax(-1), value).reshape(rows, width)

    def step(tokens, position):
        x = table[tokens] + positions[position]
        bias = torch.where(slot <= position, 0.0, float("-inf")).to(torch.bfloat16)
        nothing = torch.zeros((), **options)
        for layer in layers:
            sizes = width, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM
            query, key, value = (normed(x) @ layer["qkv"].T).split(sizes, dim=-1)
            for name, new in (("key", key), ("value", value)):
                layer[name].index_copy_(1, position, new.reshape(-1, 1, HEAD_DIM))
            x = x + attended(query, layer["key"], layer["value"], bias) @ layer["out"].T
            query = normed(x) @ layer["cross_query"].T
            seen = attended(query, layer["cross_key"], layer["cross_value"], nothing)
            x = x + seen @ layer["cross_out"].T
            x = x + torch.relu(normed(x) @ layer["wi"].T) @ layer["wo"].T
        # In float32, as ours: in bfloat16 many of 32,000 would be equal.
        logits = torch.mm(normed(x), table.T, out_dtype=torch.float32)
        return logits.argmax(-1), position + 1

    if is_compiled:
        step = torch.compile(step, mode="max-autotune-no-cudagraphs")
    tokens = torch.full((rows,), 5, device="cuda")
    position = torch.full((1,), context, device="cuda")
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Warm: nothing is chosen or allocated in the graph.
            for _ in range(3):
                step(tokens, position)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for old, new in zip((tokens, position), step(tokens, position), strict=True):
                old.copy_(new)

        def run() -> float:
            position.fill_(context)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS):
                graph.replay()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / STEPS

        run()
        return statistics.median(run() for _ in range(5))


if __name__ == "__main__":
    app.run(main)
