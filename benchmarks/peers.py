"""One decode step on a CPU: this project beside its peers.

    pip install --editable ".[plot,hub]" torch==2.13.0 transformers ctranslate2
    python benchmarks/peers.py [--model=t5_base] [--output=FILE] [--peers_python=PATH]

The same work for everyone, with random weights. All contestants have all cores, one at a time; they
take turns for `--rounds` rounds, and each figure is the median over the rounds. With --model=paper,
the default, that is the paper's encoder-decoder: 6 + 6 layers, d_model 1024, d_ff 4096, 8 heads of
128, a vocabulary of 32,000, 128 source tokens; what is timed is the 32 steps behind 128 decoded
tokens, greedily and with a beam of 4.

  ours           `greedy` and `beam_search` over `EncoderDecoder`, one jitted loop
  transformers   T5 of that size, greedily, a loop over `model(...)` with its own cache
  ctranslate2    its Transformer, the time to 160 tokens less the time to 128

Any other --model is a size of a family of the hub: one directory, which transformers writes and all
read. A prompt of 512 tokens, or a source of 128; a step is the time to 33 tokens behind it less the
time to the first, over 32.

  ours           `hub.load` and `generate`, jitted
  transformers   `generate`, with its dynamic cache and its static one; on a GPU if there is one
  ctranslate2    its converter, and `generate_batch` or `translate_batch`

`--peers_python` is the interpreter to run the peers with, where they are installed apart.
"""

import dataclasses
import datetime
import functools
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

# Sizes of models of the hub, in the words of their families' configs.
_STARCODER = dict(model_type="gpt_bigcode", vocab_size=49_152, n_positions=8192, eos_token_id=0)
MODELS = {
    "tiny_starcoder": dict(_STARCODER, n_embd=768, n_head=12, n_layer=20, n_inner=3072),
    "starcoderbase_1b": dict(_STARCODER, n_embd=2048, n_head=16, n_layer=24, n_inner=8192),
    "t5_base": dict(
        model_type="t5",
        vocab_size=32_128,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        decoder_start_token_id=0,
    ),
    "marian": dict(  # opus-mt's
        model_type="marian",
        vocab_size=58_101,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_position_embeddings=512,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=58_100,
        eos_token_id=0,
        decoder_start_token_id=58_100,
    ),
}
PROMPT = 512
# Of these models there is one variant, as they are; kinds are of caches and of dtypes.
HUB_CONTESTANTS = {
    "ours": ("own float32", "own bfloat16"),
    "transformers": (
        *("dynamic float32", "static float32"),
        *("dynamic bfloat16", "static bfloat16"),
    ),
    "ctranslate2": ("own float32",),
}

MODEL = flags.DEFINE_enum("model", "paper", ["paper", *MODELS], "What is decoded with.")
ONLY = flags.DEFINE_list("contestants", list(CONTESTANTS), "Who takes part.")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16", "int8"], "Of the contestants.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "For greedy decoding.")
BEAM_BATCH_SIZES = flags.DEFINE_list("beam_batch_sizes", ["1", "8"], "For a beam of 4.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "How often they take turns.", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", 6, "Fewer, to try this out.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Where to write the figures as JSON.")
PEERS_PYTHON = flags.DEFINE_string("peers_python", sys.executable, "Interpreter of the peers.")
DIRECTORY = flags.DEFINE_string("directory", None, "Used inside: the model's.")
WORKER = flags.DEFINE_string("worker", None, "Used inside: measure this contestant, print JSON.")

Run = Callable[[], float]  # Decodes; the seconds that one step took. Warm when it is returned.


def main(_) -> None:
    if WORKER.value == "write":
        write_model(Path(DIRECTORY.value))
        return
    if WORKER.value:
        print(json.dumps(measure(*WORKER.value.split())))
        return
    kinds = CONTESTANTS if MODEL.value == "paper" else HUB_CONTESTANTS
    workers = [
        (name, kind)
        for name in ONLY.value
        for kind in kinds[name]
        if kind.split()[1] in DTYPES.value
    ]
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        # The same flags; of one given twice, the last one counts.
        arguments = [*sys.argv, f"--directory={directory}"]
        if MODEL.value != "paper":
            subprocess.run([PEERS_PYTHON.value, *arguments, "--worker=write"], check=True)
        take_turns(workers, arguments, records)
    print_table(summary(records))


