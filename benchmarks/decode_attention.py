"""One decode step's attention: the engine's way and the plain way, against read bandwidth.

    python benchmarks/decode_attention.py [--sweep] [--output=FILE]
    python benchmarks/decode_attention.py --dtype=float32 --shapes=8x2048

8 query heads of 128, one new token a row, every slot of the cache filled, multi-query and
multi-head. Each call goes through several caches in turn, more than fit into a processor's own
caches. On a GPU the engine's way is its kernel, of which `--sweep` tries other blocks, splits,
warps and stages: that is how its defaults were found. The sum of all keys and values is there to
tell what reading so few bytes can reach at all.

Array letters: B batch   S slots   K key/value heads   N query heads   H head dim
"""

import functools
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import Array

from mqa_jax.attention import padding_mask
from mqa_jax.attention.cache import check_cache_dtype
from mqa_jax.attention.cached import attend_to_cache
from mqa_jax.attention.functional import attend
from mqa_jax.attention.kernels.gpu import flash_decode
from mqa_jax.core.devices import loop_options
from mqa_jax.core.quantized import LARGEST, held
from mqa_jax.measure.roofline import probe

DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32", "int8", "fp8"],
    "Of caches; queries have no eight bits.",
)
SHAPES = flags.DEFINE_list(
    "shapes", ["1024x256", "128x2048", "64x8192", "16x16384", "1x131072"], "Rows x slots."
)
SWEEP = flags.DEFINE_bool("sweep", False, "Try other settings of the kernel than its own.")
OUTPUT = flags.DEFINE_string("output", None, "Where to write the figures as JSON.")

N, H = 8, 128
ROTATED_BYTES = 4e8


def milliseconds(function: Callable[..., Array], sets: list[tuple[Array, ...]]) -> float:
    """Of one call, in the median of 15 runs through all sets of arguments."""
    # On a GPU one graph: else each call of a kernel waits for the host.
    program = jax.jit(lambda sets: [function(*args) for args in sets])
    program = program.lower(sets).compile(loop_options())
    jax.block_until_ready(program(sets))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(3):
            result = program(sets)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / 3)
    return 1e3 * statistics.median(times) / len(sets)


def main(_) -> None:
    if SWEEP.value and jax.default_backend() != "gpu":
        raise app.UsageError("--sweep is of the kernel, which runs on a GPU")
    dtype = check_cache_dtype("--dtype", DTYPE.value)
    query_dtype = "bfloat16" if dtype in LARGEST else DTYPE.value
    bandwidth = 1e9 * probe(query_dtype).gb_per_s
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {DTYPE.value}, reads "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    records = []
    shapes = []
    for shape in SHAPES.value:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise app.UsageError(f"--shapes takes rows x slots such as 8x2048, not {shape!r}")
        shapes.append(tuple(map(int, shape.split("x"))))
    for (batch, slots), kv_heads in itertools.product(shapes, (1, 8)):
        # Of eight bits with a scale for each vector.
        vector_bytes = dtype.itemsize * H + 4 * (dtype in LARGEST)
        cache_bytes = 2 * vector_bytes * batch * kv_heads * slots
        keys = jax.random.split(jax.random.key(0), max(2, int(ROTATED_BYTES / cache_bytes)))

        @jax.jit
        def arrays(key, batch=batch, kv_heads=kv_heads, slots=slots):
            shapes = (batch, 1, N, H), (batch, kv_heads, slots, H), (batch, kv_heads, slots, H)
            query, key, value = (
                jax.random.normal(k, shape, query_dtype)
                for k, shape in zip(jax.random.split(key, 3), shapes, strict=True)
            )
            return query, held(key, dtype), held(value, dtype)

        sets = [(*arrays(key), jnp.full(batch, slots)) for key in keys]

        def plain(query, key, value, end):
            return attend(query, key, value, padding_mask(end, key.shape[2]))

        def engine(query, key, value, end):
            mask = padding_mask(end, key.shape[2])
            return attend_to_cache(query, key, value, mask, end_B=end)

        def total(query, key, value, end):
            leaves = jax.tree.leaves((key, value))
            return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves)

        expected, actual = (jax.jit(f)(*sets[0]).astype(jnp.float32) for f in (plain, engine))
        error = float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))
        candidates = {"sum of both": total, "plain": plain, "engine": engine}
        if SWEEP.value:
            settings = itertools.product(
                (1, 2, 4, 8, 16, 32, 64, 128), (32, 64, 128), (2, 4, 8), (2, 3)
            )
            for splits, block, warps, stages in settings:
                # Below, the GPU is not filled; above, it is filled by the batch alone.
                if splits == 1 or 128 <= batch * kv_heads * splits <= 512:
                    name = f"kernel {splits=} {block=} {warps=} {stages=}"
                    candidates[name] = functools.partial(
                        lambda query, key, value, end, **options: flash_decode(
                            query, key, value, end_B=end, scale=H**-0.5, **options
                        )[0],
                        splits=splits,
                        block=block,
                        num_warps=warps,
                        num_stages=stages,
                    )
        for name, function in candidates.items():
            try:
                ms = milliseconds(function, sets)
            except Exception as error_of_settings:  # What does not fit is no candidate.
                if not name.startswith("kernel "):
                    raise
                print(f"  {name}: {type(error_of_settings).__name__}")
                continue
            record = dict(batch=batch, slots=slots, kv_heads=kv_heads, code=name, ms=ms)
            record |= dict(bytes_per_second=cache_bytes / (ms / 1e3), error=error)
            record["fraction"] = record["bytes_per_second"] / bandwidth
            records.append(record)
            print(
                f"B={batch:5d} S={slots:6d} K={kv_heads} {name:40s} {1e3 * ms:7.1f} us "
                f"{record['bytes_per_second'] / 1e9:7.1f} GB/s {100 * record['fraction']:4.0f} %  "
                f"error {error:.1e}",
                flush=True,
            )
    if OUTPUT.value:
        head = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, bandwidth=bandwidth)
        Path(OUTPUT.value).write_text(json.dumps(head | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
