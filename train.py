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

from mqa_jax.cli.train import run

if __name__ == "__main__":
    run()
