"""Decodes with a trained model, or measures what decoding costs:

python decode.py --workdir=DIR --input=FILE --output=FILE [--beam_size=4] [--reference=FILE]
python decode.py --benchmark --config=configs/wmt14.py [--quick] --output_dir=DIR
python decode.py --compile_only=v2:2x2 --config=configs/wmt14.py --batch_sizes=1024

A translation model translates each line; a language model continues it.
"""

import contextlib
import functools
import runpy
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from flax import nnx
from ml_collections import ConfigDict, config_flags

from mqa_jax import TransformerConfig, beam_search, greedy, sample
from mqa_jax.decode.generate import Search
from mqa_jax.decode.lines import LineDecoder
from mqa_jax.measure import benchmark, compile_only, plots, report
from mqa_jax.measure.cost import SEARCHES
from mqa_jax.model.transformer import MODELS, build_model

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The --workdir of a training run.", allow_override=True
)
INPUT = flags.DEFINE_string("input", "-", "A text to decode line by line; - is standard input.")
OUTPUT = flags.DEFINE_string("output", "-", "Where the lines go; - is standard output.")
REFERENCE = flags.DEFINE_string("reference", None, "The right lines: prints BLEU.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Lines decoded at once.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "At most that many tokens a line; by default 50 more than it has."
)
BEAM_SIZE = flags.DEFINE_integer("beam_size", 1, "Above 1: beam search.", lower_bound=1)
ALPHA = flags.DEFINE_float("alpha", 0.6, "Length penalty of the beam search.")
SAMPLE = flags.DEFINE_bool("sample", False, "Draw tokens instead of taking the best.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "For --sample.")
TOP_K = flags.DEFINE_integer("top_k", None, "For --sample: only the k best tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "For --sample: only the best tokens, of that mass.")
SEED = flags.DEFINE_integer("seed", 0, "For --sample.")

BENCHMARK = flags.DEFINE_bool("benchmark", False, "Measure --config with random weights.")
CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="For --benchmark.", allow_override=True
)
QUICK = flags.DEFINE_bool(
    "quick", False, "For --benchmark: two variants at one size, where no flag says otherwise."
)
VARIANTS = flags.DEFINE_list(
    "variants",
    ["multi_head", "multi_query", "multi_head_local", "multi_query_local"],
    "For --benchmark.",
)
SEARCH_NAMES = flags.DEFINE_list(
    "searches", ["greedy"], f"For --benchmark: of {','.join(SEARCHES)}."
)
DTYPES = flags.DEFINE_list("dtypes", [], "For --benchmark; by default the config's.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["8"], "For --benchmark.")
CONTEXT_LENGTHS = flags.DEFINE_list(
    "context_lengths", ["128", "512"], "For --benchmark: tokens of source and of target."
)
REPEATS = flags.DEFINE_integer(
    "repeats", 5, "For --benchmark: runs, of which the median counts.", lower_bound=1
)
COMPARE = flags.DEFINE_enum("compare", None, ["paper"], "For --benchmark: against these figures.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "For --benchmark: where JSON and pictures go.")
COMPILE_ONLY = flags.DEFINE_string(
    "compile_only",
    None,
    "A TPU topology, such as v5e:2x2: compiles a decode step of --config in each of the --variants "
    "--dtypes, --batch_sizes and --context_lengths for it, and tells.",
    allow_override=True,
)


def main(_) -> int | None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file that it writes.
    if BENCHMARK.value:
        if CONFIG.value is None or OUTPUT_DIR.value is None:
            raise app.UsageError("--benchmark needs --config and --output_dir")
        return run_benchmark(Path(OUTPUT_DIR.value))
    if COMPILE_ONLY.value:
        if CONFIG.value is None:
            raise app.UsageError("--compile_only needs --config")
        return compile_only.decode(
            {variant: variant_config(variant) for variant in VARIANTS.value},
            COMPILE_ONLY.value,
            batch_sizes=integers(BATCH_SIZES),
            context_lengths=integers(CONTEXT_LENGTHS),
            dtypes=DTYPES.value,
        )
    if WORKDIR.value is None:
        raise app.UsageError("give --workdir to decode, or --benchmark, or --compile_only")
    decode_text(Path(WORKDIR.value))


def decode_text(workdir: Path) -> None:
    # Here and not above: the benchmark runs where JAX and Flax are, and none of what these need.
    from tqdm import tqdm

    from mqa_jax.data import BOS_ID, EOS_ID
    from mqa_jax.data.text import read_lines
    from mqa_jax.data.tokenizer import Tokenizer
    from mqa_jax.train import workdir as workdirs
    from mqa_jax.train.metrics import bleu, exact_match

    config = workdirs.load_config(workdir)
    tokenizer = Tokenizer.load(workdir / workdirs.TOKENIZER)
    lines = read_lines(INPUT.value)
    references = None if REFERENCE.value is None else read_lines(REFERENCE.value)
    if references is not None and len(references) != len(lines):
        raise ValueError(
            f"{REFERENCE.value} has {len(references)} lines, {INPUT.value} has {len(lines)}"
        )
    model, params = restore(config, workdir / workdirs.CHECKPOINTS)
    decoder = LineDecoder(
        model,
        tokenizer,
        search=build_search(EOS_ID),
        batch_size=BATCH_SIZE.value,
        bos_id=BOS_ID,
        max_new_tokens=MAX_NEW_TOKENS.value,
    )
    keys = jax.random.split(jax.random.key(SEED.value), len(lines)) if SAMPLE.value else None

    outputs, unended = [""] * len(lines), 0
    progress = tqdm(total=len(lines), unit="line", disable=not sys.stderr.isatty())
    for i, decoded in decoder(params, lines, keys):
        best = decoded.tokens.reshape(-1, decoded.tokens.shape[-1])[0].tolist()
        unended += EOS_ID not in best
        # A model can spell a line break byte by byte; each input has one line of output.
        outputs[i] = " ".join(tokenizer.decode(best).splitlines())
        progress.update()
    progress.close()

    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if OUTPUT.value != "-":
            file = stack.enter_context(open(OUTPUT.value, "w", encoding="utf-8", newline="\n"))
        file.writelines(f"{line}\n" for line in outputs)
    print_stats(decoder, len(lines), unended)
    if references is not None:
        score, signature = bleu(outputs, references)
        print(f"BLEU {score:.2f}  ({signature})", file=sys.stderr)
        print(f"exact match {100 * exact_match(outputs, references):.1f} %", file=sys.stderr)


def restore(config: ConfigDict, directory: Path) -> tuple[nnx.Module, nnx.State]:
    """The structure of the model, and the weights of the newest checkpoint."""
    from mqa_jax.train.checkpoint import Checkpoints

    model = nnx.eval_shape(
        lambda: build_model(config.task, config.model.to_dict(), rngs=nnx.Rngs(0))
    )
    checkpoints = Checkpoints(directory)
    params = checkpoints.restore_params(nnx.state(model))
    checkpoints.close()
    return model, params


def build_search(eos_id: int) -> Search:
    if SAMPLE.value and BEAM_SIZE.value > 1:
        raise app.UsageError("--sample and --beam_size exclude each other")
    if SAMPLE.value:
        return functools.partial(
            sample,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
            eos_id=eos_id,
        )
    if BEAM_SIZE.value > 1:
        return functools.partial(
            beam_search, beam_size=BEAM_SIZE.value, alpha=ALPHA.value, eos_id=eos_id
        )
    return functools.partial(greedy, eos_id=eos_id)


def print_stats(decoder: LineDecoder, lines: int, unended: int) -> None:
    stats = decoder.stats
    print(
        f"{lines} lines, {stats.tokens} tokens in {stats.decode_seconds:.1f} s: "
        f"{stats.tokens / stats.decode_seconds:.0f} tokens/s, "
        f"{1e3 * stats.decode_seconds / stats.steps:.2f} ms per step of {BATCH_SIZE.value} lines "
        f"(compiled in {stats.compile_seconds:.1f} s)",
        file=sys.stderr,
    )
    if unended:
        print(
            f"{unended} of them reached the limit of tokens before their end: --max_new_tokens",
            file=sys.stderr,
        )


# What --quick measures: under a minute on two cores at the size of the paper.
QUICK_FLAGS = dict(variants=["multi_head", "multi_query"], context_lengths=["128"], repeats=3)


def run_benchmark(output_dir: Path) -> int:
    """Returns the exit status: 130, as the shell has it, after an interrupt."""
    for name, value in QUICK_FLAGS.items() if QUICK.value else ():
        if not flags.FLAGS[name].present:
            flags.FLAGS[name].value = value
    configs = {variant: variant_config(variant) for variant in VARIANTS.value}
    if COMPARE.value and getattr(configs.get("multi_head"), "task", None) != "translation":
        raise app.UsageError("--compare=paper needs a --config that translates, and multi_head")
    costs = benchmark.sweep(
        {
            variant: (MODELS[config.task], TransformerConfig(**config.model))
            for variant, config in configs.items()
        },
        batch_sizes=integers(BATCH_SIZES),
        context_lengths=integers(CONTEXT_LENGTHS),
        dtypes=DTYPES.value,
        searches=SEARCH_NAMES.value,
        repeats=REPEATS.value,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    run = report.record(costs, benchmark.describe(), output_dir / "benchmark.json")
    if run.costs:
        report.print_table(run)
        plots.draw(run.costs, run.about, output_dir)
        if COMPARE.value and any(cost.variant == "multi_head" for cost in run.costs):
            report.print_comparison(run)
    return 0 if run.is_complete else 130


def integers(flag: flags.FlagHolder) -> list[int]:
    try:
        return [int(text) for text in flag.value]
    except ValueError:
        raise app.UsageError(f"--{flag.name} takes whole numbers, not {flag.value}") from None


def variant_config(variant: str) -> ConfigDict:
    """Another variant of the file behind --config, with the same overrides."""
    path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    config = runpy.run_path(path)["get_config"](variant)
    config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
    return config


def run() -> None:
    """The command line."""
    app.run(main)
