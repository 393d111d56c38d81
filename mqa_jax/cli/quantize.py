"""Gives a trained model weights and caches of eight bits, and tells what that costs in quality:

    mqa-jax quantize --workdir=RUN --output=DIR --text=FILE [--reference=FILE]
    mqa-jax quantize --model=HUB_DIRECTORY --output=DIR --text=FILE --cache_dtype=int8

What comes of a run decodes as a run, what comes of a directory of the hub as one, though only here:
others do not know how it is written. Told on standard output is how far predictions of the text are
from those before, by what is in eight bits; a translation model's are of the reference.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

from mqa_jax.cli.arguments import NONE, refuse_idle
from mqa_jax.cli.convert import (
    abstract_model,
    check_lengths,
    decoder_of,
    load_hub,
    load_run,
    texts_of,
)
from mqa_jax.cli.source import Source, check_source, define_quantize, define_source
from mqa_jax.convert import quantize
from mqa_jax.core.checks import check_integer
from mqa_jax.core.paths import local_path, new_directory
from mqa_jax.decode.divergence import Divergence, divergences
from mqa_jax.model.transformer import EncoderDecoder, Model


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    define_source(values, "quantizes it")
    define_quantize(values, default="int8")
    string("output", None, "a new directory for the quantized model")
    string("text", None, "a text, .gz perhaps, to compare predictions on")
    string("reference", None, "its lines translated, for a translation model")
    flags.DEFINE_bool(
        "by_layer", False, "tell, too, what each layer's weights do alone", flag_values=values
    )
    flags.DEFINE_integer("batch_size", 8, "lines at once", flag_values=values)


def check(args: flags.FlagValues) -> None:
    """Raises a ValueError, before any weight is read, for what cannot be done."""
    check_source(args, "to quantize")
    if args.output is None and args.text is None:
        raise ValueError("give --output, a new directory, or --text, to see what it would cost")
    if args.quantize == NONE:
        if args.cache_dtype is None:
            raise ValueError("--quantize=none without --cache_dtype: there is nothing to do")
        if args.output is not None:
            raise ValueError(
                "--quantize=none leaves the model as it is: leave out --output, and give "
                "--cache_dtype to mqa-jax decode"
            )
    refuse_idle(
        args,
        [
            (args.text, "without --text", "reference batch_size by_layer"),
            (args.quantize != NONE, "with --quantize=none", "by_layer"),
        ],
    )
    check_integer("--batch_size", args.batch_size, most=2**31 - 1)
    if args.output is not None:
        new_directory("--output", args.output)
    model = abstract_model(args)
    if model.config.quantized is not None:
        raise ValueError(
            f"the model is quantized already ({model.config.quantized}): quantize the one that it "
            "was made of"
        )
    is_translation = isinstance(model, EncoderDecoder)
    if args.text is not None and is_translation and args.reference is None:
        raise ValueError("--text of a translation model needs --reference, its lines translated")
    refuse_idle(args, [(is_translation, "for a language model", "reference")])


def run(args: flags.FlagValues) -> None:
    """Quantizes, tells, and writes."""
    check(args)

    from mqa_jax.data.text import read_lines

    texts = {
        name: read_lines(local_path(f"--{name}", path))
        for name in ("text", "reference")
        if (path := args[name].value) is not None
    }
    if args.reference is not None and len(texts["reference"]) != len(texts["text"]):
        raise ValueError(
            f"--reference has {len(texts['reference'])} lines, --text {len(texts['text'])}"
        )
    origin, source = load_run(args) if args.model is None else load_hub(args, bool(texts))
    models = made_of(args, source.model)
    if texts:
        tell(args, source, models, texts["text"], texts.get("reference"))
    if args.output is not None:
        save(args, origin, [*models.values()][-1])


def made_of(args: flags.FlagValues, model: Model) -> dict[str, Model]:
    """What is told of, by name; the first is the model itself, the last is all that is wanted."""
    scheme = None if args.quantize == NONE else args.quantize
    models = {model.config.dtype: model}
    if scheme is not None:
        models["weights"] = quantize(model, scheme)
    if args.cache_dtype is not None:
        models["caches"] = quantize(model, None, cache_dtype=args.cache_dtype)
    if len(models) == 3:
        models["both"] = quantize(model, scheme, cache_dtype=args.cache_dtype)
    return models


def layer_by_layer(args: flags.FlagValues, model: Model) -> dict[str, Model]:
    """The model with one part in eight bits, by the part's name; it is the first."""
    whole = quantize(model, args.quantize)
    models = {"": model}
    for name in ("embedding", "softmax"):
        if getattr(model, name) is not None:
            part = nnx.clone(model)
            setattr(part, name, getattr(whole, name))
            models[name] = part
    for name, layers in (
        ("encoder", lambda m: getattr(m, "encoder_layers", [])),
        ("decoder", lambda m: m.decoder.layers),
    ):
        for i in range(len(layers(model))):
            part = nnx.clone(model)
            layers(part)[i] = layers(whole)[i]
            models[f"{name} layer {i}"] = part
    return models


