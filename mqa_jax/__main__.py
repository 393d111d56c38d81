"""`python -m mqa_jax` is the command `mqa-jax`."""

import sys

from mqa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
