"""One decode step of the paper's encoder-decoder on a CPU: this project beside its peers.

    pip install --editable ".[plot]" torch==2.13.0 transformers ctranslate2
    python benchmarks/peers.py [--output=FILE] [--peers_python=PATH]

The same work for everyone: 6 + 6 layers, d_model 1024, d_ff 4096, 8 heads of 128, a vocabulary of
32,000, random weights, 128 source tokens; what is timed is the 32 steps behind 128 decoded tokens,
greedily and with a beam of 4. All contestants have all cores, one at a time; they take turns for
`--rounds` rounds, and each figure is the median over the rounds.

  ours           `greedy` and `beam_search` over `EncoderDecoder`, one jitted loop
  transformers   T5 of that size, greedily, a loop over `model(...)` with its own cache
  ctranslate2    its Transformer, the time to 160 tokens less the time to 128

`--peers_python` is the interpreter to run the peers with, where they are installed apart.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

CONTESTANTS = {
    "ours": ("multi_head float32", "multi_head bfloat16", "multi_query float32"),
    "transformers": ("multi_head float32", "multi_head bfloat16"),
    "ctranslate2": ("multi_head float32", "multi_head int8"),
}
CONTESTANTS["ours"] += ("multi_query bfloat16",)

D_MODEL, D_FF, HEADS, HEAD_DIM, VOCAB = 1024, 4096, 8, 128, 32_000
SOURCE, BEFORE, STEPS = 128, 128, 32
EOS = 1

ONLY = flags.DEFINE_list("contestants", list(CONTESTANTS), "Who takes part.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "For greedy decoding.")
BEAM_BATCH_SIZES = flags.DEFINE_list("beam_batch_sizes", ["1", "8"], "For a beam of 4.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "How often they take turns.", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", 6, "Fewer, to try this out.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Where to write the figures as JSON.")
PEERS_PYTHON = flags.DEFINE_string("peers_python", sys.executable, "Interpreter of the peers.")
WORKER = flags.DEFINE_string("worker", None, "Used inside: measure this contestant, print JSON.")

Run = Callable[[], float]  # Decodes; the seconds that one step took. Warm when it is returned.


def main(_) -> None:
    if WORKER.value:
        print(json.dumps(measure(*WORKER.value.split())))
        return
    records, workers = [], [(name, kind) for name in ONLY.value for kind in CONTESTANTS[name]]
    try:
        for _ in range(ROUNDS.value):
            for name, kind in workers:
                python = sys.executable if name == "ours" else PEERS_PYTHON.value
                # The same flags; of one given twice, the last one counts.
                command = [python, *sys.argv, f"--worker={name} {kind}"]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if result.returncode:
                    print(f"{name} {kind} failed, see above; it needs {name} installed")
                    continue
                records += json.loads(result.stdout.splitlines()[-1])
                write(records)
                print(f"{name} {kind}: done", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far follows", file=sys.stderr)
    print_table(summary(records))


def write(records: list[dict]) -> None:
    """To `--output`, after each contestant: nothing that was measured gets lost."""
    if OUTPUT.value:
        record = dict(machine=f"{platform.machine()}, {os.cpu_count()} cores")
        record |= dict(date=datetime.date.today().isoformat(), rows=summary(records))
        Path(OUTPUT.value).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(name: str, variant: str, dtype: str) -> list[dict]:
    """All settings of one contestant, in this process."""
    prepare = {"ours": ours, "transformers": transformers_t5, "ctranslate2": ctranslate2_model}[
        name
    ]
    model = prepare(variant, dtype)
    settings = [("greedy", int(batch)) for batch in BATCH_SIZES.value]
    if name != "transformers":
        settings += [("beam 4", int(batch)) for batch in BEAM_BATCH_SIZES.value]
    package = {"ours": "jax"}.get(name, name)
    records = []
    for search, batch in settings:
        ms = 1e3 * model(batch, 1 if search == "greedy" else 4)()
        records.append(
            dict(
                contestant=name,
                version=f"{package} {importlib.metadata.version(package)}",
                python=platform.python_version(),
                variant=variant,
                dtype=dtype,
                search=search,
                batch=batch,
                ms=ms,
            )
        )
    if name == "ours":
        records.append(dict(contestant="read", gigabytes_per_second=read_bandwidth() / 1e9))
    return records


def read_bandwidth() -> float:
    """Bytes a second of a plain sum over 1 GiB, the best of several."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**28, jnp.float32)
    total, best = jax.jit(jnp.sum), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(total(x))
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def ours(variant: str, dtype: str) -> Callable[[int, int], Run]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mqa_jax import EncoderDecoder, TransformerConfig, beam_search, greedy

    is_multi_query = variant == "multi_query"
    config = TransformerConfig(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        d_ff=5440 if is_multi_query else D_FF,  # As many parameters, as in the paper.
        num_layers=LAYERS.value,
        num_heads=HEADS,
        num_kv_heads=1 if is_multi_query else HEADS,
        head_dim=HEAD_DIM,
        max_length=BEFORE + STEPS,
        dtype=dtype,
        param_dtype=dtype,
    )
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def prepare(batch: int, beam_size: int) -> Run:
        encode = jax.jit(lambda params, ids: nnx.merge(graphdef, params).init_cross_cache(ids))
        cross = encode(params, jnp.full((batch, SOURCE), 7))

        def decode(params, cache, cross, tokens_B):
            model = nnx.merge(graphdef, params)
            step_fn = lambda tokens, cache: model.decode(tokens, cache, cross)  # noqa: E731
            if beam_size == 1:
                return greedy(step_fn, cache, tokens_B, max_new_tokens=STEPS)
            options = dict(beam_size=beam_size, max_new_tokens=STEPS, eos_id=EOS)
            return beam_search(step_fn, cache, tokens_B, **options)

        program = jax.jit(decode, donate_argnums=1 if beam_size == 1 else ())
        tokens_B = jnp.full(batch, 5)
        cache = model.init_cache(batch, BEFORE + STEPS)

        def run() -> float:
            nonlocal cache
            cache = jax.block_until_ready(
                tuple(dataclasses.replace(c, length=jnp.full(batch, BEFORE)) for c in cache)
            )
            start = time.perf_counter()
            decoded = jax.block_until_ready(program(params, cache, cross, tokens_B))
            seconds = time.perf_counter() - start
            if int(decoded.steps) != STEPS:
                raise RuntimeError(f"{int(decoded.steps)} steps were taken, not {STEPS}")
            if beam_size == 1:
                cache = decoded.cache
            return seconds / STEPS

        run()
        return lambda: statistics.median(run() for _ in range(5))

    return prepare


