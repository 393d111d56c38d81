"""Measures what decoding costs, with random weights; or compiles a decode step for a TPU.

    mqa-jax benchmark --config=wmt14 [--quick] --output_dir=DIR
    mqa-jax benchmark --model=DIR --output_dir=DIR
    mqa-jax benchmark --config=wmt14 --compile_only=v2:2x2 --batch_sizes=1024
    mqa-jax benchmark --config=wmt14 --memory=16GB --quantize=none,int8 --cache_dtype=none,int8

With --model it is a model of the Hugging Face hub, of whose directory config.json is enough. The
tables are printed, and kept with pictures in --output_dir. --memory measures nothing: it tells how
many rows can be decoded at once in so much.
"""

import dataclasses
import re
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mqa_jax.cli.arguments import (
    NONE,
    check_fp8,
    define_config,
    define_model,
    load_config,
    refuse_idle,
)
from mqa_jax.core.checks import check_integer
from mqa_jax.core.config import base_config
from mqa_jax.core.extras import require
from mqa_jax.core.paths import local_path
from mqa_jax.core.quantized import CACHE_DTYPES, SCHEMES
from mqa_jax.measure.cost import SEARCHES

# What --quick measures: under a minute on two cores at the size of the paper.
QUICK = dict(variants=["multi_head", "multi_query"], context_lengths=["128"], repeats=3)


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_config(values)
    define_model(values, "measures a model of its sizes")
    flags.DEFINE_string("output_dir", None, "where JSON and pictures go", flag_values=values)
    flags.DEFINE_bool(
        "quick",
        False,
        "two variants at one size, where no flag says otherwise",
        flag_values=values,
    )
    flags.DEFINE_list(
        "variants",
        ["multi_head", "multi_query", "multi_head_local", "multi_query_local"],
        "of the config",
        flag_values=values,
    )
    flags.DEFINE_list("searches", ["greedy"], f"of {','.join(SEARCHES)}", flag_values=values)
    flags.DEFINE_list("dtypes", [], "by default the config's", flag_values=values)
    flags.DEFINE_list(
        "quantize",
        [],
        f"each of them with weights in eight bits: of {NONE},{','.join(SCHEMES)}",
        flag_values=values,
    )
    flags.DEFINE_list(
        "cache_dtype",
        [],
        f"each with keys and values in another dtype: of {NONE},{','.join(CACHE_DTYPES)}",
        flag_values=values,
    )
    flags.DEFINE_string(
        "memory",
        None,
        "such as 16GB, 80GiB, or device, for all that the device here has: tells the largest batch "
        "of each of the --variants, precisions and --context_lengths that fits, measures nothing",
        flag_values=values,
    )
    flags.DEFINE_list("batch_sizes", ["8"], "rows of a step", flag_values=values)
    flags.DEFINE_list(
        "context_lengths", ["128", "512"], "tokens of source and of target", flag_values=values
    )
    flags.DEFINE_integer("repeats", 5, "runs, of which the median counts", flag_values=values)
    flags.DEFINE_bool("wide", False, "all columns, not those that fit 80", flag_values=values)
    flags.DEFINE_enum("compare", None, ["paper"], "against these figures", flag_values=values)
    flags.DEFINE_string(
        "compile_only",
        None,
        "a TPU topology, such as v5e:2x2: compiles a step of each of the --variants, --dtypes, "
        "--batch_sizes and --context_lengths for it, tells, measures nothing",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "benchmark", True, "as decode.py asks for this command; needless here", flag_values=values
    )


def run(args: flags.FlagValues) -> int:
    """Returns the exit status: 130, as the shell has it, after an interrupt."""
    measuring = "output_dir quick searches repeats wide compare benchmark"
    refuse_idle(
        args,
        [
            (not args.compile_only, "with --compile_only", f"{measuring} memory"),
            (not args.memory, "with --memory", f"{measuring} batch_sizes"),
        ],
    )
    if (args.config is None) == (args.model is None):
        raise ValueError("give --config, such as --config=wmt14, or --model, a directory")
    refuse_idle(args, [(args.model is None, "with --model", "quick variants compare")])
    if args.config is not None and args.config.get("init_from"):
        raise ValueError("--config.init_from is for training: --model=DIR measures what is there")
    for name, value in QUICK.items() if args.quick else ():
        if not args[name].present:
            args[name].value = value
    if args.model is None:
        configs = {variant: variant_config(args, variant) for variant in args.variants}
    else:
        configs = pretrained_config(args)
    none = lambda names: [None if name == NONE else name for name in names]  # noqa: E731
    precisions = dict(
        dtypes=args.dtypes, schemes=none(args.quantize), cache_dtypes=none(args.cache_dtype)
    )
    context_lengths = integers(args, "context_lengths")
    if args.memory:
        tell_batches(configs, context_lengths, memory_of(args.memory), precisions)
        return 0
    sizes = dict(
        batch_sizes=integers(args, "batch_sizes"), context_lengths=context_lengths, **precisions
    )
    if args.compile_only:
        from mqa_jax.measure import compile_only

        return compile_only.decode(configs, args.compile_only, **sizes)
    if args.output_dir is None:
        raise ValueError("give --output_dir, where JSON and pictures go")
    check_integer("--repeats", args.repeats)
    if "fp8" in args.quantize:
        check_fp8("--quantize=fp8")
    if args.compare and getattr(configs.get("multi_head"), "task", None) != "translation":
        raise ValueError("--compare=paper needs a --config that translates, and multi_head")
    return measure(args, configs, sizes)