def tell(
    args: flags.FlagValues,
    source: Source,
    models: dict[str, Model],
    lines: list[str],
    references: list[str] | None,
) -> None:
    """The table, and with --by_layer another."""
    check_lengths(args.text, source, lines, args.reference, references)
    ids = texts_of(source, lines)
    if references is not None:
        answers = [source.tokenizer.encode_target(line) for line in references]
    else:
        texts = [row for row in ids if len(row) > 1]
        ids, answers = [row[:1] for row in texts], [row[1:] for row in texts]

    def compare(models: dict[str, Model]) -> list[Divergence]:
        return divergences(
            [*models.values()],
            ids,
            answers,
            bos_id=source.bos_id,
            batch_size=args.batch_size,
            name="line {}".format,
        )

    found = compare(models)
    rows = [
        ("weights, bytes", [f"{bytes_of(model):,}" for model in models.values()]),
        ("caches, bytes a token", [f"{bytes_a_token(model):,}" for model in models.values()]),
        ("KL divergence, nats a token", [f"{one.nats:.3g}" for one in found]),
        ("top-1 agreement", [f"{100 * one.agreement:.2f} %" for one in found]),
        ("loss, nats a token", [f"{one.loss:.4f}" for one in found]),
        ("perplexity", [f"{one.perplexity:.4g}" for one in found]),
    ]
    notes = [f"{found[0].tokens:,} tokens"]
    if references is not None:
        told, note = bleu_of(args, source, models, lines, references)
        rows, notes = rows + told, [*notes, note]
    print_columns([*models], rows)
    print("\n".join(notes))
    if args.by_layer:
        parts = layer_by_layer(args, source.model)
        print()
        for name, one in [*zip(parts, compare(parts), strict=True)][1:]:
            print(f"{name + ' alone, nats a token':34}{one.nats:>12.3g}")


def bytes_of(model: Model) -> int:
    """Of all weights."""
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


def bytes_a_token(model: Model) -> int:
    """That one more token takes in the caches of all decoder layers."""

    def size(length: int) -> int:
        caches = jax.eval_shape(lambda: model.init_cache(1, length))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))

    return size(2) - size(1)


def bleu_of(
    args: flags.FlagValues,
    source: Source,
    models: dict[str, Model],
    lines: list[str],
    references: list[str],
) -> tuple[list[tuple[str, list[str]]], str]:
    """Rows of BLEU, greedy, and whether a difference to the first is by chance."""
    import sacrebleu
    from sacrebleu.significance import PairedTest

    systems: list[tuple[str, Sequence[str]]] = []
    for name, model in models.items():
        own = dataclasses.replace(source, model=model, params=nnx.state(model))
        systems.append((name, [*decoder_of(own, args.batch_size).texts(own.params, lines)]))
    metric = sacrebleu.BLEU(references=[references])
    test = PairedTest(systems, {"BLEU": metric}, references=None, test_type="bs", n_samples=1000)
    signatures, scores = test()
    found: Any = scores["BLEU"]
    # Of equal outputs the bootstrap finds no sample that differs as little.
    chances = [
        1.0 if outputs == systems[0][1] else one.p_value
        for (_, outputs), one in zip(systems, found, strict=True)
    ]
    rows = [
        ("BLEU, greedy", [f"{one.score:.2f}" for one in found]),
        ("p of its difference", ["", *(f"{chance:.3f}" for chance in chances[1:])]),
    ]
    return rows, f"BLEU: {signatures['BLEU']}, paired bootstrap"


def print_columns(names: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """In less than 90 columns."""
    for name, cells in [("", names), *rows]:
        print(f"{name:30}" + "".join(f"{cell:>14}" for cell in cells))


def save(args: flags.FlagValues, origin: Any, model: Model) -> None:
    """Writes the quantized model in the way of what it was made of."""
    if args.model is not None:
        from mqa_jax import hub

        hub.save(args.output, dataclasses.replace(origin, model=model))
        return
    from mqa_jax.train.converted import save_converted

    record = {"from": Path(args.workdir).resolve().name}
    save_converted(args.output, origin, model, record)
