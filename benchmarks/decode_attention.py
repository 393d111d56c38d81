"""One decode step's attention on a GPU: the kernel and XLA's own code, against read bandwidth.

    python benchmarks/decode_attention.py [--sweep] [--output=FILE]

bfloat16, 8 query heads of 128, one new token a row, every slot of the cache filled. Each call goes
through several caches in turn, more than fit into the GPU's second-level cache. `--sweep` tries the
kernel's blocks, splits, warps and stages as well, which is how its defaults were found. The sum of
all keys and values is there to tell what reading so few bytes can reach at all.

Array letters: B batch   S slots   K key/value heads   N query heads   H head dim
"""

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import Array

from mqa_jax.attention import _attend, padding_mask
from mqa_jax.flash_decode import flash_decode

SWEEP = flags.DEFINE_bool("sweep", False, "Try other settings of the kernel than its own.")
OUTPUT = flags.DEFINE_string("output", None, "Where to write the figures as JSON.")

N, H = 8, 128
SHAPES = ((1024, 256), (128, 2048), (64, 8192), (16, 16384), (1, 131072))
ROTATED_BYTES = 4e8


def milliseconds(function: Callable[..., Array], sets: list[tuple[Array, ...]]) -> float:
    """Of one call, in the median of 15 runs through all sets of arguments."""
    program = jax.jit(lambda sets: [function(*args) for args in sets])
    jax.block_until_ready(program(sets))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(3):
            result = program(sets)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / 3)
    return 1e3 * statistics.median(times) / len(sets)


def read_bandwidth() -> float:
    """Bytes a second of a plain sum, the best of several."""
    x = jnp.ones(2**30, jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(x))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready([total(x) for _ in range(4)])
        best = min(best, (time.perf_counter() - start) / 4)
    return x.nbytes / best


def main(_) -> None:
    bandwidth = read_bandwidth()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, reads {bandwidth / 1e12:.2f} TB/s"
    )
    records = []
    for (batch, slots), kv_heads in itertools.product(SHAPES, (1, 8)):
        cache_bytes = 2 * 2 * batch * kv_heads * slots * H
        keys = jax.random.split(jax.random.key(0), max(2, int(ROTATED_BYTES / cache_bytes)))

        @jax.jit
        def arrays(key, batch=batch, kv_heads=kv_heads, slots=slots):
            shapes = (batch, 1, N, H), (batch, kv_heads, slots, H), (batch, kv_heads, slots, H)
            return tuple(
                jax.random.normal(k, shape, jnp.bfloat16)
                for k, shape in zip(jax.random.split(key, 3), shapes, strict=True)
            )

        sets = [(*arrays(key), jnp.full(batch, slots)) for key in keys]

        def plain(query, key, value, end):
            return _attend(query, key, value, padding_mask(end, key.shape[2]))

        def kernel(query, key, value, end, **options):
            return flash_decode(query, key, value, end_B=end, scale=H**-0.5, **options)

        def total(query, key, value, end):
            return jnp.sum(key, dtype=jnp.float32) + jnp.sum(value, dtype=jnp.float32)

        expected, actual = (jax.jit(f)(*sets[0]).astype(jnp.float32) for f in (plain, kernel))
        error = float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))
        candidates = {"sum of both": total, "xla": plain, "kernel": kernel}
        if SWEEP.value:
            settings = itertools.product((1, 2, 4, 8, 16, 32, 64, 128), (64, 128), (4, 8), (2, 3))
            for splits, block, warps, stages in settings:
                # Below, the GPU is not filled; above, it is filled by the batch alone.
                if splits == 1 or 128 <= batch * kv_heads * splits <= 512:
                    name = f"kernel {splits=} {block=} {warps=} {stages=}"
                    candidates[name] = functools.partial(
                        kernel, splits=splits, block=block, num_warps=warps, num_stages=stages
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
                f"{record['bytes_per_second'] / 1e12:5.2f} TB/s {100 * record['fraction']:4.0f} %  "
                f"error {error:.1e}",
                flush=True,
            )
    if OUTPUT.value:
        head = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, bandwidth=bandwidth)
        Path(OUTPUT.value).write_text(json.dumps(head | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
