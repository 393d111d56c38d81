"""What decoding costs: each attention variant, random weights, on the device at hand.

`sweep` measures; `roofline` says what a step must read and compute and what the device can do;
`report` writes it down and draws it.

Array letters: B batch   C context length   b beam   R rows, B * b
"""

import dataclasses
import datetime
import functools
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx
from jax import Array, lax

from mqa_jax.core.checks import check_integer
from mqa_jax.core.devices import loop_options, product_options
from mqa_jax.decode.beam import beam_search, expand, reorder
from mqa_jax.decode.search import greedy
from mqa_jax.measure.cost import BEAM_SIZE, SEARCHES, Cost
from mqa_jax.measure.roofline import (
    Roofline,
    abstract_caches,
    check_memory,
    expanded,
    in_precision,
    kv_bytes,
    parameters,
    probe,
    rows_of,
    step_flops,
    weight_bytes,
)
from mqa_jax.measure.timing import milliseconds, no_compilation, timed
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.transformer import EncoderDecoder, Model

# What a call costs once is spread over so many steps; a short context has room for fewer.
STEPS = 32
MOST = 2**31 - 1  # of an axis, whose indices are int32


def sweep(
    models: Mapping[str, tuple[Callable[..., Model], TransformerConfig]],
    *,
    batch_sizes: Sequence[int],
    context_lengths: Sequence[int],
    dtypes: Sequence[str] = (),
    schemes: Sequence[str | None] = (),
    cache_dtypes: Sequence[str | None] = (),
    searches: Sequence[str] = ("greedy",),
    repeats: int = 5,
) -> Iterator[Cost]:
    """Measures every variant with every search, precision, batch and context length.

    Args:
      models: by variant, `EncoderDecoder` or `DecoderOnly` and its size, to which the positions
        that the contexts need are added. Weights are random.
      batch_sizes: `B`.
      context_lengths: `C`, at least 2: a step runs behind at least one token.
      dtypes: of weights, activations and caches; each config's `dtype` when empty.
      schemes: of weights in eight bits, with each dtype; None for none. Each config's when empty.
      cache_dtypes: of keys and values, with each of these; None for the dtype itself.
      searches: of `SEARCHES`.
      repeats: runs of which the median is taken, after one that does not count.

    Yields:
      a row as soon as it has been measured.

    Raises:
      ValueError: on the first row, an argument that cannot be measured, or a size that does not fit
        into memory: nothing has been measured then.
      RuntimeError: something was compiled while it was measured.
    """
    sizes = _check(models, batch_sizes, context_lengths, searches, repeats)
    longest = max(context_length for _, context_length in sizes)
    configs = {variant: config for variant, (_, config) in models.items()}
    plans = []
    for variant, precision in rows_of(configs, dtypes, schemes, cache_dtypes):
        model_type, config = models[variant]
        make = functools.partial(model_type, in_precision(config, precision, longest))
        model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        for batch, context_length in sizes:
            beam_size = BEAM_SIZE if "beam" in searches else 1
            check_memory(variant, model, batch, context_length, beam_size)
        plans.append((variant, str(precision), make))

    rooflines = {}
    for variant, name, make in plans:
        if name not in rooflines:
            rooflines[name] = probe(name)
        model = make(rngs=nnx.Rngs(0))
        for batch, context_length in sizes:
            bench = _Bench(model, batch, context_length, repeats)
            for search in searches:
                yield bench.cost(variant, search, name, rooflines[name])
            del bench  # There may be no room for its caches beside the next ones.
        del model


