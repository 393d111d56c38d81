"""What a decode step costs: each attention variant, random weights, on the device at hand.

Array letters: B batch   C context length
"""

import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

from mqa_jax.decoding import greedy
from mqa_jax.generate import Model
from mqa_jax.kv_cache import CrossCache, KVCache, RingCache
from mqa_jax.transformer import EncoderDecoder, TransformerConfig

# Times of a few steps are subtracted from times of more, so that what a call costs once (moving the
# caches into the loop, above all) does not count as part of a step.
FEW_STEPS, MORE_STEPS = 4, 28

LONG_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a variant costs at one batch and context length.

    Attributes:
      variant: its name.
      dtype: of weights, activations and caches.
      batch: rows decoded at once.
      context_length: source tokens, and slots of the target's cache (all of which a step reads).
      parameters: of the whole model.
      encode_ms: encoding the batch and projecting it for all layers; None for a decoder alone.
      step_ms: one greedy step inside the on-device loop, median of the runs.
      step_ms_min: the fastest run.
      step_ms_max: the slowest run.
      encode_us_per_token: `encode_ms` an output token, there being as many as source tokens.
      step_us_per_token: `step_ms` an output token.
      weight_bytes: read by a step.
      kv_bytes: of the self- and cross-attention caches, read by a step.
      compile_seconds: of all programs that were measured.
    """

    variant: str
    dtype: str
    batch: int
    context_length: int
    parameters: int
    encode_ms: float | None
    step_ms: float
    step_ms_min: float
    step_ms_max: float
    encode_us_per_token: float | None
    step_us_per_token: float
    weight_bytes: int
    kv_bytes: int
    compile_seconds: float


def measure(
    variant: str,
    model_type: Callable[..., Model],
    config: TransformerConfig,
    *,
    batch: int,
    context_length: int,
    repeats: int = 5,
) -> Cost:
    """Measures one variant with random weights.

    Args:
      variant: what to call it.
      model_type: `EncoderDecoder` or `DecoderOnly`.
      config: its size; weights are made in `config.dtype`, the positions that the context needs
        are added.
      batch: `B`.
      context_length: `C`, more than 28, the number of steps that are run.
      repeats: runs, of which the median is taken.

    Raises:
      ValueError: `batch` or `repeats` below 1, or a context too short.
    """
    if batch < 1 or repeats < 1:
        raise ValueError(f"batch and repeats must be at least 1, not {batch} and {repeats}")
    if context_length <= MORE_STEPS:
        raise ValueError(
            f"context_length={context_length} is too short: {MORE_STEPS} steps are run in it"
        )
    config = dataclasses.replace(
        config, max_length=max(config.max_length, context_length), param_dtype=config.dtype
    )
    model = model_type(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    is_translation = isinstance(model, EncoderDecoder)
    compile_seconds = 0.0

    def compiled(function, *args):
        nonlocal compile_seconds
        start = time.perf_counter()
        program = jax.jit(function).lower(*args).compile()
        compile_seconds += time.perf_counter() - start
        return program

    encode_ms = None
    context = ()
    if is_translation:
        source_BC = jnp.zeros((batch, context_length), jnp.int32)

        def encode(params, source_BC: Array):
            return nnx.merge(graphdef, params).init_cross_cache(source_BC)

        run_encode = compiled(encode, params, source_BC)
        # A long encoding is measured once: a run beside it that does not count is seconds as well.
        seconds = [_seconds(run_encode, params, source_BC)]
        if seconds[0] < LONG_SECONDS:
            seconds = [_seconds(run_encode, params, source_BC) for _ in range(repeats)]
        encode_ms = 1e3 * statistics.median(seconds)
        context = (run_encode(params, source_BC),)

    # All but the steps to be run have been decoded already.
    cache = tuple(
        dataclasses.replace(layer, length=layer.length + (context_length - MORE_STEPS))
        for layer in model.init_cache(batch, context_length)
    )
    tokens_B = jnp.zeros(batch, jnp.int32)

    def decode(steps: int, params, cache, context, tokens_B: Array) -> Array:
        model = nnx.merge(graphdef, params)
        step_fn = lambda tokens_B, cache: model.decode(tokens_B, cache, *context)  # noqa: E731
        return greedy(step_fn, cache, tokens_B, max_new_tokens=steps).tokens

    args = (params, cache, context, tokens_B)
    few = compiled(functools.partial(decode, FEW_STEPS), *args)
    more = compiled(functools.partial(decode, MORE_STEPS), *args)
    _seconds(few, *args)
    _seconds(more, *args)
    differences = [_seconds(more, *args) - _seconds(few, *args) for _ in range(repeats)]
    step_ms = sorted(1e3 * seconds / (MORE_STEPS - FEW_STEPS) for seconds in differences)
    median_ms = statistics.median(step_ms)
    return Cost(
        variant=variant,
        dtype=config.dtype,
        batch=batch,
        context_length=context_length,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        encode_ms=encode_ms,
        step_ms=median_ms,
        step_ms_min=step_ms[0],
        step_ms_max=step_ms[-1],
        encode_us_per_token=encode_ms and 1e3 * encode_ms / (batch * context_length),
        step_us_per_token=1e3 * median_ms / batch,
        weight_bytes=step_weight_bytes(model),
        kv_bytes=kv_bytes((cache, context)),
        compile_seconds=compile_seconds,
    )


def step_weight_bytes(model: Model) -> int:
    """Bytes of the weights that a decode step reads.

    Not read are the encoder, the projections of its output (done once), and of the embedding
    tables all but a row a token; a table that is the softmax matrix as well is read whole.
    """
    read = [model.decoder.norm, getattr(model, "softmax", model.embedding)]
    for layer in model.decoder.layers:
        read += [layer.attention, layer.attention_norm, layer.feed_forward, layer.feed_forward_norm]
        if isinstance(model, EncoderDecoder):
            cross = layer.cross_attention
            read += [layer.cross_attention_norm, nnx.List([cross.query, cross.out])]
    return sum(x.nbytes for module in read for x in jax.tree.leaves(nnx.state(module)))


def kv_bytes(caches) -> int:
    """Bytes of the keys and values in a tree of caches."""
    is_cache = lambda x: isinstance(x, KVCache | RingCache | CrossCache)  # noqa: E731
    return sum(
        cache.key.nbytes + cache.value.nbytes for cache in jax.tree.leaves(caches, is_leaf=is_cache)
    )


def _seconds(program, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def save(costs: Sequence[Cost], path: str | Path) -> None:
    """Writes the figures, with what they were measured on, as JSON."""
    record = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "costs": [dataclasses.asdict(cost) for cost in costs],
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> list[Cost]:
    """The figures of a file that `save` wrote."""
    return [Cost(**cost) for cost in json.loads(Path(path).read_text(encoding="utf-8"))["costs"]]


def print_table(costs: Sequence[Cost]) -> None:
    """Prints a row for each figure."""
    table = Table(title="The cost of decoding, greedy, random weights")
    columns = ("variant", "dtype", "batch", "context", "encode ms", "step ms", "(min - max)")
    columns += ("encode us/tok", "step us/tok", "weights MB", "KV MB")
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for cost in costs:
        table.add_row(
            cost.variant,
            cost.dtype,
            f"{cost.batch}",
            f"{cost.context_length}",
            "-" if cost.encode_ms is None else f"{cost.encode_ms:.1f}",
            f"{cost.step_ms:.2f}",
            f"{cost.step_ms_min:.2f} - {cost.step_ms_max:.2f}",
            "-" if cost.encode_us_per_token is None else f"{cost.encode_us_per_token:.1f}",
            f"{cost.step_us_per_token:.1f}",
            f"{cost.weight_bytes / 1e6:.1f}",
            f"{cost.kv_bytes / 1e6:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def plot(costs: Sequence[Cost], path: str | Path) -> None:
    """Draws the cost of a step against the context length, a line a variant, as PNG.

    Raises:
      ValueError: the figures are of several batch sizes or dtypes, which one picture cannot show.
    """
    kinds = sorted({(cost.batch, cost.dtype) for cost in costs})
    if len(kinds) != 1:
        raise ValueError(f"a picture shows one batch size and dtype, not {kinds}")
    ((batch, dtype),) = kinds
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for variant in dict.fromkeys(cost.variant for cost in costs):
        line = sorted((c.context_length, c.step_ms) for c in costs if c.variant == variant)
        axes.plot(*zip(*line, strict=True), marker="o", label=variant)
    axes.set(
        xlabel="context length (source and target tokens)",
        ylabel="ms per decode step",
        title=f"One decode step, batch {batch}, {dtype}, on this machine's {jax.default_backend()}",
        ylim=(0, None),
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
