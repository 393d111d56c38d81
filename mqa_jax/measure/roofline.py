"""What a decode step must read and compute, what memory it needs, and what the device can do.

The two probes measure the device as the benchmark finds it; the rest is arithmetic on shapes, for
which abstract arrays (`jax.eval_shape`) do as well as real ones.

Array letters: B batch   C context length   N query heads   H head dim   F feed-forward dim
V vocabulary   S slots of a cache   R rows, B * b of beam search
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mqa_jax.attention.functional import QUERY_BLOCK
from mqa_jax.core.quantized import CACHE_DTYPES, INT8, SCHEMES, is_scales
from mqa_jax.decode.beam import expand
from mqa_jax.measure.cost import Precision
from mqa_jax.measure.timing import milliseconds, timed
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.transformer import EncoderDecoder, Model

# Much more than any cache holds, yet read in a blink.
PROBE_BYTES = 2e9
PROBE_COLUMNS = 4096
PROBE_CALLS = 3
# A product is long enough to be timed when it takes this; no device needs a larger matrix.
PROBE_SECONDS = 0.02
PROBE_SIZES = (1024, 2048, 4096, 8192, 16384)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The limits of a device, as its probes measured them.

    Attributes:
      gb_per_s: bytes read a second, in units of 1e9.
      gflop_per_s: floating-point operations of a matrix product a second, in units of 1e9.
    """

    gb_per_s: float
    gflop_per_s: float

    def milliseconds(self, num_bytes: int, flops: int) -> float:
        """The least time for reading so much and computing so much, both at once."""
        return 1e-6 * max(num_bytes / self.gb_per_s, flops / self.gflop_per_s)


