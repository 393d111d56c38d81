"""One decode step on a CPU: this project beside its peers.

    pip install --editable ".[plot]" torch==2.13.0 transformers ctranslate2
    python benchmarks/peers.py [--output=FILE] [--peers_python=PATH]

The same work for everyone, with random weights: the paper's encoder-decoder, 6 + 6 layers, d_model
1024, d_ff 4096, 8 heads of 128, a vocabulary of 32,000, 128 source tokens. What is timed is the 32
steps behind 128 decoded tokens, greedily and with a beam of 4. All contestants have all cores, one
at a time; they take turns for `--rounds` rounds, and each figure is the median over the rounds.

  ours           `greedy` and `beam_search` over `EncoderDecoder`, one jitted loop
  transformers   T5 of that size, greedily, a loop over `model(...)` with its own cache
  ctranslate2    its Transformer, the time to 160 tokens less that to 128, each the median of three

`--peers_python` is the interpreter to run the peers with, where they are installed apart.
`hub_peers.py` does the same with models of the hub, `gpu_peers.py` on a GPU.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags
from paper_model import CONTEXT, D_FF, D_MODEL, EOS, HEAD_DIM, HEADS, STEPS, VOCAB, ours
from turns import WORKER, Run, print_table, read_bandwidth, record, summary, take_turns, worker

# By the packages' names: variant and precision, as the benchmark of the package names it.
CONTESTANTS = {
    "ours": (
        *("multi_head float32", "multi_head bfloat16", "multi_head float32 int8"),
        "multi_head float32 int8 int8-caches",
        *("multi_query float32", "multi_query bfloat16", "multi_query float32 int8"),
        "multi_query float32 int8 int8-caches",
    ),
    "transformers": ("multi_head float32", "multi_head bfloat16"),
    "ctranslate2": ("multi_head float32", "multi_head float32 int8"),
}

ONLY = flags.DEFINE_list("contestants", list(CONTESTANTS), "Who takes part.")
VARIANTS = flags.DEFINE_list("variants", ["multi_head", "multi_query"], "Of the contestants.")
PRECISIONS = flags.DEFINE_list(
    "precisions",
    ["float32", "bfloat16", "float32 int8", "float32 int8 int8-caches"],
    "Of the contestants.",
)
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "For greedy decoding.")
BEAM_BATCH_SIZES = flags.DEFINE_list("beam_batch_sizes", ["1", "8"], "For a beam of 4.")
LAYERS = flags.DEFINE_integer("layers", 6, "Fewer, to try this out.", lower_bound=1)

SETTINGS = "search", "batch", "variant", "dtype"


def main(_) -> None:
    if WORKER.value:
        print(json.dumps(measure(*worker())))
        return
    workers = [
        (name, kind)
        for name in ONLY.value
        for kind in CONTESTANTS[name]
        if kind.split(" ", 1)[0] in VARIANTS.value and kind.split(" ", 1)[1] in PRECISIONS.value
    ]
    records: list[dict] = []
    take_turns(workers, sys.argv, records)
    print_table(summary(records), SETTINGS)


def measure(name: str, variant: str, precision: str) -> list[dict]:
    """All settings of one contestant, in this process."""
    prepares = dict(
        ours=functools.partial(ours, layers=LAYERS.value),
        transformers=transformers_t5,
        ctranslate2=ctranslate2_model,
    )
    model = prepares[name](variant, precision)
    settings = [("greedy", int(batch)) for batch in BATCH_SIZES.value]
    if name != "transformers":
        settings += [("beam 4", int(batch)) for batch in BEAM_BATCH_SIZES.value]
    records = []
    for search, batch in settings:
        ms = 1e3 * model(batch, 1 if search == "greedy" else 4)()
        setting = dict(search=search, batch=batch, variant=variant, dtype=precision)
        records.append(record(name, ms, **setting))
    if name == "ours":
        records.append(dict(contestant="read", gigabytes_per_second=read_bandwidth() / 1e9))
    return records


def transformers_t5(variant: str, precision: str) -> Callable[[int, int], Run]:
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
    model = T5ForConditionalGeneration(config).to(getattr(torch, precision)).eval()

    def prepare(batch: int, beam_size: int) -> Run:
        source = torch.full((batch, CONTEXT), 7)

        @torch.inference_mode()
        def run() -> float:
            encoded = model.encoder(source)
            target = torch.full((batch, CONTEXT), 5)
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


def ctranslate2_model(variant: str, precision: str) -> Callable[[int, int], Run]:
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
            weight = rng.normal(size=(CONTEXT + STEPS + 1, D_MODEL))
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
        directory.name,
        compute_type=precision.split()[-1],
        inter_threads=1,
        intra_threads=os.cpu_count(),
    )

    def prepare(batch: int, beam_size: int) -> Run:
        source = [["word7"] * CONTEXT] * batch

        def seconds_to(length: int) -> float:
            options = dict(min_decoding_length=length, max_decoding_length=length)
            start = time.perf_counter()
            model.translate_batch(source, beam_size=beam_size, **options)
            return time.perf_counter() - start

        def run(directory=directory) -> float:  # Its files must not go before the model does.
            lengths = (CONTEXT, CONTEXT + STEPS)
            before, behind = (statistics.median(seconds_to(n) for _ in range(3)) for n in lengths)
            return (behind - before) / STEPS

        seconds_to(4)
        return run

    return prepare


if __name__ == "__main__":
    app.run(main)
