"""Decodes the lines of a text with a trained model:

    mqa-jax decode --workdir=DIR --input=FILE --output=FILE [--beam_size=4] [--reference=FILE]
    mqa-jax decode --model=DIR --input=FILE --output=FILE

With --model it is one that was downloaded from the Hugging Face hub. What its directory says of
beams, penalties and ids is done where no flag says otherwise, and told on standard error; only
--sample samples.

With --n_best=N its N best outputs come for each line, as "number ||| text ||| score", numbered from
0. With --score nothing is decoded, but the log-probability of each line of --reference told.

A translation model translates each line. A language model continues it: a line of the input and
its line of the output, one behind the other, are the text. To a blank line the answer is a blank
line.

Lines come out in their order, each as soon as it and those before it are done; what is out stays
when the command is killed. Speed and, with --reference, BLEU are told on standard error.

    mqa-jax decode --benchmark --help

has the flags of `mqa-jax benchmark`, which measures what decoding costs.
"""

import contextlib
import functools
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import flags
from flax import nnx

from mqa_jax.cli.arguments import refuse_idle
from mqa_jax.cli.searching import (
    BEAM_FLAGS,
    build_search,
    check_beams,
    check_search,
    define_search,
)
from mqa_jax.cli.source import check_source, define_quantize, define_source, load_source
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.paths import local_path
from mqa_jax.decode.lines import ON_LONG, LineDecoder, LineStats

# What has no effect on what is only scored.
SEARCH_FLAGS = (
    f"on_long max_new_tokens beam_size {BEAM_FLAGS} repetition_penalty no_repeat_ngram "
    "min_new_tokens stop sample temperature top_k top_p min_p seed"
)

STANDARD = "-"  # Input and output of the process.


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    define_source(values, "decodes with it")
    define_quantize(values)
    string("input", "-", "a text, .gz perhaps, to decode line by line; - is standard input")
    string("output", "-", "where the lines go; - is standard output")
    string("reference", None, "the right lines: tells BLEU, or what --score is of")
    boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
    boolean(
        "score",
        False,
        "the log-probability of each line of --reference, its end included, instead of decoding",
    )
    flags.DEFINE_enum(
        "on_long",
        "error",
        ON_LONG,
        "a line that the model has no room for: error, before any is decoded; skip, for a blank "
        "line; cut to what fits (a translation keeps the beginning, a continuation the end); or "
        "split at sentences or words, translate the parts and join them",
        flag_values=values,
    )
    define_search(values)
    integer("n_best", None, "of the beam search: that many outputs a line, with their scores")
    flags.DEFINE_multi_string(
        "stop",
        [],
        "a string that ends an output, of which it is no part",
        flag_values=values,
    )
    boolean("sample", False, "draw tokens instead of taking the best")
    number("temperature", 1.0, "for --sample")
    integer("top_k", None, "for --sample: only the k best tokens")
    number("top_p", None, "for --sample: only the best tokens, of that mass")
    number("min_p", None, "for --sample: only tokens that much as probable as the best one")
    integer("seed", 0, "for --sample")


def check(args: flags.FlagValues) -> None:
    """Raises a ValueError, before anything is loaded, for flags that make no sense."""
    check_source(args, "to decode with, or --benchmark, to measure")
    if args.sample and args.beam_size > 1:
        raise ValueError("--sample and --beam_size exclude each other")
    refuse_idle(
        args,
        [
            (not args.score, "with --score", SEARCH_FLAGS),
            (args.sample, "without --sample", "temperature top_k top_p min_p seed"),
        ],
    )
    if args.score and args.reference is None:
        raise ValueError("--score needs --reference, the lines to score")
    check_search(args)
    for name, least in dict(n_best=1, top_k=1, seed=0).items():
        if args[name].value is not None:
            check_integer(f"--{name}", args[name].value, least=least, most=2**31 - 1)
    check_number("--temperature", args.temperature, above=0)
    for name in ("top_p", "min_p"):
        if args[name].value is not None:
            check_number(f"--{name}", args[name].value, above=0, most=1)
    if "" in args.stop:
        raise ValueError("--stop must be a string that is not empty")
    if args.model is None or args.sample or args["beam_size"].present:
        check_beams(args)  # Else the directory may ask for some.
    if args.n_best is not None:
        if args.on_long == "split":
            raise ValueError("--n_best and --on_long=split exclude each other")
        if args.reference is not None:
            raise ValueError("--n_best and --reference exclude each other: BLEU is of one output")
    check_files(args)


def run(args: flags.FlagValues) -> None:
    """Decodes, and tells what it was."""
    check(args)

    from tqdm import tqdm

    from mqa_jax.data.text import read_lines, text_name

    if args.workdir is not None:
        from mqa_jax.train import workdir as workdirs

        # That there is a run is known before a text is read.
        workdirs.load_config(local_path("--workdir", args.workdir))
    source, output = path_of("input", args.input), path_of("output", args.output)
    reference = None if args.reference is None else path_of("reference", args.reference)
    lines = read_lines(source)
    references: list[str] = []
    if reference is not None:
        references = read_lines(reference)
        if len(references) != len(lines):
            raise ValueError(
                f"{text_name(reference)} has {_count(len(references))}, {text_name(source)} has "
                f"{len(lines)}"
            )
    outputs = []
    batch_size = args.batch_size
    if args.on_long != "split":
        # Rows that are there to fill up a batch cost as much as others.
        batch_size = max(1, min(batch_size, len(lines)))
    with writing(output) as write:
        trained = load_source(args)
        check_beams(args)
        decoder = LineDecoder(
            trained.model,
            trained.tokenizer,
            search=build_search(args, trained),
            batch_size=batch_size,
            bos_id=trained.bos_id,
            has_bos=trained.has_bos,
            eos_ids=trained.eos_ids,
            max_new_tokens=args.max_new_tokens,
            stop=args.stop,
        )
        is_shown = sys.stderr.isatty() and output != STANDARD
        texts = answers(args, decoder, trained.params, lines, references)
        for text in tqdm(texts, total=len(lines), unit="line", disable=not is_shown):
            for line in text:
                write(line)
            outputs += text
    if not args.score:
        print_stats(decoder.stats, len(lines), args.on_long)
    if references and not args.score:
        print_scores(outputs, references)


