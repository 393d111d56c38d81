"""Tells how good a trained model is, on its own data or on any text:

    mqa-jax evaluate --workdir=DIR --split=test
    mqa-jax evaluate --workdir=DIR|--model=DIR --input=FILE [--reference=FILE]

Loss, perplexity and accuracy are of the tokens, the end of each line among them. A language model's
perplexity is told by the word as well, as papers have it: the words are what blanks are between,
and one end a line. A translation, of which --reference has the right lines, has BLEU, chrF and the
share of lines that match exactly, of what is decoded as the flags say.

All devices of this machine are used. Pairs with a blank line are not counted in the loss.
"""

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mqa_jax.cli.arguments import refuse_idle
from mqa_jax.cli.searching import (
    BEAM_FLAGS,
    build_search,
    check_beams,
    check_search,
    define_search,
)
from mqa_jax.cli.source import Source, check_source, define_quantize, define_source, load_source
from mqa_jax.core.extras import require
from mqa_jax.core.paths import check_place, local_path, write_whole
from mqa_jax.core.sharding import ShardingRules, make_mesh
from mqa_jax.data.tokenizer import RowTokenizer
from mqa_jax.decode.lines import LineDecoder

DECODING_FLAGS = (
    f"max_new_tokens beam_size {BEAM_FLAGS} repetition_penalty no_repeat_ngram min_new_tokens"
)


class Text(NamedTuple):
    """What is evaluated.

    Attributes:
      sources: lines of a translation; None for a language model.
      targets: the right lines.
      batches: of rows of both, for the loss.
    """

    sources: list[str] | None
    targets: list[str]
    batches: Any


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_source(values, "evaluates it")
    define_quantize(values)
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    flags.DEFINE_enum(
        "split",
        None,
        ["validation", "test"],
        "for --workdir: of the data that the run was trained on",
        flag_values=values,
    )
    string("data_dir", None, "for --split: where that data lies now, if not where it did")
    string("input", None, "a text, .gz perhaps, in place of --split")
    string("reference", None, "for --input of a translation: the right lines")
    string("output", None, "a JSON file for the figures, besides standard output")
    define_search(values)


def check(args: flags.FlagValues) -> None:
    """Raises a ValueError, before anything is loaded, for flags that make no sense."""
    check_source(args, "to evaluate")
    if (args.split is None) == (args.input is None):
        raise ValueError("give --split, of the run's data, or --input, a text: one of them")
    refuse_idle(
        args,
        [
            (args.workdir, "without --workdir", "split"),
            (args.split, "without --split", "data_dir"),
            (args.input, "without --input", "reference"),
        ],
    )
    check_search(args)
    if args.model is None or args["beam_size"].present:
        check_beams(args)  # Else the directory may ask for some.
    if args.output is not None:
        _check_output(args, local_path("--output", args.output))


def _check_output(args: flags.FlagValues, path: Path) -> None:
    """Raises a ValueError for a file that is an input too, or that could not be written."""
    if not path.parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no directory {path.parent}")
    check_place("--output", path)
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"--output {args.output} is there, and is no file: give another")
    for name in ("input", "reference"):
        if (value := args[name].value) is None:
            continue
        text = local_path(f"--{name}", value)
        if text.exists() and path.samefile(text):
            raise ValueError(f"--output {args.output} is the --{name} too: give another one")


def run(args: flags.FlagValues) -> None:
    """Evaluates, and tells the figures."""
    check(args)
    is_translation = _task(args) == "translation"
    what = "for a language model, which is not decoded"
    refuse_idle(args, [(is_translation, what, f"reference {DECODING_FLAGS}")])
    if is_translation and args.input is not None and args.reference is None:
        raise ValueError("a translation is evaluated by the right lines: give --reference")
    mesh = make_mesh(devices=jax.local_devices())
    # As many rows on each device.
    batch_size = args.batch_size + -args.batch_size % mesh.size
    lines = None if args.input is None else _read(args)
    source = load_source(args)
    check_beams(args)
    tokenizer = _row_tokenizer(args, source)
    if lines is None:
        text = _of_split(args, is_translation, batch_size)
    else:
        files = [file for file in (args.input, args.reference) if file is not None]
        text = _of_files(files, lines, tokenizer, source.model.config.max_length, batch_size)
    params = jax.device_put(source.params, NamedSharding(mesh, PartitionSpec()))
    figures = _of_tokens(source, tokenizer, params, mesh, text)
    if text.sources is not None:
        figures |= _of_translations(args, source, params, mesh, text.sources, text.targets)
    _tell(figures)
    if args.output is not None:
        # What a link leads to is replaced, not the link.
        path = local_path("--output", args.output).resolve()
        write_whole(path, json.dumps(figures, indent=2) + "\n")


def _task(args: flags.FlagValues) -> str:
    """What the model is for; no weight is read."""
    if args.workdir is not None:
        from mqa_jax.train.workdir import load_config

        return str(load_config(local_path("--workdir", args.workdir)).task)
    require("hub", "--model")

    from mqa_jax.hub import read_config

    return read_config(local_path("--model", args.model))[0]


