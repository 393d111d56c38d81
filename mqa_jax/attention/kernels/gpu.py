"""Attention of a few queries to a long cache, as one GPU kernel (Pallas on Triton).

XLA writes the logits and the weights to memory between its products, and its kernels leave much of
a GPU idle when a batch is small. Here the logits never leave a multiprocessor (the softmax is kept
running: Dao et al. 2022), and a cache is cut into splits that are attended to side by side where
the batch alone does not fill the GPU. Keys and values of eight bits are widened in registers: their
scales are factors of the logits and of the weights.

Array letters:
  B batch   T queries   N query heads   K key/value heads   G heads per key/value head   H head dim
  S slots   R rows of a program, T * G   C splits
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mqa_jax.core.quantized import LARGEST, Held, Quantized, held

# Of a product on tensor cores.
MIN_ROWS = 16

# Two programs for each of the 132 multiprocessors of a large GPU, in powers of two; more splits
# than that only add partial results to combine.
PROGRAMS = 256

LEAST = -1e30  # In place of minus infinity, whose difference with itself is not a number.


def flash_decode(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    *,
    new: tuple[tuple[Array, Array], Array] | None = None,
    mask_BTS: Array | None = None,
    end_B: Array | None = None,
    scale: float,
    block: int | None = None,
    splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    interpret: bool = False,
) -> tuple[Array, tuple[Held, Held] | None]:
    """What `dot_product_attention` gives for the same arguments, but without a gradient.

    Slots that nothing may see can hold anything, NaN and infinities too.

    Args:
      query_BTNH: queries, `T * N / K` of them at most 64.
      key_BKSH: keys in cache layout, floats or eight bits with a scale for each token and head.
      value_BKSH: values in cache layout, likewise.
      new: keys and values, each `[B, 1, K, H]`, that are written to slots `[B, 1]` first, in place
        where XLA finds that nobody reads the old ones; not where there is no such slot, and where
        that is below 0 the row turns to NaN. With `T = 1`.
      mask_BTS: bool, True = attend; with `T = 1` for all queries alike. A query that may attend
        to nothing yields zeros.
      end_B: int32, only the first `end_B[b]` slots are read and attended to.
      scale: what the logits are multiplied by.
      block: slots that a program reads at a time, a power of two; chosen from the shape when None.
      splits: programs for each key/value head of each batch element; likewise.
      num_warps: of a program; likewise.
      num_stages: blocks that are on their way from memory at a time; likewise.
      interpret: run without a GPU, slowly.

    Returns:
      `[B, T, N, H]` in the dtype of the queries; and, with `new`, the keys and values.
    """
    batch, length, num_heads, head_dim = query_BTNH.shape
    _, num_kv_heads, slots, _ = key_BKSH.shape
    rows = length * num_heads // num_kv_heads
    if splits is None:
        splits = _splits(batch * num_kv_heads, slots)
    default = _settings(key_BKSH.dtype, splits)
    settings = (block, num_warps, num_stages)
    block, num_warps, num_stages = (
        own if given is None else given for given, own in zip(settings, default, strict=True)
    )
    if end_B is None:
        end_B = jnp.full(batch, slots)
    block = min(block, max(16, pl.next_power_of_2(slots)))
    split_slots = pl.cdiv(pl.cdiv(slots, splits), block) * block
    splits = pl.cdiv(slots, split_slots)

    # Products are taken in the dtype of the cache; eight bits are widened to that of the queries.
    dtype = query_BTNH.dtype if isinstance(key_BKSH, Quantized) else key_BKSH.dtype
    query_BKRH = jnp.moveaxis(
        query_BTNH.astype(dtype).reshape(batch, length, num_kv_heads, -1, head_dim), 1, 2
    ).reshape(batch, num_kv_heads, rows, head_dim)
    kernel = functools.partial(
        _kernel,
        scale=scale,
        block=block,
        split_slots=split_slots,
        slots=slots,
        rows=rows,
    )
    per_head = lambda *shape: pl.BlockSpec(  # noqa: E731
        (None, None, *shape), lambda b, k, c: (b, k) + (0,) * len(shape)
    )
    partial = lambda *shape: pl.BlockSpec(  # noqa: E731
        (None, None, None, *shape), lambda b, k, c: (b, k, c) + (0,) * len(shape)
    )
    leading = (batch, num_kv_heads, splits)
    held_BKSH = (key_BKSH, value_BKSH)
    of_held = jax.tree.map(lambda x: per_head(*x.shape[2:]), held_BKSH)
    written: tuple = () if new is None else held_BKSH
    new_BKH, of_new, slot_B = None, None, None
    if new is not None:
        new_BKH = jax.tree.map(
            lambda x: x[:, 0],
            tuple(held(x, old.dtype) for x, old in zip(new[0], held_BKSH, strict=True)),
        )
        of_new, slot_B = jax.tree.map(lambda x: per_head(*x.shape[2:]), new_BKH), new[1][:, 0]
    per_row = pl.BlockSpec((None,), lambda b, k, c: (b,))
    padded = max(MIN_ROWS, pl.next_power_of_2(rows))
    output_dtype = query_BTNH.dtype if splits == 1 else jnp.float32
    output_BKCRH, largest_BKCR, total_BKCR, held_BKSH = pl.pallas_call(
        kernel,
        grid=leading,
        in_specs=[
            per_head(padded, head_dim),
            of_held,
            per_row,
            mask_BTS
            if mask_BTS is None
            else pl.BlockSpec((None, *mask_BTS.shape[1:]), lambda b, k, c: (b, 0, 0)),
            of_new,
            slot_B if slot_B is None else per_row,
        ],
        out_specs=[
            partial(padded, head_dim),
            partial(padded),
            partial(padded),
            of_held if written else (),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*leading, rows, head_dim), output_dtype),
            jax.ShapeDtypeStruct((*leading, rows), jnp.float32),
            jax.ShapeDtypeStruct((*leading, rows), jnp.float32),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), written),
        ],
        # Behind the queries, and behind the other outputs.
        input_output_aliases={1 + i: 3 + i for i in range(len(jax.tree.leaves(written)))},
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name="flash_decode",
    )(query_BKRH, held_BKSH, end_B.astype(jnp.int32), mask_BTS, new_BKH, slot_B)

    if splits == 1:
        output_BKRH = output_BKCRH[:, :, 0]
    else:
        share_BKCR = total_BKCR * jnp.exp(
            largest_BKCR - jnp.max(largest_BKCR, axis=2, keepdims=True)
        )
        all_BK1R = jnp.sum(share_BKCR, axis=2, keepdims=True)
        share_BKCR /= jnp.where(all_BK1R == 0, 1, all_BK1R)
        output_BKRH = jnp.sum(output_BKCRH * share_BKCR[..., None], axis=2)
    output_BKTGH = output_BKRH.reshape(batch, num_kv_heads, length, -1, head_dim)
    output_BTNH = jnp.moveaxis(output_BKTGH, 2, 1).reshape(query_BTNH.shape)
    output_BTNH = output_BTNH.astype(query_BTNH.dtype)
    return output_BTNH, None if new is None else held_BKSH


def _splits(heads: int, slots: int) -> int:
    """As many as fill the GPU, each of 256 slots at least, and not too many to combine."""
    splits = 1
    while heads * splits < PROGRAMS and splits < 128 and splits * 512 <= slots:
        splits *= 2
    return splits


def _settings(dtype: jnp.dtype, splits: int) -> tuple[int, int, int]:
    """Block, warps and stages, as `benchmarks/decode_attention.py --sweep` found them.

    To widen eight bits takes the time that loading half as much saves, unless many small programs
    share a multiprocessor.
    """
    if dtype in LARGEST:
        return (32, 2, 3) if splits == 1 else (64, 4, 3)
    return (64, 4, 2) if splits == 1 else (128, 4, 2)


def _kernel(
    query_ref: Any,  # [R, H], padded to a power of two, as are the outputs
    held_refs: Any,  # keys and values, each [S, H], or `Quantized` with scales [S]
    end_ref: Any,  # [], no slot from here on is seen
    mask_ref: Any,  # [T, S] bool, or None
    new_refs: Any,  # as `held_refs`, without S, or None
    slot_ref: Any,  # [], where they go, or None
    output_ref: Any,  # [R, H]
    largest_ref: Any,  # [R]
    total_ref: Any,  # [R]
    written_refs: Any,  # `held_refs`, to be written to, or nothing
    *,
    scale: float,
    block: int,
    split_slots: int,
    slots: int,
    rows: int,
) -> None:
    padded, head_dim = query_ref.shape
    row_R = jnp.arange(padded)
    is_row_R = row_R < rows
    length = 1 if mask_ref is None else mask_ref.shape[0]
    query_RH = triton.load(query_ref, mask=is_row_R[:, None], other=0)
    first = pl.program_id(2) * split_slots
    end = jnp.minimum(end_ref[()], first + split_slots)
    (key_ref, key_scales_ref), (value_ref, value_scales_ref) = map(_values_and_scales, held_refs)
    carry = (
        jnp.zeros((padded, head_dim), jnp.float32),
        jnp.full(padded, LEAST, jnp.float32),
        jnp.zeros(padded, jnp.float32),
    )
    slot = None
    if new_refs is not None:
        # Attended to from registers, and left out where its slot comes by: to read there what was
        # written would have to wait, and to put it in among the others takes each block longer.
        slot, new = slot_ref[()], jax.tree.map(lambda ref: ref[...], new_refs)
        is_here = (slot >= first) & (slot < jnp.minimum(first + split_slots, slots))
        for ref, x in zip(jax.tree.leaves(written_refs), jax.tree.leaves(new), strict=True):
            at = ref.at[(slot, *(slice(None),) * x.ndim)]
            triton.store(at, x, mask=jnp.broadcast_to(is_here, x.shape))
        is_here &= slot < end
        if mask_ref is not None:
            at, is_one = slot + jnp.arange(1), jnp.broadcast_to(is_here, (1,))
            seen_1 = triton.load(mask_ref.at[0, at], mask=is_one, other=False)
            is_here &= jnp.max(seen_1.astype(jnp.int32)) > 0
        key_H, value_H = (x.widened() if isinstance(x, Quantized) else x for x in new)
        product_RH = query_RH.astype(jnp.float32) * key_H.astype(jnp.float32)[None]
        logit_R = jnp.sum(product_RH, axis=1) * scale
        value_H = jnp.where(is_here, value_H.astype(jnp.float32), 0.0)
        carry = (
            carry[0] + value_H[None],
            jnp.where(is_here, logit_R, LEAST),
            jnp.where(is_here, jnp.ones_like(logit_R), 0.0),
        )

    def attend(
        i: Array, carry: tuple[Array, Array, Array], *, is_careful: bool
    ) -> tuple[Array, Array, Array]:
        output_RH, largest_R, total_R = carry
        start = first + i * block
        at = pl.ds(start, block)
        slot_S = start + jnp.arange(block)
        is_slot_S = slot_S < slots
        mask_S1 = None if slots % block == 0 else is_slot_S[:, None]
        other = None if mask_S1 is None else 0.0
        key_SH = triton.load(key_ref.at[at, :], mask=mask_S1, other=other)
        is_seen_S = (slot_S < end) & is_slot_S
        if slot is not None:
            is_seen_S &= slot_S != slot
        if mask_ref is not None and length == 1:  # A mask of one query serves all rows.
            is_seen_S &= triton.load(mask_ref.at[0, slot_S], mask=is_slot_S, other=False)
        is_seen_RS = is_seen_S[None]
        # A weight of zero does not keep a NaN out of the product: what no row sees is not loaded.
        # Eight bits are finite, and so need not wait for the mask.
        seen_S1, zero = (is_seen_S[:, None], 0.0) if value_scales_ref is None else (mask_S1, other)
        value_SH = triton.load(value_ref.at[at, :], mask=seen_S1, other=zero)

        logits_RS = triton.dot(query_RH, key_SH.astype(query_RH.dtype).T) * scale
        if key_scales_ref is not None:
            logits_RS *= triton.load(key_scales_ref.at[at], mask=is_slot_S, other=0)[None]
        if length > 1:
            query_R = row_R * length // rows
            is_seen_RS &= triton.load(
                mask_ref.at[query_R[:, None], slot_S[None]],
                mask=is_slot_S[None] & (query_R < length)[:, None],
                other=False,
            )
        if is_careful:
            # What one row sees and another does not spoils the logits of the one.
            is_finite_SH = jnp.abs(value_SH.astype(jnp.float32)) < jnp.inf
            value_SH = jnp.where(is_finite_SH, value_SH, jnp.zeros_like(value_SH))
            bad_S = jnp.max(jnp.where(is_finite_SH, 0.0, 1.0), axis=1)
            logits_RS = jnp.where(bad_S[None] > 0, jnp.nan, logits_RS)
        logits_RS = jnp.where(is_seen_RS, logits_RS, LEAST)
        new_largest_R = jnp.maximum(largest_R, jnp.max(logits_RS, axis=1))
        weights_RS = jnp.where(is_seen_RS, jnp.exp(logits_RS - new_largest_R[:, None]), 0.0)
        shrink_R = jnp.exp(largest_R - new_largest_R)
        total_R = total_R * shrink_R + jnp.sum(weights_RS, axis=1)
        if value_scales_ref is not None:
            scales_S = triton.load(value_scales_ref.at[at], mask=is_slot_S, other=0)
            weights_RS = jnp.where(is_seen_RS, weights_RS * scales_S[None], 0.0)
            value_SH = value_SH.astype(query_RH.dtype)
        added_RH = triton.dot(weights_RS.astype(value_SH.dtype), value_SH)
        return output_RH * shrink_R[:, None] + added_RH, new_largest_R, total_R

    blocks = jnp.maximum(end - first + block - 1, 0) // block
    found = lax.fori_loop(0, blocks, functools.partial(attend, is_careful=False), carry)
    if length > 1 and value_scales_ref is None:  # Eight bits are finite.
        # Rows that see different slots: a value that is not finite has come to all of them, seen or
        # not. To look at every value costs a fifth of the time, so that is done where it is needed
        # alone, by a loop that has nothing to do otherwise.
        is_bad_R = jnp.max(jnp.where(jnp.abs(found[0]) < jnp.inf, 0, 1), axis=1)
        is_bad = jnp.max(is_bad_R) > 0
        found = jax.tree.map(lambda new, old: jnp.where(is_bad, old, new), found, carry)
        found = lax.fori_loop(
            0, jnp.where(is_bad, blocks, 0), functools.partial(attend, is_careful=True), found
        )
    output_RH, largest_R, total_R = found
    output_RH /= jnp.where(total_R == 0, 1, total_R)[:, None]
    if slot is not None:
        output_RH = jnp.where(slot < 0, jnp.nan, output_RH)
    triton.store(output_ref, output_RH.astype(output_ref.dtype), mask=is_row_R[:, None])
    triton.store(largest_ref, largest_R, mask=is_row_R)
    triton.store(total_ref, total_R, mask=is_row_R)


def _values_and_scales(ref: Any) -> tuple[Any, Any]:
    return (ref.values, ref.scales) if isinstance(ref, Quantized) else (ref, None)