def measure(args: flags.FlagValues, configs: dict[str, ConfigDict], sizes: dict) -> int:
    """Measures all of it, prints and draws; returns the exit status."""
    from mqa_jax.measure import benchmark, plots, report
    from mqa_jax.model.config import TransformerConfig
    from mqa_jax.model.transformer import MODELS

    costs = benchmark.sweep(
        {
            variant: (MODELS[config.task], TransformerConfig(**config.model.to_dict()))
            for variant, config in configs.items()
        },
        searches=args.searches,
        repeats=args.repeats,
        **sizes,
    )
    output_dir = local_path("--output_dir", args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    about = {"model": model_name(args), **benchmark.describe()}
    path = output_dir / "benchmark.json"
    run = report.record(costs, about, path, probe=benchmark.probe_again)
    if run.costs:
        report.print_table(run, wide=args.wide)
        plots.draw(run.costs, run.about, output_dir, behind=run.probe_behind)
        if args.compare and any(cost.variant == "multi_head" for cost in run.costs):
            report.print_comparison(run)
    return 0 if run.is_complete else 130


def memory_of(text: str) -> float:
    """The bytes that --memory names.

    Raises:
      ValueError: it names none.
    """
    from mqa_jax.measure.roofline import memory_limit

    if text == "device":
        return memory_limit()
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MGT])(i?)B", text)
    if found is None or not float(found[1]):
        raise ValueError(f"--memory must be such as 16GB or 80GiB, or device, not {text!r}")
    return float(found[1]) * (1024 if found[3] else 1000) ** ("MGT".index(found[2]) + 2)


def tell_batches(
    configs: dict[str, ConfigDict], context_lengths: list[int], memory: float, precisions: dict
) -> None:
    """Prints how many rows of each model fit, and how many times those of the first."""
    from flax import nnx

    from mqa_jax.measure.roofline import in_precision, largest_batch, rows_of
    from mqa_jax.model.config import TransformerConfig
    from mqa_jax.model.transformer import MODELS

    sizes = {name: TransformerConfig(**config.model.to_dict()) for name, config in configs.items()}
    lines = [
        f"rows that fit into {memory / 1e9:.4g} GB, and how many times those of the first line",
        f"{'context':45}" + "".join(f"{length:>17,}" for length in context_lengths),
    ]
    first: list[int] = []
    for variant, precision in rows_of(sizes, **precisions):
        batches = []
        for length in context_lengths:
            config = in_precision(sizes[variant], precision, length)
            task = configs[variant].task
            model = nnx.eval_shape(lambda t=task, c=config: MODELS[t](c, rngs=nnx.Rngs(0)))
            batches.append(largest_batch(model, length, memory))
        first = first or batches
        cells = [
            f"{batch:,} ({batch / of:.3g})" if of else f"{batch:,}"
            for batch, of in zip(batches, first, strict=True)
        ]
        lines.append(f"{f'{variant}, {precision}':45}" + "".join(f"{cell:>17}" for cell in cells))
    print("\n".join(lines))


def integers(args: flags.FlagValues, name: str) -> list[int]:
    """The values of a flag that lists numbers."""
    try:
        numbers = [int(text) for text in getattr(args, name)]
    except ValueError:
        raise ValueError(f"--{name} takes whole numbers, not {getattr(args, name)}") from None
    return [check_integer(f"--{name}", number) for number in numbers]


def variant_config(args: flags.FlagValues, variant: str) -> ConfigDict:
    """Another variant of the file behind --config, with the same overrides."""
    file = config_flags.get_config_filename(args["config"]).partition(":")[0]
    return load_config(f"{file}:{variant}", config_flags.get_override_values(args["config"]))


def pretrained_config(args: flags.FlagValues) -> dict[str, ConfigDict]:
    """The model of --model, by the name of its directory."""
    require("hub", "--model")

    from mqa_jax.hub import read_config

    directory = local_path("--model", args.model)
    task, config = read_config(directory)
    fields = base_config().to_dict() | dict(task=task, model=dataclasses.asdict(config))
    return {directory.resolve().name: ConfigDict(fields)}


def model_name(args: flags.FlagValues) -> str:
    """The config's name, such as `wmt14`, and whether its model was changed beside it."""
    if args.model is not None:
        return local_path("--model", args.model).resolve().name
    file = config_flags.get_config_filename(args["config"]).partition(":")[0]
    changes = config_flags.get_override_values(args["config"])
    is_changed = any(name.startswith("model.") and name != "model.dtype" for name in changes)
    return f"{Path(file).stem} (changed)" if is_changed else Path(file).stem
