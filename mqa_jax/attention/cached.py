"""Attention of a few queries to a cache: `attend`, or the kernel of the platform that runs it.

Which platform that is, is known when a program is lowered for it, and not before: arrays may lie on
the CPU of a machine with GPUs. Until then the kernel is a primitive, `flash_decode`, that stands in
the branch of its platform; Pallas is imported only where that is lowered. XLA cannot take a kernel
apart, so on a mesh `shard_map` does, over the batch and the key/value heads.

Array letters:
  B batch   T queries   N query heads   K key/value heads   H head dim   S slots
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from mqa_jax.attention.cache import held_spec, put
from mqa_jax.attention.functional import PLAIN, Logits, attend
from mqa_jax.core.quantized import Held
from mqa_jax.core.sharding import decode_axes

# The platform that has a kernel, as JAX names it.
PLATFORM = "cuda"

# Queries of a key/value head that the kernel takes; more do not fit beside the keys.
MAX_ROWS = 64


# Keys and values of a cache, `[B, K, S, H]`.
Buffers = tuple[Held, Held]
# Keys and values of one token a row, `[B, 1, K, H]`, and the slots that they go to, `[B, 1]`.
New = tuple[tuple[Array, Array], Array]


def attend_to_cache(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    mask_B1TS: Array,
    end_B: Array | None = None,
    logits: Logits = PLAIN,
) -> Array:
    """As `attend`, with a kernel of its own for few queries on a GPU.

    Where the mask shows nothing but the first slots of each row, `end_B` says how many. The kernel
    has no gradient: that of `attend` is taken. It knows a scale (a plain number), but neither bias
    nor softcap.
    """
    if not is_supported(query_BTNH, key_BKSH, logits):
        return attend(query_BTNH, key_BKSH, value_BKSH, mask_B1TS, logits)
    scale = query_BTNH.shape[-1] ** -0.5 if logits.scale is None else logits.scale
    held = key_BKSH, value_BKSH
    return _compiled(query_BTNH, held, None, mask_B1TS, end_B, PLATFORM, scale)[0]


def append_and_attend(
    query_B1NH: Array,
    held: Buffers,
    new: tuple[Array, Array],
    slot_B1: Array,
    mask_B11S: Array,
    end_B: Array | None,
    logits: Logits,
) -> tuple[Array, Buffers]:
    """Writes a token a row to a cache, as `put`, and attends to it, as `attend_to_cache`. A row
    whose slot is below 0 turns to NaN.

    The kernel does both at once: written apart, keys and values (of eight bits with their scales)
    are two to six programs a layer, of 1 to 2 us each on an H100.

    Returns:
      what `attend` gives, and the keys and values with the new ones among them.
    """
    if not is_supported(query_B1NH, held[0], logits):
        return _put_and_attend(query_B1NH, held, (new, slot_B1), mask_B11S, logits)
    scale = query_B1NH.shape[-1] ** -0.5 if logits.scale is None else logits.scale
    return _compiled(query_B1NH, held, (new, slot_B1), mask_B11S, end_B, PLATFORM, scale)


def is_supported(query_BTNH: Array, key_BKSH: Held, logits: Logits = PLAIN) -> bool:
    """Whether the kernel takes queries and a cache of these shapes, and such logits."""
    _, length, num_heads, head_dim = query_BTNH.shape
    return (
        logits.bias is None
        and logits.softcap is None
        and length * num_heads // key_BKSH.shape[1] <= MAX_ROWS
        and 16 <= head_dim <= 256
        and head_dim & (head_dim - 1) == 0
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _choose(
    query_BTNH: Array,
    held: Buffers,
    new: New | None,
    mask_B1TS: Array,
    end_B: Array | None,
    platform: str,
    scale: float,
) -> tuple[Array, Buffers | None]:
    """What is attended to, and the keys and values if there are new ones."""
    arrays = query_BTNH, held, new, mask_B1TS, end_B
    plain, kernel = (functools.partial(function, scale=scale) for function in (_plain, _kernel))
    return lax.platform_dependent(*arrays, default=plain, **{platform: kernel})


@_choose.defjvp
def _choose_jvp(platform: str, scale: float, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return jax.jvp(functools.partial(_plain, scale=scale), primals, tangents)


# Outside of a program each operation would be one of its own, lowered for the platform that JAX
# prefers and not for the one that the arrays are on.
_compiled = jax.jit(_choose, static_argnums=(5, 6))


def _plain(
    query_BTNH: Array,
    held: Buffers,
    new: New | None,
    mask_B1TS: Array,
    end_B: Array | None,
    *,
    scale: float,
) -> tuple[Array, Buffers | None]:
    if new is not None:
        return _put_and_attend(query_BTNH, held, new, mask_B1TS, Logits(scale))
    return attend(query_BTNH, *held, mask_B1TS, Logits(scale)), None


def _put_and_attend(
    query_B1NH: Array, held: Buffers, new: New, mask_B11S: Array, logits: Logits
) -> tuple[Array, Buffers]:
    new_B1KH, slot_B1 = new
    held = put(held, slot_B1, new_B1KH)
    output_B1NH = attend(query_B1NH, *held, mask_B11S, logits)
    return jnp.where(slot_B1[..., None, None] < 0, jnp.nan, output_B1NH), held


def _kernel(
    query_BTNH: Array,
    held: Buffers,
    new: New | None,
    mask_B1TS: Array,
    end_B: Array | None,
    *,
    scale: float,
) -> tuple[Array, Buffers | None]:
    """The primitive, on each device of a mesh its own part."""
    arrays = query_BTNH, held, new, mask_B1TS, end_B
    mesh = _mesh(jax.tree.leaves(arrays))
    if mesh is None:
        return _bind(*arrays, scale=scale)
    rows, _, num_heads, _ = query_BTNH.shape
    batch, heads, kv_heads = decode_axes(mesh, rows, num_heads, held[0].shape[1])
    query, key = P(batch, None, heads, None), P(batch, kv_heads, None, None)
    of_held = tuple(held_spec(key, x.dtype) for x in held)
    token = P(batch, None, kv_heads, None)
    of_new = None if new is None else ((token, token), P(batch))
    mapped = jax.shard_map(
        functools.partial(_bind, scale=scale),
        mesh=mesh,
        in_specs=(query, of_held, of_new, P(batch), P(batch)),
        out_specs=(query, None if new is None else of_held),
        check_vma=False,
    )
    return mapped(*arrays)


def _bind(*arrays: Any, scale: float) -> tuple[Array, Buffers | None]:
    """The primitive takes arrays alone, and how they were arranged."""
    _, held, new, *_ = arrays
    leaves, structure = jax.tree.flatten(arrays)
    output_BTNH, *written = flash_decode_p.bind(*leaves, structure=structure, scale=scale)
    of_held = jax.tree.structure(held)
    return output_BTNH, None if new is None else jax.tree.unflatten(of_held, written)


def _mesh(arrays: list[Array]) -> Mesh | AbstractMesh | None:
    """The mesh that a program runs on, where it is not taken apart already; None on one device."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


