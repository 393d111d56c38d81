"""One decode step of models of the hub: this project beside its peers.

    pip install --editable ".[plot,hub]" torch==2.13.0 transformers ctranslate2
    python benchmarks/hub_peers.py --model=t5_base [--output=FILE] [--peers_python=PATH]

Each --model is a size of a family of the hub: one directory with random weights, which transformers
writes and all read. A prompt of 512 tokens, or a source of 128; a step is the time to 33 tokens
behind it less the time to the first, over 32. Contestants take turns, as in `peers.py`.

  ours           `hub.load` and `generate`, jitted
  transformers   `generate`, with its dynamic cache and its static one; on a GPU if there is one
  ctranslate2    its converter, and `generate_batch` or `translate_batch`
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from turns import (
    PEERS_PYTHON,
    WORKER,
    Run,
    difference,
    print_table,
    read_bandwidth,
    record,
    summary,
    take_turns,
    worker,
)

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
SOURCE, STEPS = 128, 32
# Of these models there is one variant, as they are; kinds are of caches and of dtypes.
CONTESTANTS = {
    "ours": ("own float32", "own bfloat16"),
    "transformers": (
        *("dynamic float32", "static float32"),
        *("dynamic bfloat16", "static bfloat16"),
    ),
    "ctranslate2": ("own float32",),
}

MODEL = flags.DEFINE_enum("model", None, list(MODELS), "What is decoded with.", required=True)
ONLY = flags.DEFINE_list("contestants", list(CONTESTANTS), "Who takes part.")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the contestants.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "For greedy decoding.")
BEAM_BATCH_SIZES = flags.DEFINE_list("beam_batch_sizes", ["1", "8"], "For a beam of 4.")
DIRECTORY = flags.DEFINE_string("directory", None, "Used inside: the model's.")

SETTINGS = "model", "search", "batch", "dtype"


def main(_) -> None:
    if WORKER.value == "write":
        write_model(Path(DIRECTORY.value))
        return
    if WORKER.value:
        print(json.dumps(measure(*worker())))
        return
    workers = [
        (name, kind)
        for name in ONLY.value
        for kind in CONTESTANTS[name]
        if kind.split()[1] in DTYPES.value
    ]
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        # The same flags; of one given twice, the last one counts.
        arguments = [*sys.argv, f"--directory={directory}"]
        subprocess.run([PEERS_PYTHON.value, *arguments, "--worker=write"], check=True)
        take_turns(workers, arguments, records)
    print_table(summary(records), SETTINGS)


def measure(name: str, variant: str, dtype: str) -> list[dict]:
    """All settings of one contestant, in this process."""
    prepares = dict(ours=hub_ours, transformers=hub_transformers, ctranslate2=hub_ctranslate2)
    model = prepares[name](variant, dtype)
    settings = [("greedy", int(batch)) for batch in BATCH_SIZES.value]
    if is_translation():
        settings += [("beam 4", int(batch)) for batch in BEAM_BATCH_SIZES.value]
    records = []
    for search, batch in settings:
        ms = 1e3 * model(batch, 1 if search == "greedy" else 4)()
        setting = dict(model=MODEL.value, variant=variant, dtype=dtype, search=search, batch=batch)
        records.append(record(name, ms, **setting))
    if name == "ours":
        records.append(dict(contestant="read", gigabytes_per_second=read_bandwidth() / 1e9))
    return records


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

        options = loop_options(params, batch * beam_size)

        @functools.partial(jax.jit, static_argnums=1, compiler_options=options)
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

        return difference(seconds_to, STEPS, 5)

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

        return difference(seconds_to, STEPS, 3)

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

        return difference(seconds_to, STEPS, 3)

    return prepare


if __name__ == "__main__":
    app.run(main)
