"""Raw text to batches: tokenize and pack once (`prepare`), then read at random (`loader`).

Nothing in here imports JAX, and nothing imports TensorFlow.
"""

from mqa_jax.core.extras import require

require("train", __name__)

# Of every vocabulary.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
