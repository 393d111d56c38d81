"""Arrays and dtypes that a user gave, checked where they come in: kind and number of axes.

Array names end in the letters of their axes, and so do the names in what is raised here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def check_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """`dtype` as a dtype that activations, weights and caches may have.

    Raises:
      ValueError: it is none of float32, bfloat16, float16 (and float64 under `jax_enable_x64`).
    """
    known = ["float32", "bfloat16", "float16"] + ["float64"] * jax.config.jax_enable_x64
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in known:
        raise ValueError(
            f"{name} must be a floating-point type, such as float32, bfloat16 or float16, "
            f"not {dtype!r}"
        )
    return found


def as_floats(name: str, x: Any, size: int | None = None) -> Array:
    """`x`, an array or lists of numbers, as an array of floats.

    Raises:
      ValueError: it is something else, or its last axis is not of the size that is given. Integers
        are not taken for floats: ids that were never embedded are the likelier story.
    """
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of floats, not {_short(x)}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floats, not {array.dtype} (x.astype(float) if so meant)")
    if size is not None and array.shape[-1:] != (size,):
        raise ValueError(f"{name} must have shape [..., {size}], not {list(array.shape)}")
    return array


def as_integers(name: str, x: Any) -> Array:
    """As `as_ids`; and the letters at the end of its name tell how many axes it must have.

    Raises:
      ValueError: as `as_ids`, or it has other axes.
    """
    array, axes = as_ids(name, x), name.rpartition("_")[2]
    if array.ndim != len(axes):
        raise ValueError(f"{name} must have shape [{', '.join(axes)}], not {list(array.shape)}")
    return array


def as_ids(name: str, x: Any) -> Array:
    """`x`, an array or lists of integers, as int32 (as int64 where it is that already).

    Raises:
      ValueError: it is something else, or on the host an integer that does not fit.
    """
    if not isinstance(x, jax.Array):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise ValueError(f"{name} must be an array of integers, not {_short(x)}") from error
        if x.size == 0:
            x = x.astype(np.int32)
    if not (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
        raise ValueError(f"{name} must be integers, not {x.dtype}")
    # Narrow and unsigned ones would wrap around where they meet a negative number.
    dtype = jax.dtypes.canonicalize_dtype(jnp.int64 if x.dtype.itemsize == 8 else jnp.int32)
    if isinstance(x, np.ndarray):
        limits = np.iinfo(dtype)
        if (wrong := x[(x < limits.min) | (x > limits.max)]).size:
            raise ValueError(f"{name} holds {wrong[0]}, which does not fit into {dtype}")
    return jnp.asarray(x, dtype)


def as_int32(x: ArrayLike) -> Array:
    """Integers as int32; one that does not fit is -1 then, which no table has, not another id."""
    x = jnp.asarray(x)
    if x.dtype.itemsize == 8:
        x = jnp.where((x >= -(2**31)) & (x < 2**31), x, -1)
    return x.astype(jnp.int32)


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"{text[:60]}..."
