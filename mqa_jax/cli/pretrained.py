"""How a directory of the Hugging Face hub wants its model to be decoded."""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from mqa_jax.decode.history import Rule
from mqa_jax.decode.rules import Forbid, ForceFirst, ForceLast, Normalize


def take_defaults(args: flags.FlagValues, generation: Any, where: Path) -> None:
    """Flags that are not given become what a directory says of decoding, which is told on standard
    error. Sampling is what --sample asks for, and nothing else.

    Args:
      generation: a `mqa_jax.hub.generation.Generation`.
      where: the directory.

    Raises:
      ValueError: it says what no search here can do.
    """
    said: dict[str, Any] = dict(
        repetition_penalty=generation.repetition_penalty,
        no_repeat_ngram=generation.no_repeat_ngram_size or None,
        min_new_tokens=generation.min_new_tokens,
        max_new_tokens=generation.max_new_tokens,
    )
    is_sampled = "sample" in args and args.sample
    if is_sampled:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            said[name] = getattr(generation, name) or None
        # transformers' own, of a directory that has none; 0 is none indeed.
        said["top_k"] = 50 if generation.top_k is None else said["top_k"]
        for name in ("temperature", "top_p"):
            if getattr(generation, name) == 0 and not args[name].present:
                raise ValueError(
                    f"{where}: its {name} is 0, with which nothing is drawn: give --{name}"
                )
    elif not args["beam_size"].present:
        said["beam_size"] = generation.num_beams if generation.num_beams > 1 else None
    has_beams = args.beam_size > 1 or said.get("beam_size")
    if has_beams and not (args["beam_rules"].present and args.beam_rules == "paper"):
        said |= dict(beam_rules="transformers", alpha=generation.length_penalty)
        if generation.length_penalty < 0 and not args["alpha"].present:
            raise ValueError(
                f"{where}: its length_penalty is {generation.length_penalty}, and no beam search "
                "here takes one below 0: give --alpha"
            )
        said["early_stopping"] = str(generation.early_stopping).lower()
    taken = {
        name: value
        for name, value in said.items()
        if value is not None and not args[name].present and args[name].value != value
    }
    for name, value in taken.items():
        args[name].value = value
    if taken:
        shown = " ".join(f"--{name}={value}" for name, value in taken.items())
        print(f"as transformers has it for this directory: {shown}", file=sys.stderr)
    unheeded = [*generation.unheeded]
    if generation.max_length and args.max_new_tokens is None:
        unheeded.append("max_length (give --max_new_tokens)")
    if generation.do_sample and not is_sampled:
        unheeded.append("do_sample" + " (give --sample)" * ("sample" in args))
    # Counts the prompt of a language model, which differs from line to line.
    if generation.min_length and not args["min_new_tokens"].present:
        unheeded.append("min_length (give --min_new_tokens)")
    if unheeded:
        print(f"not as the model's directory says: {', '.join(unheeded)}", file=sys.stderr)


def rules_of(generation: Any) -> tuple[Rule, ...]:
    """Its rules that do not change how a text is chosen, but which text there can be."""
    rules: list[Rule] = []
    # An end alone is no bad word, as in transformers.
    ends = {(id,) for id in generation.eos_ids}
    words = [word for word in generation.bad_words if word not in ends]
    if forbidden := [*words, *((id,) for id in generation.suppressed)]:
        rules.append(Forbid(forbidden))
    if generation.forced_bos_id is not None:
        rules.append(ForceFirst(generation.forced_bos_id))
    if generation.forced_eos_id is not None:
        rules.append(ForceLast(generation.forced_eos_id))
    if generation.renormalize:
        rules.append(Normalize())
    return tuple(rules)
