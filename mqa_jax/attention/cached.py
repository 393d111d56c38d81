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

from mqa_jax.attention.cache import held_spec
from mqa_jax.attention.functional import PLAIN, Logits, attend
from mqa_jax.core.quantized import Held
from mqa_jax.core.sharding import decode_axes

# The platform that has a kernel, as JAX names it.
PLATFORM = "cuda"

# Queries of a key/value head that the kernel takes; more do not fit beside the keys.
MAX_ROWS = 64


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
    is_plain = logits.bias is None and logits.softcap is None
    if not is_plain or not is_supported(query_BTNH, key_BKSH):
        return attend(query_BTNH, key_BKSH, value_BKSH, mask_B1TS, logits)
    scale = query_BTNH.shape[-1] ** -0.5 if logits.scale is None else logits.scale
    return _compiled(query_BTNH, key_BKSH, value_BKSH, mask_B1TS, end_B, PLATFORM, scale)


def is_supported(query_BTNH: Array, key_BKSH: Held) -> bool:
    """Whether the kernel takes queries and a cache of these shapes."""
    _, length, num_heads, head_dim = query_BTNH.shape
    return (
        length * num_heads // key_BKSH.shape[1] <= MAX_ROWS
        and 16 <= head_dim <= 256
        and head_dim & (head_dim - 1) == 0
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _choose(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    mask_B1TS: Array,
    end_B: Array | None,
    platform: str,
    scale: float,
) -> Array:
    arrays = query_BTNH, key_BKSH, value_BKSH, mask_B1TS, end_B
    plain, kernel = (functools.partial(function, scale=scale) for function in (_plain, _kernel))
    return lax.platform_dependent(*arrays, default=plain, **{platform: kernel})


@_choose.defjvp
def _choose_jvp(
    platform: str, scale: float, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    return jax.jvp(functools.partial(_plain, scale=scale), primals, tangents)


# Outside of a program each operation would be one of its own, lowered for the platform that JAX
# prefers and not for the one that the arrays are on.
_compiled = jax.jit(_choose, static_argnums=(5, 6))


def _plain(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    mask_B1TS: Array,
    end_B: Array | None,
    *,
    scale: float,
) -> Array:
    return attend(query_BTNH, key_BKSH, value_BKSH, mask_B1TS, Logits(scale))


def _kernel(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    mask_B1TS: Array,
    end_B: Array | None,
    *,
    scale: float,
) -> Array:
    """The primitive, on each device of a mesh its own part."""
    arrays = query_BTNH, key_BKSH, value_BKSH, mask_B1TS, end_B
    mesh = _mesh(jax.tree.leaves(arrays))
    if mesh is None:
        return _bind(*arrays, scale=scale)
    rows, _, num_heads, _ = query_BTNH.shape
    batch, heads, kv_heads = decode_axes(mesh, rows, num_heads, key_BKSH.shape[1])
    query, key = P(batch, None, heads, None), P(batch, kv_heads, None, None)
    of_key, of_value = (held_spec(key, x.dtype) for x in (key_BKSH, value_BKSH))
    mapped = jax.shard_map(
        functools.partial(_bind, scale=scale),
        mesh=mesh,
        in_specs=(query, of_key, of_value, P(batch), P(batch)),
        out_specs=query,
        check_vma=False,
    )
    return mapped(*arrays)


def _bind(*arrays: Any, scale: float) -> Array:
    """The primitive takes arrays alone, and how they were arranged."""
    leaves, structure = jax.tree.flatten(arrays)
    return flash_decode_p.bind(*leaves, structure=structure, scale=scale)


def _mesh(arrays: list[Array]) -> Mesh | AbstractMesh | None:
    """The mesh that a program runs on, where it is not taken apart already; None on one device."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


flash_decode_p = Primitive("flash_decode")


@flash_decode_p.def_abstract_eval
def _abstract_eval(query_BTNH: Any, *_: Any, **__: Any) -> Any:
    return query_BTNH


def _lower(
    ctx: mlir.LoweringRuleContext, *values: Any, structure: jax.tree_util.PyTreeDef, scale: float
) -> Any:
    """The kernel where a program is for one GPU, or for its part; else what XLA can take apart."""
    is_for_it = tuple(ctx.platforms or ctx.module_context.platforms) == (PLATFORM,)
    is_kernel = is_for_it and _is_for_one_device(ctx) and _compiles()
    function = _local_kernel if is_kernel else _plain

    def of_leaves(*leaves: Array) -> Array:
        return function(*jax.tree.unflatten(structure, leaves), scale=scale)

    return mlir.lower_fun(of_leaves, multiple_results=False)(ctx, *values)


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
    key_BKSH: Held,
    value_BKSH: Held,
    mask_B1TS: Array,
    end_B: Array | None,
    *,
    scale: float,
) -> Array:
    from mqa_jax.attention.kernels import gpu  # Pallas takes its time to import.

    return gpu.flash_decode(
        query_BTNH,
        key_BKSH,
        value_BKSH,
        mask_BTS=mask_B1TS[:, 0] if end_B is None else None,
        end_B=end_B,
        scale=scale,
    )


def _batch(arrays: tuple, dims: tuple, **options: Any) -> tuple[Array, int]:
    """What `jax.vmap` adds is more rows of the batch."""
    size = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)

    def rows(x: Array, dim: int | None) -> Array:
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        return x.reshape(-1, *x.shape[2:])

    output = flash_decode_p.bind(*map(rows, arrays, dims), **options)
    return output.reshape(size, -1, *output.shape[1:]), 0


batching.primitive_batchers[flash_decode_p] = _batch
