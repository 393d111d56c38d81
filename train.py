"""Trains a model:

python train.py --config=configs/multi30k.py:multi_query --workdir=DIR [--config.train.steps=1000]

`mqa_jax/cli/train.py` says more; so does --help.
"""

import sys

from mqa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