def answers(
    args: flags.FlagValues,
    decoder: LineDecoder,
    params: nnx.State,
    lines: list[str],
    references: list[str],
) -> Iterator[list[str]]:
    """For each line of the input, in their order, what is to be written."""
    if args.score:
        scores = {i: float(x.sum()) for i, x in decoder.score(params, lines, references)}
        yield from ([f"{scores[i]:.4f}"] for i in range(len(lines)))
    elif args.n_best is not None:
        for i, outputs in enumerate(decoder.n_best(params, lines, on_long=args.on_long)):
            best = outputs[: args.n_best]
            yield [f"{i} ||| {text} ||| {score:.4f}" for text, score in best]
    else:
        keys = jax.random.split(jax.random.key(args.seed), len(lines)) if args.sample else None
        for text in decoder.texts(params, lines, keys, on_long=args.on_long):
            yield [text]


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Callable[[str], None]]:
    """A function that writes a line, at once; the file is emptied by the first, not by opening it.

    Raises:
      OSError: the file cannot be opened or written; it has the name of the file.
    """
    is_standard = path == STANDARD
    # Appending leaves what is there, should nothing come of this. Without a buffer: what could not
    # be written would be tried again as the file is closed.
    target = sys.stdout.fileno() if is_standard else path
    with open(target, "ab", buffering=0, closefd=not is_standard) as file:
        is_new = is_standard or not stat.S_ISREG(os.fstat(file.fileno()).st_mode)

        def write(text: str | None) -> None:
            nonlocal is_new
            if not is_new:
                file.truncate(0)
                is_new = True
            rest = b"" if text is None else text.encode() + b"\n"
            while rest:
                rest = rest[file.write(rest) :]

        try:
            yield write
            write(None)  # Of no lines at all the output is empty, too.
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def check_files(args: flags.FlagValues) -> None:
    """Raises a ValueError for an output that is an input too, and for paths that are addresses."""
    source, output = path_of("input", args.input), path_of("output", args.output)
    reference = None if args.reference is None else path_of("reference", args.reference)
    if source == reference == STANDARD:
        raise ValueError("--input and --reference cannot both be standard input")
    for name, path in (("input", source), ("reference", reference)):
        if path is not None and is_same(path, output):
            raise ValueError(f"--output {args.output} is the --{name} too: give another one")


def path_of(name: str, value: str) -> str | Path:
    """What the value of a flag names, a file or "-"."""
    return value if value == STANDARD else local_path(f"--{name}", value)


def is_same(source: str | Path, output: str | Path) -> bool:
    """Whether a file that is read and one that is written are one; "-" is read, or written, too."""
    try:
        found = [
            os.fstat(stream.fileno()) if path == STANDARD else os.stat(path)
            for path, stream in ((source, sys.stdin), (output, sys.stdout))
        ]
    except (OSError, ValueError, AttributeError):  # One of them is not there.
        return False
    return stat.S_ISREG(found[0].st_mode) and os.path.samestat(*found)


def _count(lines: int) -> str:
    return f"{lines} line{'s' * (lines != 1)}"


def print_stats(stats: LineStats, lines: int, on_long: str) -> None:
    """On standard error, how fast it was, and which lines did not go the usual way."""

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    if stats.steps:
        tell(
            f"{_count(lines)}, {stats.tokens} tokens in {stats.decode_seconds:.1f} s: "
            f"{stats.tokens / stats.decode_seconds:.0f} tokens/s, "
            f"{1e3 * stats.decode_seconds / stats.steps:.2f} ms per step of "
            f"{stats.rows / stats.steps:.3g} lines (compiled in {stats.compile_seconds:.1f} s)"
        )
    else:
        tell(f"{_count(lines)}, and nothing to decode in them")
    for numbers, what in (
        (stats.blank, "blank, as their outputs are"),
        (stats.too_long, f"too long: --on_long={on_long}"),
        (stats.unended, "at the limit of tokens before their end: --max_new_tokens"),
    ):
        if numbers:
            first = ", ".join(map(str, sorted(numbers)[:5])) + ", ..." * (len(numbers) > 5)
            tell(f"{len(numbers)} of them {what} (line{'s' * (len(numbers) > 1)} {first})")


def print_scores(outputs: list[str], references: list[str]) -> None:
    """On standard error."""
    from mqa_jax.train.metrics import bleu, exact_match

    score, signature = bleu(outputs, references)
    print(f"BLEU {score:.2f}  ({signature})", file=sys.stderr)
    print(f"exact match {100 * exact_match(outputs, references):.1f} %", file=sys.stderr)
