"""Raw text to batches: tokenize and pack once (`prepare`), then read at random (`loader`).

Nothing in here imports JAX, and nothing imports TensorFlow.
"""

from typing import NamedTuple

from mqa_jax.core.extras import require

require("train", __name__)

# Of every vocabulary that is made here.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)


class SpecialIds(NamedTuple):
    """Ids that stand for no text.

    Attributes:
      pad: what rows are filled up with; -1 where the vocabulary has none for that.
      bos: what stands in front of a target, and is in no row; None: nothing does, so that the first
        token of a target is given, and not predicted.
      eos: what ends each sentence.
    """

    pad: int = PAD_ID
    bos: int | None = BOS_ID
    eos: int = EOS_ID


OWN_IDS = SpecialIds()
