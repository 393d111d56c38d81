"""Arrays on a mesh with explicit axes, which `jax.make_mesh` makes unless told otherwise.

There an array's sharding is part of its type, and JAX wants to be told where the result of every
gather, scatter, reshape or product over a split axis goes. What this package computes says so
once, at its borders: inside of a function that is `automatic` the axes are as those of any other
mesh, XLA places what lies between, and what comes out is split as the outputs are declared to be.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mqa_jax.core.quantized import Quantized


def automatic[**Arguments, Output](
    outputs: Callable[..., Any],
) -> Callable[[Callable[Arguments, Output]], Callable[Arguments, Output]]:
    """Decorates a function of arrays and modules; does nothing where no mesh axis is explicit.

    Args:
      outputs: takes the function's own arguments by name, and gives the `PartitionSpec` of each
        array that the function returns, in the same tree. (See `spec`.)
    """

    def decorate(function: Callable[Arguments, Output]) -> Callable[Arguments, Output]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Output:
            mesh = explicit_mesh(args, kwargs)
            if mesh is None:
                return function(*args, **kwargs)
            leaves, tree = jax.tree.flatten((args, kwargs))
            at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

            def body(*arrays: jax.Array) -> tuple[Output, list[nnx.State]]:
                within = list(leaves)
                for i, array in zip(at, arrays, strict=True):
                    within[i] = array
                args, kwargs = jax.tree.unflatten(tree, within)
                output = function(*args, **kwargs)
                return output, [nnx.state(stream) for stream in _rngs(args, kwargs)]

            specs = outputs(**signature.bind(*args, **kwargs).arguments)
            output, drawn = jax.sharding.auto_axes(
                body,
                axes=_explicit_axes(mesh),
                out_sharding=(_shardings(mesh, specs), NamedSharding(mesh, PartitionSpec())),
            )(*(leaves[i] for i in at))
            # Modules are copies within, streams of random numbers too: draw no number twice.
            for stream, state in zip(_rngs(args, kwargs), drawn, strict=True):
                nnx.update(stream, state)
            return output

        return call

    return decorate


def explicit(function: Callable, *like: Any) -> Callable:
    """`function` for calls from within what is `automatic`; it finds explicit axes again.

    Args:
      like: for each argument arrays that have the types it is to come with.
    """
    mesh = explicit_mesh(like, {})
    if mesh is None:
        return function
    specs = jax.tree.map(spec, like)
    return jax.sharding.explicit_axes(function, axes=_explicit_axes(mesh), in_sharding=specs)


def explicit_mesh(args: tuple, kwargs: dict) -> Mesh | AbstractMesh | None:
    """The mesh with explicit axes that code runs under or that its arguments lie on, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        # Outside of `jax.jit` new arrays are on one device, and must be told of all.
        kinds = (
            jax.typeof(array) if isinstance(array, jax.core.Tracer) else array
            for array in _arrays(args, kwargs)
        )
        meshes = (getattr(kind.sharding, "mesh", mesh) for kind in kinds)
        mesh = next((mesh for mesh in meshes if _explicit_axes(mesh)), mesh)
    return mesh if _explicit_axes(mesh) else None


def spec(array: Any) -> Any:
    """The `PartitionSpec` of an array on explicit axes, an entry for each of its axes.

    It is declared as Any, here and below, since it stands in trees where arrays stand.
    """
    if isinstance(array, Quantized):
        array = array.values
    entries = tuple(jax.typeof(array).sharding.spec) if isinstance(array, jax.Array) else ()
    return PartitionSpec(*entries, *(None,) * (np.ndim(array) - len(entries)))


def partition(*entries: Any) -> Any:
    """A `PartitionSpec` in which a mesh axis splits the first of the axes that ask for it."""
    taken: set[str] = set()
    kept = []
    for entry in entries:
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        kept.append(None if taken & set(names) else entry)
        taken |= set(names)
    return PartitionSpec(*kept)


def _explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in types if axis_type == AxisType.Explicit)


def _shardings(mesh: Mesh | AbstractMesh, specs: Any) -> Any:
    return jax.tree.map(
        functools.partial(NamedSharding, mesh),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def _rngs(args: tuple, kwargs: dict) -> list[nnx.Rngs]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, nnx.Rngs)]


def _arrays(args: tuple, kwargs: dict) -> Iterator[jax.Array]:
    """Of a module its first weight, as they lie on one mesh: modules are called at every step."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, nnx.Module):
            yield from _first_weight(value)
        else:
            yield from (leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array))


def _first_weight(module: nnx.Module) -> Iterator[jax.Array]:
    for value in vars(module).values():
        if isinstance(value, nnx.Param):
            array = value.get_value()
            yield from [array] if isinstance(array, jax.Array) else []
            return
        if isinstance(value, nnx.Module):
            found = list(_first_weight(value))
            if found:
                yield from found
                return