def step_milliseconds(
    models: Sequence[Model], batch: int, context_length: int, *, repeats: int = 5
) -> list[float]:
    """What a greedy decode step of each model takes, all in one run: they take turns, so that what
    else the machine does meanwhile is of all of them alike.

    Args:
      models: with their weights, of which all fit into memory together.
      batch: `B`.
      context_length: `C`, at least 2, and no more than the models know positions.
      repeats: turns, of which each one's median is taken.

    Raises:
      ValueError: a size that cannot be measured, or does not fit into memory.
      RuntimeError: something was compiled while it was measured.
    """
    sizes = _check({"a model": models}, [batch], [context_length], ("greedy",), repeats)
    for model in models:
        check_memory("the model", model, *sizes[0])
    benches = [_Bench(model, batch, context_length, repeats) for model in models]
    runs = [bench.greedy_run() for bench in benches]
    for run in runs:  # Which does not count.
        run()
    with no_compilation():
        turns = [[run() for run in runs] for _ in range(repeats)]
    return [
        1e3 * statistics.median(times) / bench.steps
        for times, bench in zip(zip(*turns, strict=True), benches, strict=True)
    ]


def _check(
    models: Mapping[str, Any],
    batch_sizes: Sequence[int],
    context_lengths: Sequence[int],
    searches: Sequence[str],
    repeats: int,
) -> list[tuple[int, int]]:
    """Every batch size with every context length."""
    if not (models and batch_sizes and context_lengths and searches):
        raise ValueError(
            "nothing to measure: give at least one variant, batch size, context length and search"
        )
    check_integer("repeats", repeats)
    batch_sizes = [check_integer("a batch size", size, most=MOST) for size in batch_sizes]
    # At least one token in the cache and one step behind it.
    lengths = [check_integer("a context length", c, least=2, most=MOST) for c in context_lengths]
    for search in searches:
        if search not in SEARCHES:
            raise ValueError(f"search {search!r} is not one of {list(SEARCHES)}")
    return list(itertools.product(batch_sizes, lengths))


def describe() -> dict[str, str | int]:
    """When and on what a run is made: date, device, machine and versions; on a CPU of Linux also
    `cache_bytes`, what its caches hold."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # where Linux has the processor's name
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
    device = jax.devices()[0]
    cache_bytes = _cache_bytes() if device.platform == "cpu" else 0
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "machine": f"{processor}, {os.cpu_count()} cores",
        **({"cache_bytes": cache_bytes} if cache_bytes else {}),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
    }


def probe_again(precision: str) -> dict[str, float]:
    """The device's limits as `record` wants them behind the rows."""
    return dataclasses.asdict(probe(precision))


