"""Which tensor of a file holds which weights of ours, and how.

Array letters:
  D model dim   N query heads   K key/value heads   G = N/K   H head dim   V vocabulary
  O outputs   I inputs
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mqa_jax.hub.family import Family
from mqa_jax.model.config import TransformerConfig

Shape = tuple[int, ...]

# How the name of a weight of ours ends, and how that of its tensor.
_ENDINGS = {
    ".scale": ".weight",
    ".table": ".weight",
    ".kernel": ".weight",
    ".bias": ".bias",
    "_bias": ".bias",
    "": ".weight",
}
_PARTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file, and the weights that it holds.

    Attributes:
      name: the tensor's.
      shape: the tensor's.
      weights: paths of the weights, and their shapes; several where they are fused, which are
        queries, keys and values.
      is_grouped: of fused ones, whether keys and values stand behind the queries of their group.
      is_turned: whether the tensor is input-major.
      offset: what is added to a norm's scale.
    """

    name: str
    shape: Shape
    weights: Mapping[str, Shape]
    is_grouped: bool = False
    is_turned: bool = False
    offset: float = 0.0

    def apart(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The weights that a tensor holds, as views of it where that can be."""
        if self.is_turned:
            tensor = tensor.T
        shapes = list(self.weights.values())
        if len(shapes) == 1:
            weight = tensor.reshape(shapes[0])
            return [weight.astype(np.float32) + np.float32(self.offset) if self.offset else weight]
        kv_heads, rest = shapes[1][0], tensor.shape[1:]
        if self.is_grouped:
            grouped = tensor.reshape(kv_heads, -1, shapes[0][1], *rest)
            parts = [grouped[:, :-2], grouped[:, -2], grouped[:, -1]]
        else:
            rows = np.cumsum([shape[0] * shape[1] for shape in shapes])
            parts = np.split(tensor, rows[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def together(self, weights: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor that holds these weights; the inverse of `apart`."""
        if len(weights) == 1:
            tensor = weights[0] - np.float32(self.offset) if self.offset else weights[0]
        elif self.is_grouped:
            query, key, value = weights
            groups = query.reshape(len(key), -1, *query.shape[1:])
            tensor = np.concatenate([groups, key[:, None], value[:, None]], axis=1)
        else:
            tensor = np.concatenate(weights)
        shape = self.shape[::-1] if self.is_turned else self.shape
        tensor = tensor.reshape(shape)
        return np.ascontiguousarray(tensor.T if self.is_turned else tensor)


def stored_weights(
    family: Family, config: TransformerConfig, shapes: Mapping[str, Shape]
) -> dict[str, Stored]:
    """All tensors that hold a model's weights, by name; those of a quantized one, which nobody else
    reads, have the names that they have here.

    Args:
      config: the model's.
      shapes: of its weights, by path.

    Raises:
      ValueError: the family has no name for a weight.
    """
    if config.quantized is not None:
        return {path: Stored(path, shape, {path: shape}) for path, shape in shapes.items()}
    names = family.names(config)
    fused: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in sorted(shapes, key=_order):
        fused.setdefault(_name(family, names, path), {})[path] = shapes[path]
    return {name: _stored(family, name, weights) for name, weights in fused.items()}


def is_norm(path: str) -> bool:
    """Whether a weight is a norm's, which are kept in float32."""
    return path.rpartition(".")[0].endswith("norm")


def _order(path: str) -> int:
    """Queries before keys before values."""
    part = path.rpartition(".")[2].removesuffix("_bias")
    return _PARTS.index(part) if part in _PARTS else 0


def _name(family: Family, names: Mapping[str, str], path: str) -> str:
    index = re.search(r"\.(\d+)\.", path)
    pattern = path if index is None else path.replace(index[0], ".#.", 1)
    layer = "" if index is None else index[1]
    if pattern in names and "bias" in pattern:
        return names[pattern]
    for ours, theirs in _ENDINGS.items():
        module = pattern.removesuffix(ours)
        if pattern.endswith(ours) and module in names:
            return names[module].replace("#", layer) + theirs
    raise ValueError(f"a checkpoint of {family.model_type} has no place for the weight {path}")


def _stored(family: Family, name: str, weights: Mapping[str, Shape]) -> Stored:
    flat = [_flat(path, shape) for path, shape in weights.items()]
    shape = (sum(shape[0] for shape in flat), *flat[0][1:])
    path = next(iter(weights))
    is_turned = family.is_conv1d and len(shape) == 2 and not path.endswith((".table", ".kernel"))
    return Stored(
        name=name,
        shape=shape[::-1] if is_turned else shape,
        weights=weights,
        is_grouped=family.fused == "grouped",
        is_turned=is_turned,
        offset=family.norm_offset if is_norm(path) else 0.0,
    )


def _flat(path: str, shape: Shape) -> Shape:
    """The shape of a weight by itself in a file, output-major."""
    part = path.rpartition(".")[2]
    if part == "logits_bias":
        return (1, *shape)
    if part == "out":
        return (shape[0], math.prod(shape[1:]))
    if part.removesuffix("_bias") in _PARTS:
        return (shape[0] * shape[1], *shape[2:])
    return shape
