"""What a command works with: the model of a run, --workdir, or one of the hub, --model."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from absl import flags
from flax import nnx

from mqa_jax.cli.arguments import NONE, check_fp8, define_model, refuse_idle
from mqa_jax.cli.pretrained import rules_of, take_defaults
from mqa_jax.convert import quantize
from mqa_jax.core.checks import check_integer
from mqa_jax.core.extras import require
from mqa_jax.core.paths import local_path
from mqa_jax.core.quantized import CACHE_DTYPES, SCHEMES
from mqa_jax.decode.history import Rule
from mqa_jax.decode.lines import Tokenizer
from mqa_jax.decode.rules import only_text
from mqa_jax.model.transformer import Model

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Source:
    """What lines are decoded with.

    Attributes:
      model: its structure.
      params: its weights.
      tokenizer: of its text.
      bos_id: what a target begins with, and, where `has_bos`, a language model's prompt.
      eos_ids: what ends a text.
      has_bos: as for `LineDecoder`.
      rules: on logits, that the model asks for.
    """

    model: Model
    params: Any
    tokenizer: Tokenizer
    bos_id: int
    eos_ids: tuple[int, ...]
    has_bos: bool = True
    rules: tuple[Rule, ...] = ()


def define_run(values: flags.FlagValues) -> None:
    """The flags of a run's weights."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    string("workdir", None, "the --workdir of a training run")
    string(
        "step",
        None,
        "for --workdir: that of the checkpoint, or best, as --config.train.best has it; else the "
        "newest one that is whole",
    )
    flags.DEFINE_integer(
        "average",
        1,
        "for --workdir: the mean of the weights of so many checkpoints, the newest, or those up to "
        "--step",
        flag_values=values,
    )


def define_source(values: flags.FlagValues, what_for: str) -> None:
    """The flags of either model, and of its weights."""
    define_run(values)
    define_model(values, what_for)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "for --model", flag_values=values)
    flags.DEFINE_integer(
        "max_length",
        None,
        "for --model: positions, in place of its own; a T5 has 512 else",
        flag_values=values,
    )


def define_quantize(values: flags.FlagValues, default: str = NONE) -> None:
    """The flag of the precision that a command decodes in."""
    flags.DEFINE_enum(
        "quantize",
        default,
        [NONE, *SCHEMES],
        "weights in eight bits: int8, and what is multiplied with them rounded as well; "
        "int8_weights, and it is not; fp8, as int8, for devices that multiply it",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "cache_dtype",
        None,
        CACHE_DTYPES,
        "of keys and values in the caches, int8 and fp8 with a scale for each token and head; by "
        "default that of the activations",
        flag_values=values,
    )


def check_source(args: flags.FlagValues, what_for: str) -> None:
    """Raises a ValueError for flags of `define_source` that do not go together.

    Args:
      what_for: what the model is asked for, in the error that there is none.
    """
    if args.workdir is not None and args.model is not None:
        raise ValueError("--workdir, of a run, and --model, of the hub, exclude each other")
    if args.workdir is None and args.model is None:
        raise ValueError(f"give --workdir, of a training run, or --model, of the hub, {what_for}")
    refuse_idle(
        args,
        [
            (args.model, "without --model", "dtype max_length"),
            (args.workdir, "without --workdir", "step average"),
        ],
    )
    if args.max_length is not None:
        check_integer("--max_length", args.max_length, most=2**31 - 1)
    if "quantize" in args and args.quantize == "fp8":
        check_fp8("--quantize=fp8")
    check_run(args)


def check_run(args: flags.FlagValues) -> None:
    """Raises a ValueError for values of the flags of `define_run` that there cannot be."""
    check_integer("--average", args.average)
    step_of(args)


def step_of(args: flags.FlagValues) -> int | str | None:
    """As `mqa_jax.train.workdir.load_run` takes it.

    Raises:
      ValueError: --step is neither a number nor best.
    """
    if args.step is None or args.step == "best":
        return args.step
    if not (args.step.isascii() and args.step.isdigit()):
        raise ValueError(f"--step must be the number of a step, or best, not {args.step!r}")
    return int(args.step)


