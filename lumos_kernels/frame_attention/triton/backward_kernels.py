"""The backward pass. With p the probabilities and do, dlse the gradients that arrive,
    dv = p^T do,   dp = do v^T,   delta = rowsum(do * o) - dlse,   ds = p * (dp - delta),
    dq = scale ds k,   dk = scale ds^T q.

Deterministic: one kernel owns key tiles and makes dk and dv, another owns query tiles and makes dq. Both recompute s
and dp, which is 7 matmuls. Fused: the first kernel also adds its part of dq to fp32 memory, which is 5 matmuls, in an
order that differs from run to run. Either way the program of a key tile walks over all query heads of its kv head, so
dk and dv need no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import kernel_types as kt
from .primitives import (
    LOG2_E,
    head_offset,
    load_tile,
    pointer_tile,
    row_limits,
    store_tile,
    visible_range,
    whole_range,
    work_item,
)

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["queries", "keys", "padded", "grad_lse_stride_h", "grad_lse_stride_t"])
def _delta_kernel(
    grad_o: kt.Pointer,
    o: kt.Pointer,
    lse_ptr: kt.Pointer,
    grad_lse_ptr: kt.Pointer,
    statistics_ptr: kt.Pointer,
    limits_ptr: kt.Pointer,
    kv_start_ptr: kt.Pointer,
    kv_end_ptr: kt.Pointer,
    grad_o_strides: kt.Scalar,
    o_strides: kt.Scalar,
    grad_lse_stride_h: kt.Scalar,
    grad_lse_stride_t: kt.Scalar,
    queries: kt.Scalar,
    keys: kt.Scalar,
    padded: kt.Scalar,
    heads: kt.Scalar,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INT64: tl.constexpr,
) -> None:
    """Write the statistics fp32 [2, H, padded], lse in base 2, then delta, and the limits for _key_kernel.

    These are one array of int32: for each tile of BLOCK_M queries the range of keys that all of them see, [2, tiles],
    then the clamped limits of each query, [2, padded].

    The loops load the statistics without a mask. So a row without keys and the rows past the last one get lse = +inf
    and delta = 0: p = exp2(s - inf) is 0 even before it is masked.
    """
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    do = load_tile(grad_o, grad_o_strides, first, head, queries, D, BLOCK, PADDED_D, False, INT64)
    out = load_tile(o, o_strides, first, head, queries, D, BLOCK, PADDED_D, False, INT64)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    row = first + tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + head_offset(head, queries, INT64) + row, mask=row < queries, other=float("-inf"))
    if grad_lse_ptr is not None:
        if INT64:
            row_64, head_64 = row.to(tl.int64), head.to(tl.int64)
            offset = head_64 * grad_lse_stride_h + row_64 * grad_lse_stride_t
        else:
            offset = head * grad_lse_stride_h + row * grad_lse_stride_t
        delta -= tl.load(grad_lse_ptr + offset, mask=row < queries, other=0.0)
    keyless = lse == float("-inf")
    at = statistics_ptr + head_offset(head, padded, INT64) + row
    tl.store(at, tl.where(keyless, float("inf"), lse * _LOG2_E))
    tl.store(at + head_offset(heads, padded, INT64), tl.where(keyless, 0.0, delta))
    if head == 0:
        for tile in tl.static_range(BLOCK // BLOCK_M):
            i = first + tile * BLOCK_M
            start, end = row_limits(kv_start_ptr, kv_end_ptr, i, queries, keys, BLOCK_M)
            whole_low, whole_high = whole_range(start, end, i, queries, keys, BLOCK_M)
            tl.store(limits_ptr + i // BLOCK_M, whole_low)
            tl.store(limits_ptr + (padded + i) // BLOCK_M, whole_high)
            of_rows = limits_ptr + 2 * padded // BLOCK_M + i + tl.arange(0, BLOCK_M)
            tl.store(of_rows, start)
            tl.store(of_rows + padded, end)


@triton.jit(do_not_specialize=["queries", "keys", "padded", "per_section"])
def _key_kernel(
    q: kt.Descriptor,
    k: kt.Descriptor,
    v: kt.Descriptor,
    grad_o: kt.Descriptor,
    dk: kt.Descriptor,
    dv: kt.Descriptor,
    dq: kt.Descriptor,
    statistics_ptr: kt.Pointer,
    limits_ptr: kt.Pointer,
    q_start_ptr: kt.Pointer,
    q_end_ptr: kt.Pointer,
    q_strides: kt.Scalar,
    k_strides: kt.Scalar,
    v_strides: kt.Scalar,
    grad_o_strides: kt.Scalar,
    dk_strides: kt.Scalar,
    dv_strides: kt.Scalar,
    dq_strides: kt.Scalar,
    queries: kt.Scalar,
    padded: kt.Scalar,
    keys: kt.Scalar,
    kv_heads: kt.Scalar,
    group: kt.Scalar,
    per_section: kt.Scalar,
    scale: kt.Scalar,
    scale_log2: kt.Scalar,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
) -> None:
    """Write dk and dv of a key tile. FUSED: also add the tile's part of dq to fp32 memory.

    Everything is transposed, keys x queries: p and ds come out of their matmuls as the left operands of dv and dk, and
    go into them from registers. q_start and q_end only bound the loop. What is masked follows from the limits of each
    query, which _delta_kernel wrote.
    """
    tile, kv_head = work_item(tl.program_id(0), tl.cdiv(keys, BLOCK_N), kv_heads, per_section)
    first = tile * BLOCK_N  # heaviest first: the first keys of a video are seen by the most queries
    start_of_key, end_of_key = row_limits(q_start_ptr, q_end_ptr, first, keys, queries, BLOCK_N)
    low, high = visible_range(start_of_key, end_of_key, queries, BLOCK_M)
    k_tile = load_tile(k, k_strides, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
    v_tile = load_tile(v, v_strides, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
    dk_sum = tl.zeros([BLOCK_N, PADDED_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, PADDED_D], tl.float32)
    for head in range(kv_head * group, (kv_head + 1) * group):
        lse_ptr = statistics_ptr + head_offset(head, padded, INT64)
        delta_ptr = lse_ptr + head_offset(kv_heads * group, padded, INT64)
        for i in tl.range(low, high, BLOCK_M):
            whole_low = tl.load(limits_ptr + i // BLOCK_M)
            whole_high = tl.load(limits_ptr + (padded + i) // BLOCK_M)
            q_tile = load_tile(q, q_strides, i, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
            do = load_tile(grad_o, grad_o_strides, i, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
            row = i + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_ptr + row)
            delta = tl.load(delta_ptr + row)
            s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
            # dp - delta, with -delta as the initial sum of the matmul: that costs no registers and spills nothing.
            dp = tl.broadcast_to(-delta[None, :], (BLOCK_N, BLOCK_M))
            dp = tl.dot(v_tile, do.T, dp, input_precision=PRECISION)
            p = tl.exp2(s * scale_log2 - lse[None, :])
            # Rows past the last key must not reach dq, and their p = exp2(0 - lse) may be infinite. A tile with such
            # rows is always masked: no whole range goes beyond the last key.
            if (first < whole_low) | (first + BLOCK_N > whole_high):
                # Loaded here and not before the matmuls, because registers are scarce.
                of_rows = limits_ptr + 2 * padded // BLOCK_M + row
                start, end = tl.load(of_rows), tl.load(of_rows + padded)
                key = (first + tl.arange(0, BLOCK_N))[:, None]
                p = tl.where((key >= start[None, :]) & (key < end[None, :]), p, 0.0)
            dv_sum = tl.dot(p.to(do.dtype), do, dv_sum, input_precision=PRECISION)
            ds = (p * dp).to(q_tile.dtype)
            if FUSED:
                _add_dq(
                    dq, dq_strides, tl.dot(ds.T, k_tile, input_precision=PRECISION),
                    i, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64,
                )  # fmt: skip
            # After dq: with dk first, triton 3.6.0 needs more registers than there are at D = 128.
            dk_sum = tl.dot(ds, q_tile, dk_sum, input_precision=PRECISION)
    store_tile(dk, dk_strides, dk_sum * scale, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
    store_tile(dv, dv_strides, dv_sum, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)


@triton.jit
def _add_dq(
    dq: kt.Descriptor, strides: kt.Scalar, value: kt.Block, first: kt.Scalar, head: kt.Scalar, rows: kt.Scalar,
    D: tl.constexpr, BLOCK: tl.constexpr, PADDED_D: tl.constexpr, RANK: tl.constexpr, INT64: tl.constexpr,
) -> None:  # fmt: skip
    """Add a tile of fp32 values to dq."""
    if RANK == 2:
        dq.atomic_add([first, head * D], value)
    elif RANK == 3:
        dq.atomic_add([first, head, 0], value.reshape(BLOCK, 1, PADDED_D))
    else:
        offset, mask = pointer_tile(strides, first, head, rows, D, BLOCK, PADDED_D, INT64)
        tl.atomic_add(dq + offset, value, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["queries", "keys", "padded", "per_section"])
def _query_kernel(
    q: kt.Descriptor,
    k: kt.Descriptor,
    v: kt.Descriptor,
    grad_o: kt.Descriptor,
    dq: kt.Descriptor,
    statistics_ptr: kt.Pointer,
    kv_start_ptr: kt.Pointer,
    kv_end_ptr: kt.Pointer,
    q_strides: kt.Scalar,
    k_strides: kt.Scalar,
    v_strides: kt.Scalar,
    grad_o_strides: kt.Scalar,
    dq_strides: kt.Scalar,
    queries: kt.Scalar,
    padded: kt.Scalar,
    keys: kt.Scalar,
    heads: kt.Scalar,
    group: kt.Scalar,
    per_section: kt.Scalar,
    scale: kt.Scalar,
    scale_log2: kt.Scalar,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write dq of a query tile and head."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, head = work_item(tl.program_id(0), tiles, heads, per_section)
    first = (tiles - 1 - tile) * BLOCK_M
    start, end = row_limits(kv_start_ptr, kv_end_ptr, first, queries, keys, BLOCK_M)
    low, high = visible_range(start, end, keys, BLOCK_N)
    whole_low, whole_high = whole_range(start, end, first, queries, keys, BLOCK_M)
    q_tile = load_tile(q, q_strides, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
    do = load_tile(grad_o, grad_o_strides, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
    at = statistics_ptr + head_offset(head, padded, INT64) + first + tl.arange(0, BLOCK_M)
    lse = tl.load(at)[:, None]
    delta = tl.load(at + head_offset(heads, padded, INT64))[:, None]
    kv_head = head // group
    dq_sum = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    for j in tl.range(low, high, BLOCK_N):
        k_tile = load_tile(k, k_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        v_tile = load_tile(v, v_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(do, v_tile.T, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse)
        if (j < whole_low) | (j + BLOCK_N > whole_high):
            key = (j + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where((key >= start[:, None]) & (key < end[:, None]), p, 0.0)
        ds = (p * (dp - delta)).to(k_tile.dtype)
        dq_sum = tl.dot(ds, k_tile, dq_sum, input_precision=PRECISION)
    store_tile(dq, dq_strides, dq_sum * scale, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)


@triton.jit(do_not_specialize=["elements"])
def _round_kernel(
    sum_ptr: kt.Pointer,
    out_ptr: kt.Pointer,
    scale: kt.Scalar,
    elements: kt.Scalar,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
) -> None:
    """Write out = sum * scale, rounded to out's dtype: the dq of the fused backward."""
    at = tl.program_id(0).to(tl.int64) * BLOCK if INT64 else tl.program_id(0) * BLOCK
    at += tl.arange(0, BLOCK)
    total = tl.load(sum_ptr + at, mask=at < elements)
    tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=at < elements)
