"""The commands, a file each, and how they end.

    mqa-jax train|decode|evaluate|convert|quantize|export|benchmark|prepare [--flag=value ...]

A mistake of the user's ends in one line on standard error and exit status 2; a bug of ours keeps
its traceback and ends in 1. A mistake is what a `raise` statement of ours says to be one: an error
of the same type that another library, or Python, raises inside of ours is a bug.
"""

import dis
import faulthandler
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mqa_jax.core.extras import require

PACKAGE = Path(__file__).parents[1]

# What each is for, and the extra that it needs.
COMMANDS = {
    "train": ("train", "trains a model, or goes on where a run was stopped"),
    "decode": ("train", "translates or continues the lines of a text with a trained model"),
    "evaluate": ("train", "tells how good a trained model is, on its own data or on any text"),
    "convert": ("train", "gives a trained model fewer key/value heads"),
    "quantize": ("train", "gives a trained model weights and caches of eight bits"),
    "export": ("train", "writes a trained model for others: transformers, or NumPy"),
    "benchmark": ("plot", "measures what a decode step costs, or compiles one for a TPU"),
    "prepare": ("train", "makes text ready for training, which else the first run does"),
}

MISTAKE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # The latter two as shells have them.


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Args:
      args: the command's name and its arguments; by default those of this process.
    """
    try:
        return run(list(sys.argv[1:] if args is None else args))
    except (Exception, KeyboardInterrupt) as error:
        return explain(error)


def run(args: list[str]) -> int:
    """Runs a command; returns the exit status, or raises what went wrong."""
    name, *args = args or ["--help"]
    if name in ("--help", "-h", "help"):
        print("usage: mqa-jax COMMAND [--flag=value ...]\n")
        for each, (_, purpose) in COMMANDS.items():
            print(f"  {each:11}{purpose}")
        print("\nmqa-jax COMMAND --help lists the flags of one.")
        return 0
    if name == "--version":
        print(importlib.import_module("mqa_jax").__version__)
        return 0
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is not a command; these are: {', '.join(COMMANDS)}")
    # As decode.py has it: one script for all that decodes.
    if name == "decode" and any(re.match(r"--?(benchmark|compile_only)(=|$)", a) for a in args):
        name = "benchmark"
    require(COMMANDS[name][0], f"mqa-jax {name}")
    faulthandler.enable(2)  # Standard error, whatever Python has put in its place.
    arguments = importlib.import_module("mqa_jax.cli.arguments")
    command = importlib.import_module(f"mqa_jax.cli.{name}")
    values = arguments.parse(name, command, args)
    return 0 if values is None else command.run(values) or 0


def explain(error: BaseException) -> int:
    """Says what went wrong, and returns the exit status; raises `error` again if it is a bug."""
    if isinstance(error, BrokenPipeError):
        # Whoever read the output has seen enough. Python would write the rest as it ends, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif isinstance(error, ValueError | ImportError | RuntimeError) and _is_said(error):
        message = str(error)
    else:
        raise error
    print(f"error: {message}", file=sys.stderr)
    return 1 if isinstance(error, RuntimeError) else MISTAKE


def _is_said(error: Exception) -> bool:
    """Whether the error comes from a `raise` statement of this package."""
    trace: TracebackType | None = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    is_ours = PACKAGE in Path(code.co_filename).parents
    return is_ours and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