flash_decode_p = Primitive("flash_decode")
flash_decode_p.multiple_results = True


@flash_decode_p.def_abstract_eval
def _abstract_eval(*avals: Any, structure: jax.tree_util.PyTreeDef, **_: Any) -> list[Any]:
    query_BTNH, held, new, *_ = jax.tree.unflatten(structure, avals)
    return [query_BTNH] if new is None else [query_BTNH, *jax.tree.leaves(held)]


def _lower(
    ctx: mlir.LoweringRuleContext, *values: Any, structure: jax.tree_util.PyTreeDef, scale: float
) -> Any:
    """The kernel where a program is for one GPU, or for its part; else what XLA can take apart."""
    is_for_it = tuple(ctx.platforms or ctx.module_context.platforms) == (PLATFORM,)
    is_kernel = is_for_it and _is_for_one_device(ctx) and _compiles()
    function = _local_kernel if is_kernel else _plain

    def of_leaves(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves), scale=scale))

    return mlir.lower_fun(of_leaves, multiple_results=True)(ctx, *values)


def _is_for_one_device(ctx: mlir.LoweringRuleContext) -> bool:
    devices = ctx.module_context.axis_context
    if isinstance(devices, mlir.SPMDAxisContext):
        return set(devices.manual_axes) == set(devices.mesh.axis_names)
    return devices.num_devices == 1


def _compiles() -> bool:
    """Pallas compiles for a GPU that is here, or that the mesh in force describes."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform in ("gpu", PLATFORM):
        return True
    try:
        return bool(jax.local_devices(backend=PLATFORM))
    except RuntimeError:
        return False


mlir.register_lowering(flash_decode_p, _lower)


def _local_kernel(
    query_BTNH: Array,
    held: Buffers,
    new: New | None,
    mask_B1TS: Array,
    end_B: Array | None,
    *,
    scale: float,
) -> tuple[Array, Buffers | None]:
    from mqa_jax.attention.kernels import gpu  # Pallas takes its time to import.

    mask_BTS = mask_B1TS[:, 0] if end_B is None else None
    return gpu.flash_decode(query_BTNH, *held, new=new, mask_BTS=mask_BTS, end_B=end_B, scale=scale)


def _batch(arrays: tuple, dims: tuple, **options: Any) -> tuple[list[Array], list[int]]:
    """What `jax.vmap` adds is more rows of the batch."""
    size = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)

    def rows(x: Array, dim: int | None) -> Array:
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        return x.reshape(-1, *x.shape[2:])

    outputs = flash_decode_p.bind(*map(rows, arrays, dims), **options)
    return [x.reshape(size, -1, *x.shape[1:]) for x in outputs], [0] * len(outputs)


batching.primitive_batchers[flash_decode_p] = _batch
