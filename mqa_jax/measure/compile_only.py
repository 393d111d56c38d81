"""What the TPU compiler says of a step, on a machine without a TPU: does it fit, what does it move,
how long does it take.

`train` compiles the step that train.py runs and `decode` a step of greedy decoding, for the devices
of a topology that need not be here. libtpu (the extra `[tpu]`) holds the compiler.

Array letters: B batch   C context length
"""

import dataclasses
import importlib.util
import itertools
import math
import operator
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from mqa_jax.core.devices import PEAK_TFLOP_PER_S
from mqa_jax.core.extras import MissingExtra
from mqa_jax.core.sharding import ShardingRules, make_mesh
from mqa_jax.measure.hlo import Program
from mqa_jax.measure.roofline import (
    abstract_caches,
    in_precision,
    rows_of,
    step_weights,
)
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.transformer import MODELS
from mqa_jax.train.setup import set_up
from mqa_jax.train.teacher import find_teacher

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is published of a chip; JAX sees it as one device, or as two that share it evenly.

    Attributes:
      memory: bytes of HBM.
      tflop_per_s: peak of bfloat16 products, in units of 1e12 a second.
      gb_per_s: peak of the HBM's bandwidth, in units of 1e9 bytes a second.
    """

    memory: int
    tflop_per_s: float
    gb_per_s: float


# From the page of each chip in https://docs.cloud.google.com/tpu/docs; of v2, which has none any
# more, from the table that JAX keeps for Pallas (`jax.experimental.pallas.tpu.TpuInfo`).
CHIPS = {
    "v2": Chip(16 * GIB, 2 * PEAK_TFLOP_PER_S["TPU v2"], 716),
    "v3": Chip(32 * GIB, 2 * PEAK_TFLOP_PER_S["TPU v3"], 900),
    "v4": Chip(32 * GIB, PEAK_TFLOP_PER_S["TPU v4"], 1200),
    "v5e": Chip(16 * GIB, PEAK_TFLOP_PER_S["TPU v5 lite"], 819),
    "v5p": Chip(95 * GIB, PEAK_TFLOP_PER_S["TPU v5"], 2765),
    "v6e": Chip(32 * GIB, PEAK_TFLOP_PER_S["TPU v6 lite"], 1638),
    "tpu7x": Chip(192 * GIB, 2 * PEAK_TFLOP_PER_S["TPU7x"], 7380),
}

# Those that were tried; libtpu knows others, which work as well.
TOPOLOGIES = (
    "v2:2x2 v2:4x4 v2:8x8 v2:16x16 v3:2x2 v3:4x4 v3:8x8 v3:16x16 v3:32x32 "
    "v4:2x2x1 v4:2x2x2 v4:2x2x4 v4:2x4x4 v4:4x4x4 v4:4x4x8 "
    "v5e:1x1 v5e:2x2 v5e:2x4 v5e:4x4 v5e:4x8 v5e:8x8 v5e:8x16 v5e:16x16 "
    "v5p:2x2x1 v5p:2x2x2 v5p:2x2x4 v5p:2x4x4 v5p:4x4x4 v5p:4x4x8 v5p:8x8x8 "
    "v6e:1x1 v6e:2x2 v6e:2x4 v6e:4x4 v6e:4x8 v6e:8x8 v6e:8x16 v6e:16x16 "
    "tpu7x:2x2x1 tpu7x:2x2x2 tpu7x:2x2x4 tpu7x:2x4x4 tpu7x:4x4x4"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as libtpu has it: the chip, and how many of them along each axis.
      devices: JAX's; nothing can run on them.
      chip: what is published of the chip.
      chips: how many there are.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip
    chips: int

    @property
    def device(self) -> Chip:
        """A device's share of its chip."""
        share = self.chips / len(self.devices)
        return Chip(*(share * value for value in dataclasses.astuple(self.chip)))


