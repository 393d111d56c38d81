"""From the arguments of a command to the values of its flags, and to its config.

A command is a module with `define(values)`, which defines its flags, and `run(values)`. The flags
of a command are its own: none of another command's, and none of a library's.
"""

import difflib
import importlib
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mqa_jax.cli import COMMANDS, PACKAGE

NONE = "none"  # Of --quantize and --cache_dtype.

# In a wheel they lie inside of the package, in a clone beside it.
SHIPPED = next(
    (path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir()),
    PACKAGE / "configs",
)


def define_config(values: flags.FlagValues) -> None:
    """The flag of a config, and of its fields."""
    config_flags.DEFINE_config_file(
        "config",
        help_string=f"one that is shipped ({', '.join(shipped_names())}) or FILE.py, with "
        ":VARIANT behind it where it has variants; --config.model.a=b behind it sets a field",
        flag_values=values,
    )


def define_model(values: flags.FlagValues, what_for: str) -> None:
    """The flags of a model of the hub."""
    flags.DEFINE_string(
        "model",
        None,
        f"a directory that was downloaded from the Hugging Face hub: {what_for}",
        flag_values=values,
    )


def shipped_names() -> list[str]:
    """The names of the configs that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("[!_]*.py"))


def parse(name: str, command: ModuleType, args: list[str]) -> flags.FlagValues | None:
    """The values of the flags of a command; None if it was asked for help alone, and gave it.

    Raises:
      ValueError: a flag that is unknown, or belongs to another command, or a value that it cannot
        have; a config that is not there.
    """
    values = _flags(command)
    if any(re.fullmatch(r"--?(h|help|helpshort|helpfull)|-\?", arg) for arg in args):
        print(_help(command, values))
        return None
    # The flag of a config reads its overrides from there.
    sys.argv = [f"mqa-jax {name}", *(_with_config_found(args) if "config" in values else args)]
    try:
        rest = values(sys.argv)
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown(name, values, error.flagname)) from None
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    if rest[1:]:
        raise ValueError(f"{rest[1]!r} means nothing: flags are written --name=value")
    flags.FLAGS.mark_as_parsed()  # There are none; libraries look at theirs.
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file that it writes.
    return values


def refuse_idle(values: flags.FlagValues, jobs: Iterable[tuple[Any, str, str]]) -> None:
    """Refuses flags that would have no effect.

    Args:
      values: of the flags.
      jobs: whether a job is asked for; what to say if not; names of the flags that are its own,
        of which a command need not have all.

    Raises:
      ValueError: a flag is given whose job is not asked for.
    """
    for is_asked, otherwise, names in jobs:
        idle = [f"--{name}" for name in names.split() if name in values and values[name].present]
        if idle and not is_asked:
            raise ValueError(f"{', '.join(idle)}: of no effect {otherwise}")


def refuse_overridden(values: flags.FlagValues) -> None:
    """Refuses fields that --config.init_from decides.

    Raises:
      ValueError: one is given beside it.
    """
    from mqa_jax.train.start import OWN_FIELDS

    if not values.config.get("init_from"):
        return
    own = [f"model.{name}" for name in OWN_FIELDS]
    for name in config_flags.get_override_values(values["config"]):
        if name == "data.vocab_size" or (name.startswith("model.") and name not in own):
            raise ValueError(
                f"--config.{name}: of no effect with --config.init_from, whose model it is; of it "
                f"there can be set {', '.join(own)}"
            )


def load_config(text: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of a file, `FILE.py:VARIANT`, with other values for some of its fields.

    Raises:
      ValueError: the file is not there, is wrong, or has no such variant.
    """
    path, colon, variant = find_config(text).partition(":")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config(*[variant] * bool(colon)) if get_config else None
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)
        raised_in = Path(trace[-1].filename)
        if isinstance(error, ValueError) and (
            raised_in == Path(path) or PACKAGE in raised_in.parents
        ):
            raise ValueError(f"{path}: {error}") from None
        if isinstance(error, TypeError) and raised_in == Path(__file__):
            said = (
                f"takes no variant, such as {variant!r}" if colon else "needs a variant behind a :"
            )
            raise ValueError(f"{path} {said}") from None
        lines = [frame.lineno for frame in trace if frame.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path} has no function get_config() that returns a ConfigDict")
    config.update_from_flattened_dict(dict(overrides or {}))
    return config


