"""The device mesh, and which mesh axis each axis of an array lies over.

A weight names its axes once, in the letters that the whole package uses (`param("DNH", ...)`), and
`ShardingRules` turns letters into a `PartitionSpec`. Without a mesh nothing here has any effect.

Array letters:
  B batch   D model dim   N query heads   K key/value heads   H head dim   F feed-forward dim
  V vocabulary   P positions
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mqa_jax.core.checks import check_integer

MESH_AXES = ("data", "fsdp", "tensor")


# The mesh and the rules that hold where code runs or is traced; None for one device.
_placement: contextvars.ContextVar = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: "ShardingRules") -> Iterator[None]:
    """Each `param` made within has its place on the mesh from the start: no device holds more of
    it than its own part, ever. And `over_batch` places activations."""
    token = _placement.set((mesh, rules))
    try:
        yield
    finally:
        _placement.reset(token)


def over_batch(x: jax.Array) -> jax.Array:
    """`x`, `[B, ...]`, split as a batch is and along no other axis; as it is outside of `on_mesh`.

    Without a word from us XLA splits activations as it finds the weights: with fsdp over the model
    dim, and moves several times as much (docs/tpu.md has figures).
    """
    if (placement := _placement.get()) is None:
        return x
    mesh, rules = placement
    sharding = rules.sharding(mesh, "B", x.shape[:1])
    here = jax.sharding.get_abstract_mesh()
    if not here.empty:
        # The same mesh, whose axes may be of another type outside (see `explicit`).
        sharding = NamedSharding(here, sharding.spec)
    return jax.lax.with_sharding_constraint(x, sharding)


def batch_axes(mesh: Mesh | AbstractMesh | None, batch: int) -> tuple[str, ...] | None:
    """The axes that rows with no place of their own yet are split over, where they divide them."""
    if mesh is None:
        return None
    placement = _placement.get()
    rules = ShardingRules() if placement is None else placement[1]
    names = tuple(name for name in rules.B if name in mesh.axis_names)
    parts = math.prod(mesh.shape[name] for name in names)
    return names if parts > 1 and batch % parts == 0 else None


def decode_axes(
    mesh: Mesh | AbstractMesh, batch: int, num_heads: int, num_kv_heads: int
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, tuple[str, ...] | None]:
    """The axes that rows, query heads and key/value heads of a decode step are split over.

    Those of the rules in force that the mesh has, where they divide; all query heads may share
    one key/value head, but may not be parted from theirs.
    """
    placement = _placement.get()
    rules = ShardingRules() if placement is None else placement[1]

    def axes(names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        names = tuple(name for name in names if name in mesh.axis_names)
        return names if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    heads = kv_heads = axes(rules.K, num_kv_heads)
    if num_kv_heads == 1:
        heads, kv_heads = axes(rules.N, num_heads), None
    return axes(rules.B, batch), heads, kv_heads


def param(
    axes: str,
    shape: Sequence[int],
    *,
    fan_in: int,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    init: nnx.Initializer | None = None,
) -> nnx.Param:
    """A weight, a letter for each axis, from a normal of standard deviation `fan_in ** -0.5`.

    Args:
      axes: letters.
      shape: outputs first.
      fan_in: the size of the axes behind the outputs, all together.
      init: what draws it instead, called for the shape `[fan_in, outputs]`, as flax's are.
    """
    shape, sharding = tuple(shape), _sharding(axes, shape)
    if init is None:
        weight = _compiled_normal(sharding)(rngs.params(), shape, dtype, fan_in**-0.5)
    else:

        def draw(key: jax.Array) -> jax.Array:
            return init(key, (fan_in, math.prod(shape) // fan_in), dtype).T.reshape(shape)

        weight = jax.jit(draw, out_shardings=sharding)(rngs.params())
    return nnx.Param(weight, axes=axes)


def zeros(axes: str, shape: Sequence[int], *, dtype: DTypeLike = jnp.float32) -> nnx.Param:
    """A bias, which begins at 0; a letter for each axis."""
    return nnx.Param(jnp.zeros(shape, dtype, device=_sharding(axes, shape)), axes=axes)


def _sharding(axes: str, shape: Sequence[int]) -> NamedSharding | None:
    """Where a weight belongs; None outside of `on_mesh`."""
    if (placement := _placement.get()) is None:
        return None
    mesh, rules = placement
    return rules.sharding(mesh, axes, shape)


# Compiled once a shape, of which a model has few, however many its layers. (A whole model at once
# takes XLA a second a weight.)
@functools.lru_cache
def _compiled_normal(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    return jax.jit(_normal, static_argnums=(1, 2, 3), out_shardings=sharding)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, stddev: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(stddev, dtype)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each array letter is split over; letters not named are not split.

    Batch goes over `data` and `fsdp`, the weights' model dim over `fsdp`; heads, feed-forward and
    vocabulary over `tensor`. Key/value heads go over `tensor` where it divides them and are
    replicated where it does not, as for multi-query attention always.

    For a mesh with axes of other names say which letters they split:
    `ShardingRules(B=("replica",), D=(), N=("model",), K=("model",), F=("model",), V=("model",))`.

    Raises:
      ValueError: a rule that is no tuple of names, or names one twice.
    """

    B: tuple[str, ...] = ("data", "fsdp")
    D: tuple[str, ...] = ("fsdp",)
    N: tuple[str, ...] = ("tensor",)
    K: tuple[str, ...] = ("tensor",)
    F: tuple[str, ...] = ("tensor",)
    V: tuple[str, ...] = ("tensor",)

    def __post_init__(self) -> None:
        for letter, names in vars(self).items():
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"the rule {letter}={names!r} must be a tuple of names of mesh axes: "
                    f'{letter}=("data",), or {letter}=() for no split'
                )
            if len(set(names)) < len(names):
                raise ValueError(f"the rule {letter}={names} names a mesh axis twice")

    def sharding(self, mesh: Mesh, axes: str, shape: Sequence[int]) -> NamedSharding:
        """The sharding of an array of that shape whose axes are the letters `axes`.

        Raises:
          ValueError: an axis that its mesh axes do not divide, letters that are not one an axis, a
            mesh that lacks an axis of the rules, or a mesh axis that would split two axes.
        """
        self._check(mesh, axes, shape)
        spec = []
        for letter, size in zip(axes, shape, strict=True):
            names = vars(self).get(letter, ())
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts == 0:
                spec.append(names or None)
            elif letter == "K":
                spec.append(None)
            else:
                raise ValueError(
                    f"axis {letter} of {axes}{tuple(shape)} has size {size}, which the {parts} "
                    f"parts of mesh axes {names} do not divide (mesh {dict(mesh.shape)})"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    def _check(self, mesh: Mesh, axes: str, shape: Sequence[int]) -> None:
        rules = vars(self)
        wanted = dict.fromkeys(name for names in rules.values() for name in names)
        if lacking := [name for name in wanted if name not in mesh.axis_names]:
            raise ValueError(
                f"the mesh has the axes {mesh.axis_names} and lacks {lacking}, which the sharding "
                "rules name: make it with mqa_jax.make_mesh, or say which letters its axes split, "
                f"as in ShardingRules(B=({mesh.axis_names[0]!r},), D=(), N=({mesh.axis_names[-1]!r}"
                ",), K=..., F=..., V=...)"
            )
        if len(axes) != len(shape) or (axes and not axes.isalpha()):
            raise ValueError(f"{axes!r} is not a letter for each axis of the shape {tuple(shape)}")
        names = [name for letter in axes for name in rules.get(letter, ())]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            split = {letter: rules[letter] for letter in axes if letter in rules}
            raise ValueError(
                f"mesh axes {twice} would split two axes of {axes}{tuple(shape)} by the rules "
                f"{split}: a mesh axis splits one axis of an array"
            )

    def params(self, mesh: Mesh, state: nnx.State) -> nnx.State:
        """The sharding of every weight of a model's (abstract) state, in the same tree."""

        def of(variable: nnx.Variable) -> nnx.Variable:
            axes = variable.get_metadata().get("axes", "")
            # A weight that names no axes is replicated.
            shape = variable.shape if axes else ()
            return variable.replace(self.sharding(mesh, axes, shape))

        return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def by_rows(function: Callable[..., Any], rows: NamedSharding | None) -> Callable[..., Any]:
    """A function of weights, and of two trees of rows, that each device does for its rows alone.

    For what depends on no other row: no device waits for another within.

    Args:
      rows: how they are split; the weights are on all devices of its mesh. The function itself when
        None.
    """
    if rows is None:
        return function
    return jax.shard_map(
        function,
        mesh=rows.mesh,
        in_specs=(PartitionSpec(), rows.spec, rows.spec),
        out_specs=rows.spec,
        check_vma=False,
    )


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices with the axes `data`, `fsdp`, `tensor`; one size may be -1, the rest.

    Args:
      devices: which ones; those that JAX runs on when None.

    Raises:
      ValueError: sizes whose product is not the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    names = zip(MESH_AXES, (data, fsdp, tensor), strict=True)
    sizes = [check_integer(name, size, least=-1) for name, size in names]
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not use the {count} devices "
            "here: the product must be their number, and one of the sizes may be -1"
        )
    # `jax.make_mesh` would split a physical axis of a torus (16 x 16 into 8 x 4 x 8) on v5e alone.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