def find_topology(name: str) -> Topology:
    """The devices of a topology, such as `v5e:4x4`.

    Raises:
      MissingExtra: libtpu is not installed.
      ValueError: libtpu knows no such topology; the message lists those that were tried.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtra(
            "compiling for a TPU needs libtpu, which holds the compiler: "
            'pip install "mqa_jax[all,tpu]", in a clone --editable ".[all,tpu]" (on Linux, x86-64; '
            "it needs no TPU)",
            name="libtpu",
        )
    # Nobody is to look for a TPU here, or to ask the cloud about one; and as none is opened, other
    # programs may have libtpu loaded at the same time.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    generation = name.partition(":")[0]
    # As JAX has it on a real v4: the two cores of a chip are one device.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        if generation not in CHIPS:
            raise ValueError(f"the chip is not one of {', '.join(CHIPS)}")
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"topology {name!r} is not known ({error}); these are, and others like them: "
            f"{TOPOLOGIES}"
        ) from None
    # The cores of a chip have the coordinates of the chip, which only TPUs have.
    chips = len({tuple(coords) for coords in map(operator.attrgetter("coords"), devices)})
    return Topology(name, devices, CHIPS[generation], chips)


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of (abstract) arrays, by their shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


_OUT_OF_MEMORY = re.compile(
    r"\((?P<need>[\d.]+)(?P<need_unit>[KMGT]?)\) exceeds available HBM "
    r"\((?P<have>[\d.]+)(?P<have_unit>[KMGT]?)\)"
)
_UNITS = {unit: 1024**power for power, unit in enumerate(("", "K", "M", "G", "T"))}


def out_of_memory(message: str) -> tuple[float, float] | None:
    """The bytes that a program needs and those there are, if the compiler complains of that."""
    if not (match := _OUT_OF_MEMORY.search(message)):
        return None
    return (
        float(match["need"]) * _UNITS[match["need_unit"]],
        float(match["have"]) * _UNITS[match["have_unit"]],
    )


def report(
    title: str,
    topology: Topology,
    mesh: Mesh,
    lowered: jax.stages.Lowered,
    kinds: Mapping,
    advice: str,
    least_bytes: int | None = None,
) -> bool:
    """Compiles a step and prints what there is to know of it.

    Args:
      title: what it is.
      lowered: the step.
      kinds: what it is given, trees of abstract arrays, by what they are.
      advice: what makes it need less memory.
      least_bytes: what a device must read, where that is known.

    Returns:
      whether it fits.
    """
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"{title}, {topology.name}: {topology.chips} chips, {mesh.size} devices, mesh {axes}")
    device = topology.device
    memory = {kind: device_bytes(tree) for kind, tree in kinds.items()}
    print("compiling ...", end=" ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (sizes := out_of_memory(str(error))) is None:
            raise
        need, have = sizes
        print("does not fit", file=sys.stderr)
        _print_memory(memory)
        print(
            f"DOES NOT FIT: a device needs {_size(need)}, the compiler has {_size(have)} (of "
            f"{_size(device.memory)}): {_size(need - have)} too much\nwhat would help: {advice}\n"
        )
        return False
    print(f"took {time.perf_counter() - start:.0f} s", file=sys.stderr)
    stats, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    if stats is None or costs is None or text is None:
        raise RuntimeError(f"the compiler for {topology.name} tells nothing of what it has made")
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    memory["activations"] = stats.temp_size_in_bytes
    memory["program"] = stats.generated_code_size_in_bytes
    memory["padding, output"] = total - sum(memory.values())
    _print_memory(memory | {"all": total})
    print(f"  {'there are':18}{_size(device.memory):>12}")

    program = Program(text)
    flops, num_bytes = costs["flops"], costs["bytes accessed"]
    print(
        f"{1e-9 * flops:.4g} GFLOP a device: {1e-9 * flops / device.tflop_per_s:.3g} ms at the "
        f"published {device.tflop_per_s:g} TFLOP/s\n"
        f"{1e-9 * num_bytes:.4g} GB accessed a device, on-chip memory included: "
        f"{1e-6 * num_bytes / device.gb_per_s:.3g} ms at the published {device.gb_per_s:g} GB/s"
    )
    if least_bytes is not None:
        print(
            f"{1e-9 * least_bytes:.4g} GB of weights, keys and values to be read: "
            f"{1e-6 * least_bytes / device.gb_per_s:.3g} ms at that rate"
        )
    seconds = program.estimated_seconds(costs.get("optimal_seconds", 0.0))
    if seconds is None:
        print("time: the compiler has no estimate; not less than what these peaks allow")
    else:
        print(
            f"time: {1e3 * seconds:.3g} ms by the compiler's cost model, which adds up operations "
            "and leaves out the network between chips"
        )
    found = program.collectives(mesh.size)
    print("collectives:" if found else "collectives: none")
    for c in found:
        note = ", in a loop" if c.in_loop else ""
        size = _size(c.num_bytes)
        print(f"  {c.kind:18}{size:>12} in {c.count}, each among {c.group_size} devices{note}")
    print()
    return True


def _print_memory(sizes: Mapping[str, float]) -> None:
    print("memory of a device:")
    for name, size in sizes.items():
        print(f"  {name:18}{_size(size):>12}")


def _size(num_bytes: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.3f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def train(config: ConfigDict, topology_name: str) -> int:
    """Compiles the train step of a config and prints what there is to know of it.

    Args:
      config: as train.py takes it; its mesh is laid over the topology.
      topology_name: such as `v5e:16x16`.

    Returns:
      an exit status: 1 if the step does not fit.

    Raises:
      ValueError: an unknown topology, or a mesh or a batch that do not divide.
      MissingExtra: libtpu is not installed.
    """
    topology = find_topology(topology_name)
    mesh = make_mesh(**config.mesh, devices=topology.devices)
    batch_size = config.train.batch_size
    teacher = find_teacher(config, mesh, is_abstract=True)
    structure, teacher_params = (None, None) if teacher is None else teacher[:2]
    _, state, step, _ = set_up(config, mesh, is_abstract=True, teacher=structure)
    batch = {
        f"{side}_tokens": _abstract(mesh, "BT", (batch_size, length), jnp.int32)
        for side in ("source", "target")
        if (length := config.data[f"{side}_length"])
    }
    fits = report(
        f"a train step, batch {batch_size}",
        topology,
        mesh,
        step.lower(state, batch, teacher_params),
        {
            "parameters": (state.params, teacher_params),
            "optimizer": state.opt_state,
            "batch": batch,
        },
        "--config.mesh.fsdp and --config.mesh.tensor split parameters and optimizer; a smaller "
        "--config.train.batch_size, a larger topology, --config.train.accumulate=2 (or more) and "
        "--config.model.remat leave fewer activations",
    )
    return 0 if fits else 1


def decode(
    configs: Mapping[str, ConfigDict],
    topology_name: str,
    *,
    batch_sizes: Sequence[int],
    context_lengths: Sequence[int],
    dtypes: Sequence[str] = (),
    schemes: Sequence[str | None] = (),
    cache_dtypes: Sequence[str | None] = (),
) -> int:
    """Compiles a step of greedy decoding as the benchmark measures it, for every variant and size,
    and prints what there is to know of each.

    Args:
      configs: by variant; the mesh of each is laid over the topology.
      topology_name: such as `v2:2x2`.
      batch_sizes: `B`, over all devices.
      context_lengths: `C`, tokens of source and slots of the target's cache.
      dtypes: of weights, activations and caches; each config's `dtype` when empty.
      schemes: as for `mqa_jax.measure.benchmark.sweep`.
      cache_dtypes: likewise.

    Returns:
      an exit status: 1 if some step does not fit.

    Raises:
      As `train`.
    """
    topology, rules = find_topology(topology_name), ShardingRules()
    sizes = {name: TransformerConfig(**config.model.to_dict()) for name, config in configs.items()}
    rows = rows_of(sizes, dtypes, schemes, cache_dtypes)
    fits = True
    for (variant, precision), batch, context_length in itertools.product(
        rows, batch_sizes, context_lengths
    ):
        config, size = configs[variant], in_precision(sizes[variant], precision, context_length)
        mesh = make_mesh(**config.mesh, devices=topology.devices)
        model = nnx.eval_shape(lambda: MODELS[config.task](size, rngs=nnx.Rngs(0)))  # noqa: B023
        graphdef, params = nnx.split(model)
        params = jax.tree.map(_with_sharding, params, rules.params(mesh, params))
        cache, cross = jax.tree.map(
            # The arrays of a cache: keys and values, their scales, the mask of a source, the length
            # of each row.
            lambda x: _abstract(mesh, ("B", "BS", "BKS", "BKSH")[x.ndim - 1], x.shape, x.dtype),  # noqa: B023
            abstract_caches(model, batch, context_length),
        )
        tokens_B = _abstract(mesh, "B", (batch,), jnp.int32)
        context = (cross,) if cross else ()

        def step(
            params: nnx.State, cache: Any, context: tuple[Any, ...], tokens_B: Array
        ) -> tuple[Array, Any]:
            logits_BV, cache = nnx.merge(graphdef, params).decode(tokens_B, cache, *context)  # noqa: B023
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

        shardings = jax.tree.map(lambda x: x.sharding, (tokens_B, cache))
        # The encoder's weights are not used, but they are there.
        compiled = jax.jit(step, donate_argnums=1, out_shardings=shardings, keep_unused=True)
        fits &= report(
            f"{variant}, a decode step in {precision}, batch {batch}, context {context_length}",
            topology,
            mesh,
            compiled.lower(params, cache, context, tokens_B),
            {"parameters": params, "cache": cache, "cross-attention": cross, "batch": tokens_B},
            "smaller --batch_sizes or --context_lengths, a larger topology, a variant with fewer "
            "key/value heads; --config.mesh.tensor splits parameters",
            device_bytes(step_weights(nnx.merge(graphdef, params))) + device_bytes((cache, cross)),
        )
    return 0 if fits else 1


def _abstract(
    mesh: Mesh, axes: str, shape: Sequence[int], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    sharding = ShardingRules().sharding(mesh, axes, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
