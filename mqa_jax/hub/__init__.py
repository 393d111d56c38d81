"""Models of the Hugging Face hub: `load` reads a directory, `save` writes one.

`files` opens it and trusts nothing; `keys`, `decoders`, `translators` and `families` turn
`config.json` into our options; `names` and `tensors` say where each weight is; `generation` and
`tokenizer` read the rest.
"""

from mqa_jax.core.extras import require

require("hub", __name__)

from mqa_jax.hub.families import FAMILIES  # noqa: E402
from mqa_jax.hub.generation import Generation  # noqa: E402
from mqa_jax.hub.load import Pretrained, load, read_config  # noqa: E402
from mqa_jax.hub.save import save  # noqa: E402
from mqa_jax.hub.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

__all__ = [
    "FAMILIES",
    "Generation",
    "Pretrained",
    "Tokenizer",
    "load",
    "load_tokenizer",
    "read_config",
    "save",
]
