"""Rows of the benchmark, as its record, its table and its pictures take them."""

import dataclasses

from mqa_jax.measure.cost import Cost
from mqa_jax.measure.record import Run

ABOUT = dict(
    date="2026-11-23",
    device="cpu",
    machine="a laptop, 2 cores",
    python="3.13.0",
    jax="0.12.0",
    jaxlib="0.12.0",
    flax="0.12.12",
)
COST = Cost(
    variant="multi_head",
    search="greedy",
    dtype="float32",
    batch=8,
    context_length=128,
    parameters=211_000_000,
    encode_ms=1024.0,
    prefill_ms=700.0,
    steps=32,
    step_ms=40.0,
    step_ms_min=38.5,
    step_ms_max=123.4,
    step_alone_ms=41.0,
    reorder_ms=None,
    encode_us_per_token=1000.0,
    step_us_per_token=5000.0,
    weight_bytes=490_000_000,
    kv_bytes=110_000_000,
    flops=2_000_000_000,
    gb_per_s=15.0,
    probe_gb_per_s=30.0,
    probe_gflop_per_s=180.0,
    roofline_ms=20.0,
    roofline_fraction=0.5,
    compile_seconds=3.0,
)


def cost(variant="multi_head", **changes) -> Cost:
    return dataclasses.replace(COST, variant=variant, **changes)


def run(*costs: Cost, **changes) -> Run:
    return dataclasses.replace(Run(ABOUT, list(costs), is_complete=True), **changes)


def grid(variants, batches, lengths) -> list[Cost]:
    return [cost(v, batch=b, context_length=c) for v in variants for b in batches for c in lengths]