def _row_tokenizer(args: flags.FlagValues, source: Source) -> RowTokenizer:
    if args.workdir is not None:
        return source.tokenizer  # type: ignore[return-value]  # Which a run's is.

    from mqa_jax.hub.row_tokenizer import HubRowTokenizer

    return HubRowTokenizer.of(local_path("--model", args.model))


def _read(args: flags.FlagValues) -> tuple[list[str] | None, list[str]]:
    """Sources, None for a language model, and targets."""
    from mqa_jax.data.text import read_lines

    lines = read_lines(local_path("--input", args.input))
    sources, targets = None, lines
    if args.reference is not None:
        sources, targets = lines, read_lines(local_path("--reference", args.reference))
        if len(sources) != len(targets):
            raise ValueError(
                f"{args.reference} has {len(targets)} lines, {args.input} has {len(sources)}"
            )
    if not any(line.strip() for line in targets):
        raise ValueError(f"{args.reference or args.input} has no line that is not blank")
    return sources, targets


def _of_files(
    files: list[str],
    lines: tuple[list[str] | None, list[str]],
    tokenizer: RowTokenizer,
    max_length: int,
    batch_size: int,
) -> Text:
    from mqa_jax.data.in_memory import text_batches

    sources, targets = lines
    kept = [
        i
        for i, target in enumerate(targets)
        if target.strip() and (sources is None or sources[i].strip())
    ]
    if blank := len(targets) - len(kept):
        print(
            f"{blank} of {len(targets)} lines are blank, and no part of the loss", file=sys.stderr
        )
    batches = text_batches(
        tokenizer,
        None if sources is None else [sources[i] for i in kept],
        [targets[i] for i in kept],
        max_length=max_length,
        batch_size=batch_size,
        name=lambda number, is_source: (
            f"{files[0] if is_source else files[-1]}, line {kept[number - 1] + 1}"
        ),
    )
    return Text(sources, targets, batches)


def _of_split(args: flags.FlagValues, is_translation: bool, batch_size: int) -> Text:
    from mqa_jax.data import loader
    from mqa_jax.data.manifest import records_path, text_path
    from mqa_jax.data.text import read_lines
    from mqa_jax.train.workdir import data_of_run, load_config

    workdir = local_path("--workdir", args.workdir)
    data, manifest = data_of_run(workdir, args.data_dir)
    manifest.split(args.split)
    config = load_config(workdir).data
    sides = [side for side in (config.source, config.target) if side]
    files = [records_path(data, args.split), *(text_path(data, args.split, x) for x in sides)]
    manifest.check_files(data, *(file.name for file in files))
    *sources, targets = [read_lines(file) for file in files[1:]]
    batches = loader.eval_batches(data, args.split, batch_size=batch_size, manifest=manifest)
    return Text(sources[0] if is_translation else None, targets, batches)


def _of_tokens(
    source: Source, tokenizer: RowTokenizer, params: Any, mesh: Mesh, text: Text
) -> dict[str, Any]:
    from mqa_jax.train.evaluate import add_up, sums_of
    from mqa_jax.train.loss import mean_metrics
    from mqa_jax.train.step import make_eval_step

    eval_step = make_eval_step(source.model, mesh, ids=tokenizer.ids)
    total = add_up(sums_of(eval_step, params, mesh, text.batches))
    figures = {name: float(value) for name, value in mean_metrics(total).items()}
    if not math.isfinite(figures["loss"]):
        raise RuntimeError(f"the loss is {figures['loss']}: the weights are of no use")
    figures |= dict(tokens=int(total["tokens"]), perplexity=float(np.exp(figures["ln_perplexity"])))
    if text.sources is None:
        lines = [line for line in text.targets if line.strip()]
        words = sum(len(line.split()) + 1 for line in lines)
        by_word = float(np.exp(total["nll"] / words))
        figures |= dict(words=words, perplexity_per_word=by_word)
    return figures


def _of_translations(
    args: flags.FlagValues,
    source: Source,
    params: Any,
    mesh: Mesh,
    sources: list[str],
    references: list[str],
) -> dict[str, Any]:
    from mqa_jax.train.evaluate import translate, translation_figures

    size = min(args.batch_size, len(sources))
    decoder = LineDecoder(
        source.model,
        source.tokenizer,
        search=build_search(args, source),
        batch_size=size + -size % mesh.size,
        bos_id=source.bos_id,
        has_bos=source.has_bos,
        eos_ids=source.eos_ids,
        max_new_tokens=args.max_new_tokens,
        rows=NamedSharding(mesh, PartitionSpec(ShardingRules().B)),
    )
    figures, signatures = translation_figures(translate(decoder, params, sources), references)
    return figures | {"signatures": signatures}


def _tell(figures: dict[str, Any]) -> None:
    """On standard output, a line each."""
    print(f"loss {figures['loss']:.4f}")
    print(f"perplexity {figures['perplexity']:.4f} a token, of {figures['tokens']:,}")
    if "words" in figures:
        print(f"perplexity {figures['perplexity_per_word']:.4f} a word, of {figures['words']:,}")
    print(f"accuracy {100 * figures['accuracy']:.2f} %")
    if "bleu" in figures:
        for name, shown in (("bleu", "BLEU"), ("chrf", "chrF")):
            print(f"{shown} {figures[name]:.2f}  ({figures['signatures'][name]})")
        print(f"exact match {100 * figures['exact_match']:.1f} %")
