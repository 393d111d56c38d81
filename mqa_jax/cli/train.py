"""Trains a model:

python train.py --config=configs/multi30k.py:multi_query --workdir=DIR [--config.train.steps=1000]

The same command again resumes the run where it stopped, and gives what it would have given.

Exit codes: 0, all steps are done; 75, stopped by SIGTERM or SIGINT with a checkpoint of the last
step that was done; 1, an error, which is printed. A signal takes effect behind the step or the
evaluation under way; a second SIGINT kills at once. A run that is killed goes on from its newest
whole checkpoint.

With several processes each gets `--distributed` and the same other flags, as
`mqa_jax.train.processes.initialize` says.

python train.py --config=configs/wmt14.py:multi_query --compile_only=v5e:4x4

only compiles, for a TPU that need not be here, and tells whether it fits, and what it moves.
"""

import os
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from mqa_jax.train.checkpoint import SaveError
from mqa_jax.train.loop import train
from mqa_jax.train.processes import initialize

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py:VARIANT")

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; made if it is not there.")

COMPILE_ONLY = flags.DEFINE_string(
    "compile_only", None, "A TPU topology, such as v5e:4x4: compiles for it, tells, trains nothing."
)

DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes.")

PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout", 100, "Seconds after which a process that is not heard of counts as dead.", 1
)


def main(_) -> int:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file that it writes.
    if COMPILE_ONLY.value:
        from mqa_jax.measure import compile_only  # Only here, since it needs another extra.

        return compile_only.train(CONFIG.value, COMPILE_ONLY.value)
    if WORKDIR.value is None:
        raise app.UsageError("give --workdir to train, or --compile_only")
    if DISTRIBUTED.value:
        initialize(PEER_TIMEOUT.value)
    try:
        return train(CONFIG.value, WORKDIR.value)
    except SaveError:
        # As Python ends, what Orbax has left half-done complains for pages. So it does not end in
        # its own way, and the reason is the last line.
        traceback.print_exc()
        os._exit(1)


def run() -> None:
    """The command line."""
    flags.mark_flag_as_required("config")
    app.run(main)