def probe(precision: str) -> Roofline:
    """Measures the default device: the best of several sums over an array that no cache holds, and
    the best of several square matrix products, both of a dtype.

    Args:
      precision: the `str` of a `Precision`. Where it rounds rows to eight bits, as it multiplies
        weights with them, the products are of these.
    """
    dtype, scheme = Precision.of(precision).dtype, Precision.of(precision).quantized
    narrow, rounds_rows = SCHEMES[scheme] if scheme else (None, False)
    size = int(min(PROBE_BYTES, memory_limit() / 8)) // jnp.dtype(dtype).itemsize
    array = jnp.ones((size // PROBE_COLUMNS, PROBE_COLUMNS), dtype)
    # By rows all cores of a CPU take part; a GPU is faster at the sum of all.
    sums = (functools.partial(jnp.sum, axis=axis, dtype=jnp.float32) for axis in (1, None))
    gb_per_s = 1e-9 * array.nbytes / min(_best_seconds(total, array, runs=8) for total in sums)
    del array
    gflop_per_s = 0.0
    product = jnp.matmul
    if rounds_rows:
        wide = jnp.int32 if narrow == INT8 else jnp.float32
        product = functools.partial(jnp.matmul, preferred_element_type=wide)
    for size in PROBE_SIZES:
        matrix = jnp.ones((size, size), narrow if rounds_rows else dtype)
        seconds = _best_seconds(product, matrix, matrix, runs=4)
        gflop_per_s = max(gflop_per_s, 2e-9 * size**3 / seconds)
        if seconds > PROBE_SECONDS:
            break
    return Roofline(gb_per_s, gflop_per_s)


def _best_seconds(function: Callable, *args: Any, runs: int) -> float:
    program = jax.jit(function).lower(*args).compile()
    # Some calls in a row, so that starting them does not count.
    several = lambda: [program(*args) for _ in range(PROBE_CALLS)]  # noqa: E731
    return 1e-3 * min(milliseconds(lambda: timed(several)[0], runs)) / PROBE_CALLS


def memory_limit() -> float:
    """Bytes that the default device has: its own memory, or of a CPU what this process may use."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    limits = [math.inf]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (text := container.read_text().strip()) != "max":
        limits.append(int(text))
    return min(limits)


def check_memory(
    variant: str, model: Model, batch: int, context_length: int, beam_size: int = 1
) -> None:
    """Refuses what does not fit; `model` may be abstract.

    Raises:
      ValueError: the sum of `memory_parts` exceeds `memory_limit`.
    """
    parts = memory_parts(model, batch, context_length, beam_size)
    need, limit = sum(parts.values()), memory_limit()
    if need > limit:
        terms = " + ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
        raise ValueError(
            f"{variant} at batch {batch}, context length {context_length} needs {terms} = "
            f"{need / 1e9:.1f} GB, but the device has {limit / 1e9:.1f} GB: choose smaller "
            "--batch_sizes or --context_lengths"
        )


def memory_parts(
    model: Model, batch: int, context_length: int, beam_size: int = 1
) -> dict[str, int]:
    """Bytes that measuring a model needs, by what they are needed for.

    Encoding and prefill hold the attention logits of one layer, what becomes of them and their
    softmax, three times `[B, N, T, C]` float32 (XLA gets by with two at times; of a long context
    attention takes `T = QUERY_BLOCK` queries at a time), and the inner activations of one
    feed-forward layer, `[B, C, F]`. A step holds the logits, and beam search their logarithmic
    softmax and the scores of all candidates, three times `[R, V]` float32. As steps come behind
    encoding, the larger of the two counts.
    """
    config = model.config
    cache, cross = abstract_caches(model, batch, context_length)
    parts = {"weights": sum(_nbytes(x) for x in jax.tree.leaves(nnx.state(model)))}
    parts["caches"] = kv_bytes((cache, cross))
    if beam_size > 1:
        parts["caches of the beams"] = kv_bytes(expanded(cache, beam_size))
    queries = context_length if context_length <= 2 * QUERY_BLOCK else QUERY_BLOCK
    logits = 3 * 4 * batch * config.num_heads * queries * context_length
    inner = batch * context_length * config.d_ff * jnp.dtype(config.dtype).itemsize
    scores = 3 * 4 * batch * beam_size * config.vocab_size
    name = "encoding" if isinstance(model, EncoderDecoder) else "prefill"
    parts[name if logits + inner > scores else "steps"] = max(logits + inner, scores)
    return parts


def abstract_caches(model: Model, batch: int, context_length: int) -> tuple[Any, Any]:
    """Shapes of the self-attention caches and, of a translation model, the cross-attention caches
    (else `()`)."""
    graphdef, params = nnx.split(model)

    def caches(params: nnx.State, source_BC: Array) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, params)
        cross = model.init_cross_cache(source_BC) if isinstance(model, EncoderDecoder) else ()
        return model.init_cache(batch, context_length), cross

    source_BC = jax.ShapeDtypeStruct((batch, context_length), jnp.int32)
    return jax.eval_shape(caches, params, source_BC)


def expanded(cache: Any, beam_size: int) -> Any:
    """Shapes of the caches of a beam search that starts from `cache`."""
    return jax.eval_shape(functools.partial(expand, beam_size=beam_size), cache)


def step_weights(model: Model) -> list:
    """The weights that a decode step reads.

    Not read are the encoder, the projections of its output (done once), and of the embedding
    tables all but a row a token; a table that is the softmax matrix as well is read whole.
    """
    return [x for _, x in _step_weights(model)]


def _step_weights(model: Model) -> Iterator[tuple[str, Any]]:
    """Names and arrays."""
    softmax = "embedding" if model.softmax is None else "softmax"
    for path, x in jax.tree.leaves_with_path(nnx.as_pure(nnx.state(model))):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        first, second = f"{name}/".split("/")[:2]
        is_projected_once = re.search("/cross_attention/(key|value)", name)
        is_of_decoder = first == "decoder" and second != "embedder" and not is_projected_once
        if is_of_decoder or first in (softmax, "logits_bias"):
            yield name, x


def in_precision(config: TransformerConfig, precision: Precision, length: int) -> TransformerConfig:
    """The config of a row, with as many positions as a context of that length needs."""
    return dataclasses.replace(
        config,
        dtype=precision.dtype,
        param_dtype=precision.dtype,
        quantized=precision.quantized,
        cache_dtype=precision.cache_dtype,
        max_length=max(config.max_length, length),
    )


def rows_of(
    configs: Mapping[str, TransformerConfig],
    dtypes: Sequence[str],
    schemes: Sequence[str | None],
    cache_dtypes: Sequence[str | None],
) -> list[tuple[str, Precision]]:
    """Each variant in each dtype, with each scheme and each dtype of caches, or in the config's own
    where none is given; all variants of a precision together.

    Raises:
      ValueError: a dtype or a scheme that is not known.
    """
    for name, values, known in (
        ("dtype", dtypes, ("float32", "bfloat16", "float16")),
        ("quantize", schemes, (None, *SCHEMES)),
        ("cache_dtype", cache_dtypes, (None, *CACHE_DTYPES)),
    ):
        for value in values:
            if value not in known:
                shown = ", ".join(one or "none" for one in known)
                raise ValueError(f"{name} {value!r} is not one of {shown}")
    rows = [
        (variant, Precision(*each))
        for variant, config in configs.items()
        for each in itertools.product(
            dtypes or [config.dtype],
            schemes or [config.quantized],
            cache_dtypes or [config.cache_dtype],
        )
    ]
    order = [*dict.fromkeys(precision for _, precision in rows)]
    return sorted(rows, key=lambda row: order.index(row[1]))


def largest_batch(model: Model, context_length: int, memory: float) -> int:
    """How many rows can be decoded at once in so many bytes, behind contexts of that length.

    Weights, caches and a step's float32 logits count; what encoding and prefill need beside them
    does not, as rows may come in one after the other. 0 where there is not room for one.

    Args:
      model: may be abstract.
      context_length: `C`, of source and of target.
      memory: in bytes.
    """
    weights = sum(_nbytes(x) for x in jax.tree.leaves(nnx.state(model)))
    row = kv_bytes(abstract_caches(model, 1, context_length)) + 4 * model.config.vocab_size
    return max(0, int((memory - weights) // row))


def weight_bytes(model: Model) -> int:
    """Bytes of `step_weights`."""
    return sum(_nbytes(x) for x in step_weights(model))


def parameters(model: Model) -> int:
    """How many numbers a model has; scales do not count."""
    leaves = jax.tree.leaves_with_path(nnx.state(model))
    return sum(
        x.size
        for path, x in leaves
        if not is_scales(jax.tree_util.keystr(path, simple=True, separator="/"))
    )


def kv_bytes(caches: Any) -> int:
    """Bytes of the keys and values in a tree of caches."""
    return sum(_nbytes(x) for c in _caches(caches) for x in jax.tree.leaves((c.key, c.value)))


def step_flops(model: Model, caches: Any, rows: int) -> int:
    """Floating-point operations of a decode step: of the products with weights, two a weight and
    row; of attention, four a query head, slot, head dim and row. Norms and softmax do not count.

    Args:
      model: of which `step_weights` are multiplied with.
      caches: a tree of self- and cross-attention caches as they are before a beam search begins.
      rows: `R`, tokens decoded at once.
    """
    products = sum(
        2 * x.size
        for name, x in _step_weights(model)
        if x.ndim > 1
        and not name.endswith("bias")
        and "positions" not in name
        and not is_scales(name)
    )
    attention = 0
    for cache in _caches(caches):
        _, _, slots, head_dim = cache.key.shape
        attention += 4 * model.config.num_heads * slots * head_dim
    return rows * (products + attention)


def _caches(tree: Any) -> list:
    is_cache = lambda node: hasattr(node, "key") and hasattr(node, "value")  # noqa: E731
    return jax.tree.leaves(tree, is_leaf=is_cache)


def _nbytes(x: Array | jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize  # an abstract array has no nbytes