def load_source(args: flags.FlagValues) -> Source:
    """The model that the flags name, those of `define_quantize` among them. Flags of the search
    that are not given become what its directory says.

    Raises:
      ValueError: as `mqa_jax.train.workdir.load_run` or `mqa_jax.hub.load`, or a model of the hub
        has no tokenizer; or its weights are in eight bits already.
    """
    source = _load_run(args) if args.model is None else _load_pretrained(args)
    if source.model.config.quantized == "fp8":
        check_fp8(f"{args.workdir or args.model} has weights in fp8")
    scheme = None if args.quantize == NONE else args.quantize
    if scheme is None and args.cache_dtype is None:
        return source
    model = nnx.merge(nnx.graphdef(source.model), source.params)
    try:
        model = quantize(model, scheme, cache_dtype=args.cache_dtype)
    except ValueError as error:
        raise ValueError(f"--quantize={args.quantize}: {error}") from None
    return dataclasses.replace(source, model=model, params=nnx.state(model))


def read_run(args: flags.FlagValues) -> Any:
    """The `mqa_jax.train.workdir.Run` that the flags name; whose weights it has is told where they
    leave it open."""
    from mqa_jax.train import workdir as workdirs

    workdir = local_path("--workdir", args.workdir)
    run = workdirs.load_run(workdir, step=step_of(args), average=args.average)
    if args.average > 1:
        told = f"weights: the mean of {args.average} checkpoints up to that of step {run.step}"
        print(told, file=sys.stderr)
    elif args.step == "best":
        print(f"weights: the best checkpoint, of step {run.step}", file=sys.stderr)
    return run


def _load_run(args: flags.FlagValues) -> Source:
    run, workdir = read_run(args), local_path("--workdir", args.workdir)
    if (generation := getattr(run.tokenizer, "generation", None)) is not None:
        take_defaults(args, generation, workdir)
    return source_of_run(run)


def source_of_run(run: Any) -> Source:
    """A run that `mqa_jax.train.workdir.load_run` has read; one that began from a directory of the
    hub decodes as that does."""
    tokenizer = run.tokenizer
    ids = tokenizer.ids
    eos_ids: tuple[int, ...] = (ids.eos,)
    rules: tuple[Rule, ...] = ()
    if (generation := getattr(tokenizer, "generation", None)) is not None:
        rules = rules_of(generation)
        eos_ids = generation.eos_ids or eos_ids
    return Source(
        run.model,
        run.params,
        tokenizer,
        bos_id=0 if ids.bos is None else ids.bos,
        eos_ids=eos_ids,
        has_bos=ids.bos is not None,
        rules=(*rules, *only_text(tokenizer.vocab_size, run.model.config.vocab_size, eos_ids)),
    )


def _load_pretrained(args: flags.FlagValues) -> Source:
    require("hub", "--model")

    from mqa_jax import hub

    directory = local_path("--model", args.model)
    pretrained = hub.load(directory, dtype=args.dtype, max_length=args.max_length)
    source = source_of(pretrained, directory)
    take_defaults(args, pretrained.generation, directory)
    return source


def source_of(pretrained: Any, directory: Path) -> Source:
    """A model that `mqa_jax.hub.load` has read.

    Raises:
      ValueError: it has no tokenizer.
    """
    if pretrained.tokenizer is None:
        raise ValueError(
            f"{directory} has no tokenizer that can be read: tokenizer.json, tokenizer.model, "
            "spiece.model, or source.spm, target.spm and vocab.json of a Marian"
        )
    generation, tokenizer = pretrained.generation, pretrained.tokenizer
    start = generation.decoder_start_id
    return Source(
        pretrained.model,
        nnx.state(pretrained.model),
        tokenizer,
        bos_id=0 if start is None else start,
        eos_ids=generation.eos_ids or tokenizer.end_ids,
        has_bos=False,
        rules=(
            *rules_of(generation),
            *only_text(
                tokenizer.vocab_size, pretrained.model.config.vocab_size, generation.eos_ids
            ),
        ),
    )
