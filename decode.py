"""Decodes with a trained model, or measures what decoding costs:

python decode.py --workdir=DIR --input=FILE --output=FILE [--beam_size=4] [--reference=FILE]
python decode.py --benchmark --config=configs/wmt14.py [--quick] --output_dir=DIR
python decode.py --compile_only=v2:2x2 --config=configs/wmt14.py --batch_sizes=1024

`mqa_jax/cli/decode.py` and `mqa_jax/cli/benchmark.py` say more; so does --help.
"""

import sys

from mqa_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["decode", *sys.argv[1:]]))
