"""What makes a family of checkpoints, and what several of them share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mqa_jax.hub.keys import Keys
from mqa_jax.model.config import TransformerConfig

Fields = dict[str, Any]


# More than any model has, of layers and along any axis: a file of a few bytes must not be able to
# ask for all of the memory there is.
MOST_LAYERS = 10_000
MOST_UNITS = 2**24


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
      model_type: its name in `config.json`.
      architecture: of `architectures`, the one with a language model's head.
      sizes: field of `TransformerConfig` to key, for what is a plain number that must be there.
      read: the other fields, from the keys and the fields of `sizes`.
      write: the other keys, from a config.
      names: module of ours to module of theirs, for a config; see `names`.
      task: of `MODELS`.
      is_tied: what an absent `tie_word_embeddings` means.
      says_tied: whether the key, where it is false, promises a softmax product of its own.
      only: keys of which one value alone is supported.
      head: what comes in front of most names, and is left out in exports of the model without its
        softmax product.
      tables: other names of the token table.
      ignored: patterns of tensors that hold nothing which the config does not say, and how many
        axes those have; None: any.
      fused: how one tensor holds queries, keys and values: all of each behind another ("blocks"),
        or by groups of heads ("grouped").
      is_conv1d: whether products are stored input-major.
      norm_offset: what is added to the scales of norms.
    """

    model_type: str
    architecture: str
    sizes: Mapping[str, str]
    read: Callable[[Keys, Fields], Fields]
    write: Callable[[TransformerConfig], Fields]
    names: Callable[[TransformerConfig], Mapping[str, str]]
    task: str = "language_model"
    is_tied: bool = True
    says_tied: bool = True
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: str = ""
    tables: tuple[str, ...] = ()
    ignored: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    fused: str | None = None
    is_conv1d: bool = False
    norm_offset: float = 0.0


def even(keys: Keys, size: str, heads: str) -> int:
    """The head dim, where it is what each head has of the model dim."""
    if keys.integer(size) % keys.integer(heads):
        raise keys.refused(size, f"which {heads}={keys.get(heads)!r} does not divide")
    return keys.integer(size) // keys.integer(heads)


def head_dim(keys: Keys) -> int:
    if "head_dim" in keys:
        return keys.integer("head_dim", most=MOST_UNITS)
    return even(keys, "hidden_size", "num_attention_heads")


def written(activation: str, **words: str) -> str:
    """An activation in their words: those given, else the plainest that means it."""
    plain = {"gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}
    return {**plain, **words}.get(activation, activation)


def layer_types(windows: tuple[int | None, ...]) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in windows]


def rope_keys(config: TransformerConfig) -> Fields:
    """In the words of version 4, which both read."""
    rope, scaling = config.rope, None
    if rope.scaling != "default":
        scaling = dict(rope_type=rope.scaling, factor=rope.factor)
    if scaling and rope.scaling == "llama3":
        scaling |= dict(
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position_embeddings=rope.original_max_length or config.max_length,
        )
    return dict(rope_theta=rope.theta, rope_scaling=scaling)
