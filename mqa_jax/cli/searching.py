"""The flags of a search, as all commands that decode have them, and what they ask for."""

import dataclasses
import functools
from typing import Any

from absl import flags

from mqa_jax.cli.arguments import refuse_idle
from mqa_jax.cli.source import Source
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.decode.beam import TRANSFORMERS, BeamRules, beam_search
from mqa_jax.decode.history import Rule
from mqa_jax.decode.prompts import Search
from mqa_jax.decode.rules import MinNewTokens, NoRepeatNgram, RepetitionPenalty
from mqa_jax.decode.search import greedy, sample

BEAM_RULES = {"paper": BeamRules(), "transformers": TRANSFORMERS}
BEAM_FLAGS = "alpha beam_rules early_stopping n_best"
EARLY_STOPPING: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}


def define_search(values: flags.FlagValues) -> None:
    """The flags of greedy decoding and of a beam search."""
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    integer("batch_size", 64, "lines decoded at once")
    integer(
        "max_new_tokens", None, "at most that many tokens a line; by default 50 more than it has"
    )
    integer("beam_size", 1, "above 1: beam search")
    number("alpha", 0.6, "length penalty of the beam search: its exponent")
    flags.DEFINE_enum(
        "beam_rules",
        "paper",
        [*BEAM_RULES],
        "how the beam search compares hypotheses: as the paper's authors do, or as transformers "
        "does (--alpha is its length_penalty then)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "early_stopping",
        None,
        [*EARLY_STOPPING],
        "when a beam search is over: true, with as many ends as beams; false, when the best live "
        "hypothesis, ended where it stands, would not do; never, when no ending of it could; by "
        "default as --beam_rules has it",
        flag_values=values,
    )
    number("repetition_penalty", None, "above 1: what has been said becomes less likely")
    integer("no_repeat_ngram", None, "no so many tokens in a row twice")
    integer("min_new_tokens", None, "at least that many tokens a line, its end not counted")


def check_search(args: flags.FlagValues) -> None:
    """Raises a ValueError for values of the flags of `define_search` that there cannot be."""
    least_of = dict(batch_size=1, max_new_tokens=1, beam_size=1)
    least_of |= dict(no_repeat_ngram=1, min_new_tokens=0)
    for name, least in least_of.items():
        if args[name].value is not None:
            check_integer(f"--{name}", args[name].value, least=least, most=2**31 - 1)
    check_number("--alpha", args.alpha)
    if args.repetition_penalty is not None:
        check_number("--repetition_penalty", args.repetition_penalty, above=0)


def check_beams(args: flags.FlagValues) -> None:
    """Raises a ValueError for flags of a beam search that do not go with --beam_size."""
    is_beam_search = args.beam_size > 1
    refuse_idle(args, [(is_beam_search, "without a --beam_size above 1", BEAM_FLAGS)])
    if "n_best" in args and args.n_best is not None and args.n_best > args.beam_size:
        raise ValueError(
            f"--n_best={args.n_best} is more than there are with --beam_size={args.beam_size}"
        )


def build_search(args: flags.FlagValues, trained: Source) -> Search:
    """What the flags ask for, and the model."""
    rules: list[Rule] = []
    eos_id = trained.eos_ids or None
    if args.repetition_penalty is not None:
        rules.append(RepetitionPenalty(args.repetition_penalty))
    if args.no_repeat_ngram is not None:
        rules.append(NoRepeatNgram(args.no_repeat_ngram))
    if args.min_new_tokens is not None:
        rules.append(MinNewTokens(args.min_new_tokens, eos_id))
    rules += trained.rules
    options: dict[str, Any] = dict(eos_id=eos_id, rules=rules)
    if "sample" in args and args.sample:
        options |= {name: args[name].value for name in ("temperature", "top_k", "top_p", "min_p")}
        return functools.partial(sample, **options)
    if args.beam_size > 1:
        options |= dict(beam_size=args.beam_size, alpha=args.alpha)
        beam_rules = BEAM_RULES[args.beam_rules]
        if args.early_stopping is not None:
            early_stopping = EARLY_STOPPING[args.early_stopping]
            beam_rules = dataclasses.replace(beam_rules, early_stopping=early_stopping)
        options |= dict(beam_rules=beam_rules)
        return functools.partial(beam_search, **options)
    return functools.partial(greedy, **options)
