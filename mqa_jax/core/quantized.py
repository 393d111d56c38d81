"""Eight bits: weights with a scale for each output, keys and values with one for each vector.

A decode step is bound by reading them, and of eight bits it reads a quarter of float32. What is
multiplied with such a weight is rounded too, each row (token) to a scale of its own, or is not:
`SCHEMES` has the names. `mqa_jax.core.linear` has the products.

Array letters: R rows (tokens)   O outputs   I inputs   V vocabulary   D model dim
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

INT8, FP8 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)
# The largest number of each dtype that is used; of int8 as many below 0 as above.
LARGEST = {INT8: 127.0, FP8: 448.0}

# The dtype of the values, and whether rows are rounded to it as well.
SCHEMES: dict[str, tuple[jnp.dtype, bool]] = {
    "int8": (INT8, True),
    "int8_weights": (INT8, False),
    "fp8": (FP8, True),
}

# Of keys and values, by the names that they are asked for.
CACHE_DTYPES = ("float32", "bfloat16", "int8", "fp8")

SCALES = "scales"  # The name of `QuantizedWeight.scales` in the state of a model.

# The largest number of a row counts as no less, so that its scale has an inverse.
SMALLEST = 1e-30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What is about `values * scales`: a weight, for `mqa_jax.core.linear.linear`, or the keys or
    values of a cache.

    Attributes:
      values: `[*outputs, *inputs]`, int8 or float8_e4m3fn; of a cache `[..., H]`.
      scales: `[*outputs]` float32, above 0; of a cache `[...]`.
      rounds_rows: whether the rows that it is multiplied with are rounded to eight bits first.
    """

    values: Array
    scales: Array
    rounds_rows: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def astype(self, dtype: DTypeLike) -> "Quantized":
        """Itself: that it is not of the activations' dtype is its purpose."""
        return self

    def widened(self) -> Array:
        """The weight as an array of float32."""
        return self.values.astype(jnp.float32) * _over_inputs(self.scales, self.values.ndim)


# Keys or values in a cache: floats, or eight bits with a scale for each token and head.
Held = Array | Quantized


class QuantizedWeight(nnx.Module):
    """What stands in a module in the place of a weight's `nnx.Param`.

    Args:
      weight: the parameter of floats.
      num_inputs: how many of its axes, the last ones, are contracted in a product.
      scheme: one of `SCHEMES`.

    Raises:
      ValueError: an unknown scheme, or a weight that is not finite.
    """

    def __init__(self, weight: nnx.Param, num_inputs: int, scheme: str):
        if scheme not in SCHEMES:
            raise ValueError(f"the scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
        dtype, self.rounds_rows = SCHEMES[scheme]
        axes = weight.get_metadata().get("axes", "")
        # Together, so that what is wide is read once.
        values, scales = jax.jit(rounded, static_argnums=(1, 2))(weight[...], num_inputs, dtype)
        if not isinstance(scales, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(scales))):
            raise ValueError(
                f"a weight {axes}{list(weight.shape)} has numbers that are not finite, so that "
                "there is nothing to quantize"
            )
        scales = scales.reshape(scales.shape[:-num_inputs])
        self.values = nnx.Param(values, axes=axes)
        self.scales = nnx.Param(scales, axes=axes[: scales.ndim])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: Any) -> Quantized:
        """Of `weight[...]`, as parameters are read; of no other index."""
        if index is not Ellipsis:
            raise ValueError(f"a quantized weight is read whole, weight[...], not weight[{index}]")
        return Quantized(self.values[...], self.scales[...], self.rounds_rows)


def rounded(x: Array, num_inputs: int, dtype: DTypeLike) -> tuple[Array, Array]:
    """`x` in eight bits, with a scale for all of its last `num_inputs` axes.

    The largest magnitude becomes the largest number of the dtype, so that no other is cut off; of
    int8 each is then wrong by half a scale at most, of float8 by a sixteenth of itself, or where it
    is less than a 64th of a scale by a 1024th of one.

    Returns:
      the values; and scales, float32, above 0, of which the last `num_inputs` axes are 1. Where a
      number of `x` is not finite the values are 0, and the scale tells.
    """
    dtype = jnp.dtype(dtype)
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - num_inputs, x.ndim))
    most = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    most = jnp.maximum(most, SMALLEST)
    scaled = x * (LARGEST[dtype] / most)
    if dtype == INT8:
        scaled = jnp.round(scaled)
    # Of a row that is not finite the scale tells.
    return jnp.where(jnp.isnan(scaled), 0.0, scaled).astype(dtype), most / LARGEST[dtype]


def held(x: Array, dtype: DTypeLike) -> Held:
    """Vectors `[..., H]` as a cache of that dtype holds them: of eight bits with a scale each."""
    dtype = jnp.dtype(dtype)
    if dtype not in LARGEST:
        return x.astype(dtype)
    values, scales = rounded(x, 1, dtype)
    return Quantized(values, scales[..., 0], rounds_rows=False)


def narrowed(params: Any, dtype: DTypeLike) -> Any:
    """Weights, by name, in the dtype of the activations; vectors and what is in eight bits stay."""

    def of(path: tuple, x: Array) -> Array:
        is_scales = any(getattr(key, "key", None) == SCALES for key in path)
        is_wide = x.ndim > 1 and x.dtype not in LARGEST and not is_scales
        return x.astype(dtype) if is_wide else x

    return jax.tree_util.tree_map_with_path(of, params)


def is_scales(path: str) -> bool:
    """Whether a weight's name, with dots or slashes, is that of a quantized one's scales."""
    return SCALES in re.split(r"[./]", path)


def check_scales(name: str, scales: np.ndarray) -> None:
    """Raises a ValueError for scales that nobody has quantized with, called `name`."""
    if not np.all((scales > 0) & np.isfinite(scales)):
        bad = scales[~((scales > 0) & np.isfinite(scales))].flat[0]
        raise ValueError(f"{name} has a scale of {bad}: they are above 0, and finite")


def check_weights(name: str, params: Any) -> None:
    """As `check_scales`, of all that a model has, which lies at `name`."""
    for path, x in jax.tree_util.tree_leaves_with_path(nnx.as_pure(params)):
        if is_scales(own := jax.tree_util.keystr(path, simple=True, separator="/")):
            check_scales(f"{own} in {name}", np.asarray(x))


def _over_inputs(scales: Array, ndim: int) -> Array:
    return scales.reshape(*scales.shape, *(1,) * (ndim - scales.ndim))


def looked_up(table: Array | Quantized, ids: Array) -> Array:
    """`[..., D]` of a table `[V, D]`; of an id that it does not have, from `V` on, NaN."""
    if isinstance(table, Quantized):
        scales = table.scales.at[ids].get(mode="fill", fill_value=jnp.nan)
        values = table.values.at[ids].get(mode="fill", fill_value=0)
        return values.astype(jnp.float32) * scales[..., None]
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)