def _cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """What the largest caches of all processors hold together, as Linux tells; 0 if it does not."""
    caches: dict[tuple[int, str], int] = {}
    for cache in root.glob("cpu[0-9]*/cache/index*"):
        try:
            level, cores, size = (
                (cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
            caches[int(level), cores] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last)


class _Bench:
    """One model at one size: encoded and prefilled once, then decoded from by each search.

    All programs are compiled ahead of time. Caches are donated wherever a program returns them, and
    kept in one place alone: there may be no room for two.
    """

    def __init__(self, model: Model, batch: int, context_length: int, repeats: int):
        self.model, self.batch, self.context_length = model, batch, context_length
        self.repeats, self.steps = repeats, min(STEPS, context_length - 1)
        self.graphdef, params = nnx.split(model)
        # As a list, which a call takes apart much faster than a tree of modules.
        self.params, self.treedef = jax.tree.flatten(params)
        self.compile_seconds = 0.0
        self.tokens_B = jnp.zeros(batch, jnp.int32)
        self.tokens_BC = jnp.zeros((batch, context_length), jnp.int32)
        self.cache = model.init_cache(batch, context_length)
        self.context: tuple[
            Any, ...
        ] = ()  # of a translation model (cross caches,): what `decode` takes besides
        self.encode_ms = self._encode() if isinstance(model, EncoderDecoder) else None
        self.prefill_ms = self._prefill()
        self.shared_compile_seconds = self.compile_seconds

    def cost(self, variant: str, search: str, precision: str, roofline: Roofline) -> Cost:
        """Measures `search`."""
        self.compile_seconds = self.shared_compile_seconds
        self_cache, cross = abstract_caches(self.model, self.batch, self.context_length)
        flops_of = functools.partial(step_flops, self.model, (self_cache, cross))
        if search == "greedy":
            steps, times_ms, alone_ms, reorder_ms = *self._greedy(), self._alone(), None
            flops = flops_of(self.batch)
        else:
            steps, times_ms, reorder_ms = self._beam()
            alone_ms = None
            flops = flops_of(self.batch * BEAM_SIZE)
            self_cache = expanded(self_cache, BEAM_SIZE)
        step_ms = statistics.median(times_ms)
        read = (weight_bytes(self.model), kv_bytes((self_cache, cross)))
        roofline_ms = roofline.milliseconds(sum(read), flops)
        tokens = self.batch * self.context_length
        return Cost(
            variant=variant,
            search=search,
            dtype=precision,
            batch=self.batch,
            context_length=self.context_length,
            parameters=parameters(self.model),
            encode_ms=self.encode_ms,
            prefill_ms=self.prefill_ms,
            steps=steps,
            step_ms=step_ms,
            step_ms_min=min(times_ms),
            step_ms_max=max(times_ms),
            step_alone_ms=alone_ms,
            reorder_ms=reorder_ms,
            encode_us_per_token=None if self.encode_ms is None else 1e3 * self.encode_ms / tokens,
            step_us_per_token=1e3 * step_ms / self.batch,
            weight_bytes=read[0],
            kv_bytes=read[1],
            flops=flops,
            gb_per_s=1e-6 * sum(read) / step_ms,
            probe_gb_per_s=roofline.gb_per_s,
            probe_gflop_per_s=roofline.gflop_per_s,
            roofline_ms=roofline_ms,
            roofline_fraction=roofline_ms / step_ms,
            compile_seconds=self.compile_seconds,
        )

    def _encode(self) -> float:
        def init_cross_cache(params: list[Array], tokens_BC: Array) -> Any:
            model = self._merge(params)
            return model.init_cross_cache(tokens_BC) if isinstance(model, EncoderDecoder) else ()

        encode = self._compile(init_cross_cache, self.params, self.tokens_BC)

        def run() -> float:
            self.context = ()
            seconds, cross = timed(encode, self.params, self.tokens_BC)
            self.context = (cross,)
            return seconds

        return statistics.median(milliseconds(run, self.repeats, once_if_long=True))

    def _prefill(self) -> float:
        def prefill(
            params: list[Array], tokens_BC: Array, cache: Any, context: tuple[Any, ...]
        ) -> Any:
            return self._merge(params).prefill(tokens_BC, cache, *context)[1]

        program = self._compile(
            prefill, self.params, self.tokens_BC, self.cache, self.context, donate=2
        )

        def run() -> float:
            cache = _with_length(self.cache, 0)
            seconds, self.cache = timed(program, self.params, self.tokens_BC, cache, self.context)
            return seconds

        return statistics.median(milliseconds(run, self.repeats, once_if_long=True))

    def _greedy(self) -> tuple[int, list[float]]:
        """The number of steps, and the milliseconds of one in each run."""
        run = self.greedy_run()
        return self.steps, [ms / self.steps for ms in milliseconds(run, self.repeats)]

    def greedy_run(self) -> Callable[[], float]:
        """What takes `steps` greedy steps behind the context, and returns the seconds."""

        def decode(
            params: list[Array], cache: Any, context: tuple[Any, ...], tokens_B: Array
        ) -> tuple[Array, Any]:
            step_fn = self._step_fn(params, context)
            decoded = greedy(step_fn, cache, tokens_B, max_new_tokens=self.steps)
            return decoded.tokens, decoded.cache

        args = (self.params, self.cache, self.context, self.tokens_B)
        options = loop_options(self.params, self.tokens_B.size)
        program = self._compile(decode, *args, donate=1, options=options)

        def run() -> float:
            cache = _with_length(self.cache, self.context_length - self.steps)
            seconds, (_, self.cache) = timed(
                program, self.params, cache, self.context, self.tokens_B
            )
            return seconds

        return run

    def _alone(self) -> float:
        """The milliseconds of a greedy step that Python calls, one after the other."""

        def step(
            params: list[Array], cache: Any, context: tuple[Any, ...], tokens_B: Array
        ) -> tuple[Array, Any]:
            logits_BV, cache = self._step_fn(params, context)(tokens_B, cache)
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

        args = (self.params, self.cache, self.context, self.tokens_B)
        options = product_options(self.params, self.tokens_B.size)
        program = self._compile(step, *args, donate=1, options=options)

        def steps() -> Array:
            tokens_B = self.tokens_B
            for _ in range(self.steps):
                tokens_B, self.cache = program(self.params, self.cache, self.context, tokens_B)
            return tokens_B

        def run() -> float:
            self.cache = _with_length(self.cache, self.context_length - self.steps)
            return timed(steps)[0]

        return statistics.median(milliseconds(run, self.repeats)) / self.steps

    def _beam(self) -> tuple[int, list[float], float]:
        """As `_greedy`, and the milliseconds that reordering takes of a step."""
        cache, steps = _with_length(self.cache, self.context_length - self.steps), None

        def decode(
            params: list[Array], cache: Any, context: tuple[Any, ...], tokens_B: Array
        ) -> tuple[Array, Any]:
            step_fn = self._step_fn(params, context)
            decoded = beam_search(
                step_fn,
                cache,
                tokens_B,
                beam_size=BEAM_SIZE,
                max_new_tokens=self.steps,
                eos_id=0,
            )
            return decoded.tokens, decoded.steps

        args = (self.params, cache, self.context, self.tokens_B)
        options = loop_options(self.params, self.tokens_B.size * BEAM_SIZE)
        program = self._compile(decode, *args, options=options)
        # Every run begins with expanding the caches, which is no part of a step.
        expand_beams = self._compile(functools.partial(expand, beam_size=BEAM_SIZE), cache)

        def run() -> float:
            nonlocal steps
            seconds, (_, steps) = timed(program, *args)
            return seconds

        times_ms, steps = milliseconds(run, self.repeats), int(np.asarray(steps))
        expand_ms = min(milliseconds(lambda: timed(expand_beams, cache)[0], self.repeats))
        # Noise must not make it more than it can be.
        expand_ms = min(expand_ms, min(times_ms) / 2)

        parent_b = np.roll(np.arange(BEAM_SIZE, dtype=np.int32), 1)
        parent_Bb = jax.device_put(np.tile(parent_b, (self.batch, 1)))
        beams = expand_beams(cache)
        reorder_steps = self._compile(
            lambda cache, parent_Bb: lax.fori_loop(
                0, self.steps, lambda _, cache: reorder(cache, parent_Bb), cache
            ),
            beams,
            parent_Bb,
            donate=0,
        )

        def run_reorder() -> float:
            nonlocal beams
            seconds, beams = timed(reorder_steps, beams, parent_Bb)
            return seconds

        reorder_ms = statistics.median(milliseconds(run_reorder, self.repeats)) / self.steps
        return steps, [(ms - expand_ms) / steps for ms in times_ms], reorder_ms

    def _merge(self, params: list[Array]) -> Model:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, params))

    def _step_fn(self, params: list[Array], context: tuple[Any, ...]) -> Callable:
        model = self._merge(params)
        return lambda tokens_R, cache: model.decode(tokens_R, cache, *context)

    def _compile(
        self,
        function: Callable,
        *args: Any,
        donate: int | None = None,
        options: dict[str, str | bool] | None = None,
    ) -> jax.stages.Compiled:
        start = time.perf_counter()
        jitted = jax.jit(function, donate_argnums=() if donate is None else donate)
        program = jitted.lower(*args).compile(options or product_options(self.params))
        self.compile_seconds += time.perf_counter() - start
        return program


def _with_length(cache: tuple, length: int) -> tuple:
    """The caches with all rows `length` tokens long, ready on the device; compiles nothing."""
    return jax.block_until_ready(
        tuple(
            dataclasses.replace(
                layer, length=jax.device_put(np.full(layer.length.shape, length, np.int32))
            )
            for layer in cache
        )
    )
