"""What the core installation leaves out: which extra has it, said in one line where it is missing.

`pip install mqa_jax` brings jax, flax and numpy. The folders that need more say so in their
`__init__.py`, which is run before any of their files: `train` and `data` need [train], `hub` needs
[hub], `measure` needs [plot].
"""

from importlib.util import find_spec

# What each extra of setup.cfg brings, by the names that are imported.
EXTRAS = {
    "train": (
        "absl",
        "array_record",
        "grain",
        "importlib_resources",
        "ml_collections",
        "num2words",
        "optax",
        "orbax.checkpoint",
        "sacrebleu",
        "sentencepiece",
        "tensorboardX",
        "tensorflow_datasets",
        "tensorstore",
        "tqdm",
    ),
    "hub": ("safetensors", "sentencepiece", "tokenizers"),
    "plot": ("absl", "matplotlib", "ml_collections", "rich"),
}


class MissingExtra(ImportError):
    """Something of an extra is not installed; the message is one line and has the command."""


def require(extra: str, needed_by: str) -> None:
    """Says which extra to install, if anything of it is missing; imports nothing.

    Args:
      extra: of `EXTRAS`.
      needed_by: who asks, as the message names them: a module or a command.

    Raises:
      MissingExtra: something of the extra is not installed.
    """
    missing = [name for name in EXTRAS[extra] if not _is_installed(name)]
    if missing:
        raise MissingExtra(
            f"{needed_by} needs {', '.join(missing)}, which the core of mqa_jax leaves out: "
            f'pip install "mqa_jax[{extra}]"',
            name=missing[0],
        )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # The package around a submodule.
        return False
