"""Calls of a module under `jax.jit`; outside of it, each operation is compiled by itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(graphdef, method, state, args, kwargs):
    return getattr(nnx.merge(graphdef, state), method)(*args, **kwargs)


def compiled(module: nnx.Module, method: str = "__call__") -> Callable[..., Any]:
    """A method of arrays, compiled once for each architecture and for each of their shapes."""
    graphdef, state = nnx.split(module)
    return lambda *args, **kwargs: _call(graphdef, method, state, args, kwargs)
