"""Gives a trained model fewer key/value heads:

    mqa-jax convert --workdir=RUN --output=DIR --num_kv_heads=1
    mqa-jax convert --model=HUB_DIRECTORY --output=DIR --num_kv_heads=1

What comes of a run decodes as a run (`mqa-jax decode --workdir=DIR`) and is trained further, for a
tenth of the run's steps say, by `mqa-jax train --config=uptrain:0.1:DIR`; what comes of a directory
of the hub is one, and trained further with --config.init_from=DIR. Heads, parameters and bytes of
the cache before and after are told on standard output; the feed-forward layers stay as they are.

    mqa-jax convert --workdir=RUN --num_kv_heads=1 --report --input=FILE [--reference=FILE]

also tells what the conversion costs in quality, before any further training, and buys in time.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from mqa_jax.cli.arguments import refuse_idle
from mqa_jax.cli.source import (
    Source,
    check_source,
    define_source,
    read_run,
    source_of,
    source_of_run,
)
from mqa_jax.convert import convert_heads, input_moments, kv_heads, wanted_kv_heads
from mqa_jax.convert.calibrate import batches_of
from mqa_jax.convert.merges import DEFAULT, MERGES, Random
from mqa_jax.core.checks import check_integer
from mqa_jax.core.extras import require
from mqa_jax.core.paths import local_path, new_directory
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.lines import LineDecoder
from mqa_jax.decode.search import greedy
from mqa_jax.model.transformer import MODELS, EncoderDecoder, Model, build_model

# What each part is called in the table, by its flag.
PARTS = {
    "num_kv_heads": "key/value heads, decoder",
    "cross_kv_heads": "key/value heads, cross-attention",
    "encoder_kv_heads": "key/value heads, encoder",
}
MOST_CONTEXT = 512  # Of the report, where --context does not say it.

# A row of the table: what it is, before, after.
Row = tuple[str, str, str]


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
    define_source(values, "converts it")
    string("output", None, "a new directory for the converted model")
    integer("num_kv_heads", None, "of the decoder's self-attention; 1 is multi-query")
    integer("encoder_kv_heads", None, "of the encoder; by default as many as it has")
    integer("cross_kv_heads", None, "of cross-attention; by default --num_kv_heads")
    flags.DEFINE_enum(
        "merge", DEFAULT, [*MERGES], "how the heads of a group become one", flag_values=values
    )
    integer("seed", 0, "for --merge=random")
    boolean("regroup", False, "merge the heads that are most alike, not those side by side")
    string(
        "calibrate",
        None,
        "a text, .gz perhaps: heads are merged by what they make of it (and, of a translation "
        "model, of what it translates it to), not by their weights alone",
    )
    boolean("report", False, "tell what it costs in quality and buys in time; needs --input")
    string("input", None, "for --report: a text, .gz perhaps")
    string("reference", None, "for --report: its lines translated, for a translation model")
    integer("batch_size", 8, "for --report and --calibrate: lines at once")
    integer(
        "context", None, f"for --report: tokens a step sees; at most {MOST_CONTEXT} if not given"
    )


def check(args: flags.FlagValues) -> Model:
    """Raises a ValueError, before any weight is read, for what cannot be done.

    Returns:
      the model that is to be converted, with shapes in place of weights.
    """
    check_source(args, "to convert")
    if args.output is None and not args.report:
        raise ValueError("give --output, a new directory, or --report, to see what it would be")
    if args.num_kv_heads is None:
        raise ValueError("give --num_kv_heads, such as --num_kv_heads=1")
    refuse_idle(
        args,
        [
            (args.merge == "random", "without --merge=random", "seed"),
            (args.report, "without --report", "input reference context"),
            (args.report or args.calibrate, "without --report or --calibrate", "batch_size"),
        ],
    )
    check_integer("--seed", args.seed, least=0)
    check_integer("--batch_size", args.batch_size, most=2**31 - 1)
    if args.output is not None:
        new_directory("--output", args.output)
    model = abstract_model(args)
    try:
        wanted = wanted_kv_heads(
            model, args.num_kv_heads, args.encoder_kv_heads, args.cross_kv_heads
        )
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    if wanted == kv_heads(model):
        raise ValueError(f"--num_kv_heads={args.num_kv_heads}: the model has these heads already")
    if args.report:
        check_report(args, model)
    return model


def check_report(args: flags.FlagValues, model: Model) -> None:
    """As `check`, of the flags of --report."""
    require("plot", "--report")
    if args.input is None:
        raise ValueError("--report needs --input, a text to see what becomes of")
    is_translation = isinstance(model, EncoderDecoder)
    if is_translation and args.reference is None:
        raise ValueError("--report of a translation model needs --reference, the lines translated")
    refuse_idle(args, [(is_translation, "for a language model", "reference")])
    most = model.config.max_length
    if args.context is None:
        args["context"].value = min(MOST_CONTEXT, most)
    check_integer("--context", args.context, least=2, most=most)


def run(args: flags.FlagValues) -> None:
    """Converts, tells, and writes."""
    check(args)

    from mqa_jax.data.text import read_lines

    texts = {
        name: read_lines(local_path(f"--{name}", path))
        for name in ("calibrate", "input", "reference")
        if (path := args[name].value) is not None
    }
    if args.reference is not None and len(texts["reference"]) != len(texts["input"]):
        raise ValueError(
            f"--reference has {len(texts['reference'])} lines, --input {len(texts['input'])}"
        )
    needs_text = bool(texts)
    if args.model is None:
        origin, source = load_run(args)
    else:
        origin, source = load_hub(args, needs_text)
    model = source.model
    moments = None
    if args.calibrate is not None:
        moments = moments_of(source, texts["calibrate"], args.batch_size)
    narrow = convert_heads(
        model,
        args.num_kv_heads,
        encoder_kv_heads=args.encoder_kv_heads,
        cross_kv_heads=args.cross_kv_heads,
        merge=Random(args.seed) if args.merge == "random" else MERGES[args.merge](),
        moments=moments,
        regroup=args.regroup,
    )
    how = ", calibrated" * (args.calibrate is not None) + ", regrouped" * args.regroup
    notes = [f"merge: {args.merge}{how}", f"d_ff stays {model.config.d_ff}"]
    rows = rows_of_sizes(model, narrow)
    if args.report:
        after = dataclasses.replace(source, model=narrow, params=nnx.state(narrow))
        reported, signature = report(args, source, after, texts["input"], texts.get("reference"))
        rows, notes = rows + reported, notes + signature
    print_table(rows)
    print("\n".join(notes))
    if args.output is not None:
        save(args, origin, narrow, kv_heads(model))


def abstract_model(args: flags.FlagValues) -> Model:
    """The model that is to be converted, without its weights."""
    if args.model is None:
        from mqa_jax.train.workdir import load_config

        config = load_config(local_path("--workdir", args.workdir))
        task, fields = config.task, config.model.to_dict()
        return nnx.eval_shape(lambda: build_model(task, fields, rngs=nnx.Rngs(0)))
    require("hub", "--model")

    from mqa_jax.hub import read_config

    task, sizes = read_config(
        local_path("--model", args.model), dtype=args.dtype, max_length=args.max_length
    )
    return nnx.eval_shape(lambda: MODELS[task](sizes, rngs=nnx.Rngs(0)))


def load_run(args: flags.FlagValues) -> tuple[Any, Source]:
    """The `Run` of --workdir."""
    run = read_run(args)
    model = nnx.merge(nnx.graphdef(run.model), run.params)
    return run, dataclasses.replace(source_of_run(run), model=model)


def load_hub(args: flags.FlagValues, needs_text: bool) -> tuple[Any, Source]:
    """The `Pretrained` of --model; a tokenizer it must have if it `needs_text`."""
    from mqa_jax import hub

    directory = local_path("--model", args.model)
    pretrained = hub.load(directory, dtype=args.dtype, max_length=args.max_length)
    if needs_text:
        return pretrained, source_of(pretrained, directory)
    none: Any = None
    params = nnx.state(pretrained.model)
    return pretrained, Source(pretrained.model, params, none, bos_id=0, eos_ids=())


def save(args: flags.FlagValues, origin: Any, narrow: Model, had: dict[str, int]) -> None:
    """Writes the converted model in the way of what it was made of."""
    if args.model is not None:
        from mqa_jax import hub

        # The same function, under the name that transformers knows it by.
        is_one = origin.family == "gpt2" and narrow.config.num_kv_heads == 1
        family = "gpt_bigcode" if is_one else origin.family
        hub.save(args.output, dataclasses.replace(origin, model=narrow), family=family)
        return
    from mqa_jax.train.converted import save_converted

    record = {
        "from": Path(args.workdir).resolve().name,
        "merge": args.merge,
        "calibrated": args.calibrate is not None,
        "regrouped": args.regroup,
        "kv_heads": {"before": had, "after": kv_heads(narrow)},
    }
    save_converted(args.output, origin, narrow, record)


def decoder_of(source: Source, batch_size: int) -> LineDecoder:
    """What decodes greedily."""
    eos_ids = source.eos_ids or None
    return LineDecoder(
        source.model,
        source.tokenizer,
        search=functools.partial(greedy, eos_id=eos_ids, rules=source.rules),
        batch_size=batch_size,
        bos_id=source.bos_id,
        has_bos=source.has_bos,
        eos_ids=source.eos_ids,
    )


def texts_of(source: Source, lines: list[str]) -> list[list[int]]:
    """Lines as a language model reads them, or as sources."""
    is_translation = isinstance(source.model, EncoderDecoder)
    begin = [source.bos_id] * (source.has_bos and not is_translation)
    return [[*begin, *source.tokenizer.encode(line)] for line in lines]


def moments_of(source: Source, lines: list[str], batch_size: int) -> dict[str, np.ndarray]:
    """Of a text as the model reads it: a translation model also reads its own translations."""
    lines = [line for line in lines if line.strip()]
    answers: list[list[int]] | None = None
    if isinstance(source.model, EncoderDecoder):
        answers = [[] for _ in lines]
        for i, decoded in decoder_of(source, batch_size)(source.params, lines):
            answers[i] = decoded.tokens[: int(decoded.length)].tolist()
    batches = batches_of(
        source.model,
        texts_of(source, lines),
        answers,
        bos_id=source.bos_id,
        batch_size=batch_size,
    )
    return input_moments(source.model, batches)


def rows_of_sizes(before: Model, after: Model) -> list[Row]:
    """Heads, parameters, and what a token takes in the caches."""

    def rows(model: Model) -> dict[str, int]:
        heads, config = kv_heads(model), model.config
        a_head = 2 * config.num_layers * config.head_dim * jnp.dtype(config.dtype).itemsize
        found = {name: heads[part] for part, name in PARTS.items() if part in heads}
        found["parameters"] = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        found["cache, bytes a token"] = a_head * heads["num_kv_heads"]
        if "cross_kv_heads" in heads:
            found["cache, bytes a source token"] = a_head * heads["cross_kv_heads"]
        return found

    was, now = rows(before), rows(after)
    return [(name, f"{was[name]:,}", f"{now[name]:,}") for name in was]


def report(
    args: flags.FlagValues,
    before: Source,
    after: Source,
    lines: list[str],
    references: list[str] | None,
) -> tuple[list[Row], list[str]]:
    """Rows of quality and of cost, and what is to be said below them."""
    from mqa_jax.measure.benchmark import step_milliseconds
    from mqa_jax.measure.roofline import abstract_caches, kv_bytes
    from mqa_jax.train.metrics import bleu, exact_match

    check_lengths(args.input, before, lines, args.reference, references)
    notes, columns = [], []
    sources, sizes = (before, after), (args.batch_size, args.context)
    times = step_milliseconds([source.model for source in sources], *sizes)
    for source, step_ms in zip(sources, times, strict=True):
        decoder = decoder_of(source, args.batch_size)
        loss = loss_of(source, decoder, lines, references)
        column = {"loss, nats a token": f"{loss:.4f}", "perplexity": f"{math.exp(loss):.4g}"}
        if references is not None:
            outputs = list(decoder.texts(source.params, lines))
            score, signature = bleu(outputs, references)
            match = 100 * exact_match(outputs, references)
            column |= {"BLEU, greedy": f"{score:.2f}", "exact match": f"{match:.1f} %"}
            notes = [f"BLEU: {signature}"]
        column["a decode step, ms"] = f"{step_ms:.3g}"
        column["its caches, bytes"] = f"{kv_bytes(abstract_caches(source.model, *sizes)):,}"
        columns.append(column)
    notes.append(f"a decode step: {args.batch_size} rows behind {args.context} tokens each")
    return [(name, was, columns[1][name]) for name, was in columns[0].items()], notes


def check_lengths(
    file: str,
    source: Source,
    lines: list[str],
    reference: str | None,
    references: list[str] | None,
) -> None:
    """Raises a ValueError, before anything is measured, for lines that there is no room for."""
    most = source.model.config.max_length
    texts = [(file, texts_of(source, lines))]
    if reference is not None and references is not None:
        texts.append((reference, [source.tokenizer.encode_target(x) for x in references]))
    for file, rows in texts:
        if long := [(i, len(ids)) for i, ids in enumerate(rows, start=1) if len(ids) > most]:
            more = f" (and {len(long) - 1} more lines are too long)" if long[1:] else ""
            raise ValueError(
                f"{file}, line {long[0][0]} has {long[0][1]} tokens, and the model knows {most} "
                f"positions{more}: shorten or split what is too long"
            )


def loss_of(
    source: Source, decoder: LineDecoder, lines: list[str], references: list[str] | None
) -> float:
    """Of translations that of the references, of a language model that of the lines."""
    if references is not None:
        scores = list(decoder.score(source.params, lines, references))
    else:
        texts = [ids for ids in texts_of(source, lines) if len(ids) > 1]
        given, rest = [ids[:1] for ids in texts], [ids[1:] for ids in texts]
        scores = list(Generator.score(decoder, source.params, given, rest, name="line {}".format))
    if not scores:
        raise ValueError("--input has no line to score")
    tokens = np.concatenate([tokens for _, tokens in scores])
    return float(-np.mean(tokens, dtype=np.float64))


def print_table(rows: list[Row]) -> None:
    """In less than 80 columns."""
    for name, before, after in [("", "before", "after"), *rows]:
        print(f"{name:34}{before:>16}{after:>16}")