def take_turns(workers: list[tuple[str, str]], arguments: list[str], records: list[dict]) -> None:
    """Adds what is measured to `records`."""
    try:
        for _ in range(ROUNDS.value):
            for name, kind in workers:
                python = sys.executable if name == "ours" else PEERS_PYTHON.value
                command = [python, *arguments, f"--worker={name} {kind}"]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if result.returncode:
                    print(f"{name} {kind} failed, see above; it needs {name} installed")
                    continue
                records += json.loads(result.stdout.splitlines()[-1])
                write(records)
                print(f"{name} {kind}: done", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far follows", file=sys.stderr)


def write(records: list[dict]) -> None:
    """To `--output`, after each contestant: nothing that was measured gets lost."""
    if OUTPUT.value:
        record = dict(machine=f"{platform.machine()}, {os.cpu_count()} cores")
        record |= dict(date=datetime.date.today().isoformat(), rows=summary(records))
        Path(OUTPUT.value).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(name: str, variant: str, dtype: str) -> list[dict]:
    """All settings of one contestant, in this process."""
    is_paper = MODEL.value == "paper"
    if is_paper:
        prepares = dict(ours=ours, transformers=transformers_t5, ctranslate2=ctranslate2_model)
    else:
        prepares = dict(ours=hub_ours, transformers=hub_transformers, ctranslate2=hub_ctranslate2)
    model = prepares[name](variant, dtype)
    settings = [("greedy", int(batch)) for batch in BATCH_SIZES.value]
    if is_paper and name != "transformers" or is_translation():
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
                model=MODEL.value,
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


def is_translation() -> bool:
    return MODEL.value in ("t5_base", "marian")


def write_model(directory: Path) -> None:
    """A directory of the hub, of a size of `MODELS`: with random weights, and words for tokens."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    fields = dict(MODELS[MODEL.value])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    kind = transformers.AutoModelForCausalLM
    if is_translation():
        kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_config(config)
    model.save_pretrained(directory)
    # Marian's is the last one, which CTranslate2 leaves out.
    pad = fields.get("pad_token_id", 2)
    words = {f"word{i}": i for i in range(2, config.vocab_size) if i != pad}
    words |= {"</s>": 0, "<unk>": 1, "<pad>": pad}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    special = dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>", bos_token="</s>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(directory)


def difference(seconds_to: Callable[[int], float], repeats: int) -> Run:
    """Of a step, from the seconds to a number of tokens."""
    for tokens in (1, 1 + STEPS):
        seconds_to(tokens)

    def run() -> float:
        behind = statistics.median(seconds_to(1 + STEPS) for _ in range(repeats))
        return (behind - statistics.median(seconds_to(1) for _ in range(repeats))) / STEPS

    return run


def hub_ours(_: str, dtype: str) -> Callable[[int, int], Run]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mqa_jax import beam_search, greedy, hub
    from mqa_jax.core.devices import loop_options
    from mqa_jax.decode.beam import TRANSFORMERS
    from mqa_jax.decode.prompts import generate

    loaded = hub.load(DIRECTORY.value, dtype=dtype)
    graphdef, params = nnx.split(loaded.model)
    start = loaded.generation.decoder_start_id or 0

    def prepare(batch: int, beam_size: int) -> Run:
        length = SOURCE if is_translation() else PROMPT
        prompt, lengths = jnp.full((batch, length), 7), jnp.full(batch, length)
        search = functools.partial(greedy, eos_id=None)
        if beam_size > 1:
            options = dict(beam_size=beam_size, alpha=1.0, beam_rules=TRANSFORMERS)
            search = functools.partial(beam_search, eos_id=None, **options)

        @functools.partial(jax.jit, static_argnums=1, compiler_options=loop_options())
        def program(params, tokens):
            model = nnx.merge(graphdef, params)
            options = dict(search=search, max_new_tokens=tokens, bos_id=start)
            decoded = generate(model, prompt, lengths, **options)
            return decoded.tokens, decoded.steps

        def seconds_to(tokens: int) -> float:
            start = time.perf_counter()
            _, steps = jax.block_until_ready(program(params, tokens))
            seconds = time.perf_counter() - start
            if int(steps) != tokens:
                raise RuntimeError(f"{int(steps)} steps were taken, not {tokens}")
            return seconds

        return difference(seconds_to, 5)

    return prepare


def hub_transformers(cache: str, dtype: str) -> Callable[[int, int], Run]:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    kind = transformers.AutoModelForCausalLM
    if is_translation():
        kind = transformers.AutoModelForSeq2SeqLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(DIRECTORY.value, dtype=getattr(torch, dtype)).to(device).eval()

    def prepare(batch: int, beam_size: int) -> Run:
        length = SOURCE if is_translation() else PROMPT
        prompt = torch.full((batch, length), 7, device=device)
        options = dict(attention_mask=torch.ones_like(prompt), num_beams=beam_size)
        options |= dict(do_sample=False, cache_implementation=cache)

        @torch.inference_mode()
        def seconds_to(tokens: int) -> float:
            start = time.perf_counter()
            output = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **options)
            output.cpu()  # Waits for a GPU.
            return time.perf_counter() - start

        return difference(seconds_to, 3)

    return prepare


def hub_ctranslate2(_: str, dtype: str) -> Callable[[int, int], Run]:
    import ctranslate2

    converted = tempfile.TemporaryDirectory()
    converter = ctranslate2.converters.TransformersConverter(DIRECTORY.value)
    converter.convert(converted.name, force=True)
    kind = ctranslate2.Translator if is_translation() else ctranslate2.Generator
    threads = dict(inter_threads=1, intra_threads=os.cpu_count())
    model = kind(converted.name, compute_type=dtype, **threads)

    def prepare(batch: int, beam_size: int) -> Run:
        def seconds_to(tokens: int, directory=converted) -> float:  # Files as long as the model.
            start = time.perf_counter()
            if is_translation():
                lengths = dict(min_decoding_length=tokens, max_decoding_length=tokens)
                source = [["word7"] * SOURCE] * batch
                model.translate_batch(source, beam_size=beam_size, **lengths)
            else:
                lengths = dict(min_length=tokens, max_length=tokens)
                lengths |= dict(include_prompt_in_result=False)
                prompts = [["word7"] * PROMPT] * batch
                model.generate_batch(prompts, beam_size=beam_size, **lengths)
            return time.perf_counter() - start

        return difference(seconds_to, 3)

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
        same = ("search", "batch", "dtype", *["variant"] * (MODEL.value == "paper"))
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
