"""Trains a model:

    mqa-jax train --config=quickstart --workdir=DIR [--config.train.steps=1000 ...]

The same command again resumes the run where it stopped, and gives what it would have given.

Exit codes: 0, all steps are done, or --config.train.patience is at its end; 75, stopped by SIGTERM
or SIGINT with a checkpoint of the last step that was done; 2, a mistake in what was asked for, and
1, any other error; both are printed. A signal takes effect behind the step or the evaluation under
way; a second SIGINT kills at once. A run that is killed goes on from its newest whole checkpoint.

With several processes each gets --distributed and the same other flags, as
`mqa_jax.train.processes.initialize` says.

    mqa-jax train --config=wmt14:multi_query --compile_only=v5e:4x4

only compiles, for a TPU that need not be here, and tells whether it fits, and what it moves.
"""

import os
import traceback

from absl import flags

from mqa_jax.cli.arguments import define_config, refuse_idle, refuse_overridden
from mqa_jax.core.checks import check_integer


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_config(values)
    flags.DEFINE_string(
        "workdir", None, "where the run lives; made if it is not there", flag_values=values
    )
    flags.DEFINE_string(
        "compile_only",
        None,
        "a TPU topology, such as v5e:4x4: compiles for it, tells, trains nothing",
        flag_values=values,
    )
    flags.DEFINE_bool("distributed", False, "this is one of several processes", flag_values=values)
    flags.DEFINE_integer(
        "peer_timeout",
        100,
        "seconds after which a process that is not heard of counts as dead",
        flag_values=values,
    )


def run(args: flags.FlagValues) -> int:
    """Returns the exit status."""
    if args.config is None:
        raise ValueError("give --config, such as --config=quickstart")
    refuse_idle(
        args,
        [
            (not args.compile_only, "with --compile_only", "workdir distributed"),
            (args.distributed, "without --distributed", "peer_timeout"),
        ],
    )
    refuse_overridden(args)
    if args.compile_only:
        from mqa_jax.measure import compile_only  # Only here, since it needs another extra.
        from mqa_jax.train.start import find_start

        return compile_only.train(find_start(args.config).config, args.compile_only)
    if args.workdir is None:
        raise ValueError("give --workdir to train, or --compile_only")
    check_integer("--peer_timeout", args.peer_timeout)

    from mqa_jax.train.checkpoint import SaveError
    from mqa_jax.train.loop import train
    from mqa_jax.train.processes import initialize

    if args.distributed:
        initialize(args.peer_timeout)
    try:
        return train(args.config, args.workdir)
    except SaveError:
        # As Python ends, what Orbax has left half-done complains for pages. So it does not end in
        # its own way, and the reason is the last line.
        traceback.print_exc()
        os._exit(1)
