"""What is published of the devices that JAX runs on, and what to tell their compiler."""

import functools
import os
import warnings
from typing import Any

import jax

from mqa_jax.core.quantized import FP8

# Published peaks of bfloat16 products in units of 1e12 a second, by what JAX calls a device: a core
# of TPU v2, v3 and 7x, else a chip.
PEAK_TFLOP_PER_S = {
    "TPU v2": 23,
    "TPU v3": 61.5,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU7x": 1153.5,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
}

_CUDA_GRAPHS = "xla_gpu_enable_command_buffer"

# The paper's model on an H100, ms a step with XLA's products and without: 8 rows 0.44 and 0.46,
# 64 rows 0.52 and 0.47, 128 rows 0.60 and 0.52.
MANY_ROWS = 64


def multiplies_fp8(device: jax.Device) -> bool:
    """Whether it has products of float8; others widen them first, which takes longer than bfloat16.

    NVIDIA's from compute capability 8.9 on, and TPU7x.
    """
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None:
        return tuple(map(int, str(capability).split("."))) >= (8, 9)
    return device.device_kind == "TPU7x"


def loop_options(params: Any = (), rows: int = 1) -> dict[str, str | bool]:
    """Compiler options for a loop whose end the device decides: `lowered.compile(loop_options())`.

    On NVIDIA GPUs the whole loop becomes one CUDA graph. As XLA would have it, each turn is one;
    the host asks before each whether there is another, and records the graph anew whenever a
    program is called with arrays that lie elsewhere, which takes milliseconds. XLA_FLAGS that say
    what becomes a graph are left to say so.

    Args:
      params: the weights that the loop is given, for `product_options`.
      rows: of a step, likewise.
    """
    options = product_options(params, rows)
    if not _is_nvidia() or _CUDA_GRAPHS in os.environ.get("XLA_FLAGS", ""):
        return options
    kinds = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
    return options | _known(_CUDA_GRAPHS, kinds)


def product_options(params: Any, rows: int = 1) -> dict[str, str | bool]:
    """Compiler options for a program with these weights: on NVIDIA GPUs, whose products it has.

    For those of float8 XLA tries kernels of its own, of which a vocabulary's takes a minute and
    more to compile. And it chooses them by timing each product alone, where a decode step of many
    rows is faster with cuBLAS's, which add the residual as well.

    Args:
      params: the weights.
      rows: tokens of a decode step, with its beams; 1 where that is not known.
    """
    has_fp8 = any(x.dtype == FP8 for x in jax.tree.leaves(params))
    is_told = (has_fp8 or rows >= MANY_ROWS) and _is_nvidia()
    return _known("xla_gpu_enable_triton_gemm", False) if is_told else {}


def _is_nvidia() -> bool:
    return jax.devices()[0].device_kind.startswith("NVIDIA")


@functools.cache
def _known(name: str, value: str | bool) -> dict[str, str | bool]:
    """XLA refuses what it has no such name for, and names are not promised to stay."""
    options = {name: value}
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except jax.errors.JaxRuntimeError as error:
        warnings.warn(f"programs will be slower, or slower to compile: {error}", stacklevel=3)
        return {}
    return options