def find_config(text: str) -> str:
    """`FILE.py:VARIANT` of a file that is here, or of one that is shipped, of that name.

    Raises:
      ValueError: there is none.
    """
    name, colon, variant = text.partition(":")
    path = Path(name)
    if not path.is_file():
        shipped = SHIPPED / f"{path.name.removesuffix('.py')}.py"
        if str(path.parent) not in (".", "configs") or not shipped.is_file():
            raise ValueError(
                f"there is no config {name!r}: give the path of a file of your own, or the name of "
                f"one that is shipped: {', '.join(shipped_names())}"
            )
        path = shipped
    return f"{path}{colon}{variant}"


def _with_config_found(args: list[str]) -> list[str]:
    """The arguments with the path of the config in place of what it was called.

    The flag of the config library would end in a traceback where the file, its variant or a field
    is not there, or be silent until the config is read.
    """
    found, config = list(args), None
    for i, arg in enumerate(args):
        flag, equals, text = arg.partition("=")
        if flag in ("--config", "-config") and (equals or i + 1 < len(args)):
            at, text = (i, text) if equals else (i + 1, args[i + 1])
            config = load_config(text)
            found[at] = f"{flag}=" * bool(equals) + find_config(text)
        elif config is not None and (field := re.match(r"--?(?:no)?config\.([^=]+)", arg)):
            _check_field(config, field[1])
    return found


def _check_field(config: ConfigDict, field: str) -> None:
    node, *names = config, *field.split(".")
    for depth, name in enumerate(names):
        if not isinstance(node, ConfigDict) or name not in node:
            where = ".".join(["config", *names[:depth]])
            there = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no fields"
            raise ValueError(f"--config.{field}: {where} has no {name!r}; it has {there}")
        node = node[name]


def _flags(command: ModuleType) -> flags.FlagValues:
    values = flags.FlagValues()
    command.define(values)
    return values


def _unknown(name: str, values: flags.FlagValues, flag: str) -> str:
    """What to say of a flag that a command does not have."""
    if flag.startswith("config.") and "config" in values:
        return f"--{flag} needs a --config before it"
    for other in COMMANDS:
        if flag in _flags(importlib.import_module(f"mqa_jax.cli.{other}")):
            return f"--{flag} is a flag of `mqa-jax {other}`, and of no effect for {name}"
    close = difflib.get_close_matches(flag, list(values), 1)
    meant = f"did you mean --{close[0]}? " if close else ""
    return f"{name} has no flag --{flag}: {meant}--help lists them"


def _help(command: ModuleType, values: flags.FlagValues) -> str:
    lines = [command.__doc__ or ""]
    for name in values:
        flag = values[name]
        default = None if flag.boolean else flag.default_as_str
        shown = f"  --{name}" if default is None else f"  --{name}={default[1:-1]}"
        first, *others = textwrap.wrap(flag.help, 68)
        lines += [f"{shown:24} {first}"] if len(shown) <= 24 else [shown, f"{'':25}{first}"]
        lines += [f"{'':25}{other}" for other in others]
    return "\n".join(lines)


def check_fp8(name: str) -> None:
    """Raises a ValueError, which begins with `name`, where the device has no products of float8."""
    import jax

    from mqa_jax.core.devices import multiplies_fp8

    device = jax.devices()[0]
    if not multiplies_fp8(device):
        raise ValueError(
            f"{name}: the device here, {device.device_kind}, has no products of float8: choose "
            "int8, or int8_weights"
        )