def transformers_t5(variant: str, dtype: str) -> Callable[[int, int], Run]:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        d_ff=D_FF,
        d_kv=HEAD_DIM,
        num_heads=HEADS,
        num_layers=LAYERS.value,
        num_decoder_layers=LAYERS.value,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
        eos_token_id=EOS,
    )
    model = T5ForConditionalGeneration(config).to(getattr(torch, dtype)).eval()

    def prepare(batch: int, beam_size: int) -> Run:
        source = torch.full((batch, SOURCE), 7)

        @torch.inference_mode()
        def run() -> float:
            encoded = model.encoder(source)
            target = torch.full((batch, BEFORE), 5)
            output = model(encoder_outputs=encoded, decoder_input_ids=target, use_cache=True)
            start = time.perf_counter()
            for _ in range(STEPS):
                output = model(
                    encoder_outputs=encoded,
                    decoder_input_ids=output.logits[:, -1:].argmax(-1),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
            return (time.perf_counter() - start) / STEPS

        run()
        return lambda: statistics.median(run() for _ in range(3))

    return prepare


def ctranslate2_model(variant: str, dtype: str) -> Callable[[int, int], Run]:
    import ctranslate2
    import numpy as np

    rng = np.random.default_rng(0)
    spec = ctranslate2.specs.TransformerSpec.from_config(LAYERS.value, HEADS, pre_norm=True)
    shapes = {
        "embeddings": (VOCAB, D_MODEL),
        "embeddings_0": (VOCAB, D_MODEL),
        "projection": (VOCAB, D_MODEL),
        "self_attention/linear_0": (3 * D_MODEL, D_MODEL),
        "attention/linear_1": (2 * D_MODEL, D_MODEL),
        "self_attention/linear_1": (D_MODEL, D_MODEL),
        "ffn/linear_0": (D_FF, D_MODEL),
        "ffn/linear_1": (D_MODEL, D_FF),
    }

    def fill(layer, name: str, value) -> None:
        if value is not None:
            return
        parent, attribute = name.rsplit("/", 1)
        if attribute in ("gamma", "beta"):
            weight = np.full(D_MODEL, attribute == "gamma")
        elif attribute == "encodings":
            weight = rng.normal(size=(BEFORE + STEPS + 1, D_MODEL))
        else:
            last_two = "/".join(parent.split("/")[-2:])
            shape = shapes.get(last_two) or shapes.get(parent.split("/")[-1], (D_MODEL, D_MODEL))
            weight = rng.normal(scale=shape[-1] ** -0.5, size=shape)
        setattr(layer, attribute, weight.astype(np.float32))

    ctranslate2.specs.model_spec.visit_spec(spec, fill)
    words = ["<unk>", "</s>", "<s>"] + [f"word{i}" for i in range(VOCAB - 3)]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.validate()
    directory = tempfile.TemporaryDirectory()
    spec.save(directory.name)
    model = ctranslate2.Translator(
        directory.name, compute_type=dtype, inter_threads=1, intra_threads=os.cpu_count()
    )

    def prepare(batch: int, beam_size: int) -> Run:
        source = [["word7"] * SOURCE] * batch

        def seconds_to(length: int) -> float:
            options = dict(min_decoding_length=length, max_decoding_length=length)
            start = time.perf_counter()
            model.translate_batch(source, beam_size=beam_size, **options)
            return time.perf_counter() - start

        def run(directory=directory) -> float:  # Its files must not go before the model does.
            return (seconds_to(BEFORE + STEPS) - seconds_to(BEFORE)) / STEPS

        seconds_to(4)
        return run

    return prepare


def summary(records: list[dict]) -> list[dict]:
    """A row a setting: the median over the rounds, the least and the most."""
    groups = {}
    for record in records:
        value = record.get("ms", record.get("gigabytes_per_second"))
        key = tuple((k, v) for k, v in record.items() if k not in ("ms", "gigabytes_per_second"))
        groups.setdefault(key, []).append(value)
    return [
        dict(key) | dict(median=statistics.median(values), min=min(values), max=max(values))
        for key, values in groups.items()
    ]


def print_table(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"ms per decode step, median of {ROUNDS.value} rounds (least - most)")
    for column in ("search", "batch", "contestant", "variant", "dtype", "ms", "over ours"):
        table.add_column(column, no_wrap=True)
    measured = [row for row in rows if row["contestant"] != "read"]
    for row in sorted(measured, key=lambda r: (r["search"] != "greedy", r["batch"], r["dtype"])):
        same = ("search", "batch", "dtype", "variant")
        mine = [
            r["median"]
            for r in measured
            if r["contestant"] == "ours" and all(r[k] == row[k] for k in same)
        ]
        table.add_row(
            row["search"],
            str(row["batch"]),
            row["version"],
            row["variant"],
            row["dtype"],
            f"{row['median']:.1f} ({row['min']:.1f} - {row['max']:.1f})",
            f"{row['median'] / mine[0]:.2f}" if mine else "-",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for row in rows:
        if row["contestant"] == "read":
            console.print(f"a plain sum reads {row['median']:.1f} GB/s")


if __name__ == "__main__":
    app.run(main)
