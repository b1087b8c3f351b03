"""The backward pass. With p the probabilities: dv = p^T do; dp = do v^T; ds = p * (dp - delta), where
delta = rowsum(do * o) - dlse; dq = scale ds k; dk = scale ds^T q.

Deterministic: one kernel owns key tiles and makes dk and dv, one owns query tiles and makes dq; both recompute s and
dp, which is 7 matmuls. Fused: the first kernel also adds its part of dq to fp32 memory, 5 matmuls, in an order that
differs from run to run. Either way a key tile's program walks over all query heads of its kv head, so dk and dv need
no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumos_kernels import checks
from lumos_kernels.frame_attention.triton import configs
from lumos_kernels.frame_attention.triton.primitives import (
    LOG2_E,
    MAX_BLOCK,
    describable,
    heads_per_section,
    load_tile,
    pointer_tile,
    row_limits,
    statistics,
    store_tile,
    tile_bounds,
    work_item,
)
from lumos_kernels.layout import RowLimits

_LOG2_E = tl.constexpr(LOG2_E)

ROUND_BLOCK = 1024  # elements of dq that a program of the fused backward's last step rounds


@triton.jit(do_not_specialize=["queries", "padded"])
def _delta_kernel(
    grad_o, o, lse_ptr, grad_lse_ptr, statistics_ptr, grad_o_strides, o_strides, grad_lse_strides,
    queries, padded, heads,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """statistics fp32 [2, H, padded]: lse in base 2, then delta.

    A row without keys and the rows past the end get lse = +inf and delta = 0: the loops load both without a mask, and
    p = exp2(s - inf) is 0 even before it is masked.
    """
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    do = load_tile(grad_o, grad_o_strides, first, head, queries, D, BLOCK, PADDED_D, False, INT64)
    out = load_tile(o, o_strides, first, head, queries, D, BLOCK, PADDED_D, False, INT64)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    row = first + tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + statistics(head, queries, INT64) + row, mask=row < queries, other=float("-inf"))
    if grad_lse_ptr is not None:
        if INT64:
            row_64, head_64 = row.to(tl.int64), head.to(tl.int64)
            offset = head_64 * grad_lse_strides[0] + row_64 * grad_lse_strides[1]
        else:
            offset = head * grad_lse_strides[0] + row * grad_lse_strides[1]
        delta -= tl.load(grad_lse_ptr + offset, mask=row < queries, other=0.0)
    keyless = lse == float("-inf")
    at = statistics_ptr + statistics(head, padded, INT64) + row
    tl.store(at, tl.where(keyless, float("inf"), lse * _LOG2_E))
    tl.store(at + statistics(heads, padded, INT64), tl.where(keyless, 0.0, delta))


@triton.jit(do_not_specialize=["queries", "keys", "padded", "per_section"])
def _key_kernel(
    q,
    k,
    v,
    grad_o,
    dk,
    dv,
    dq,
    statistics_ptr,
    q_start_ptr,
    q_end_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_o_strides,
    dk_strides,
    dv_strides,
    dq_strides,
    queries,
    padded,
    keys,
    kv_heads,
    group,
    per_section,
    scale,
    scale_log2,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
):
    """dk and dv of a key tile; FUSED: also its part of dq, added to fp32 memory.

    Everything is transposed, keys x queries: p and ds come out of their matmuls as the left operands of dv and dk, and
    go into them from registers.
    """
    tile, kv_head = work_item(tl.program_id(0), tl.cdiv(keys, BLOCK_N), kv_heads, per_section)
    first = tile * BLOCK_N  # heaviest first: the first keys of a video are seen by the most queries
    low, high, inner_low, inner_high = tile_bounds(q_start_ptr, q_end_ptr, first, keys, BLOCK_N, BLOCK_M)
    if first + BLOCK_N > keys:  # rows past the last key must not reach dq: 0 * exp2(-lse) may be 0 * inf
        inner_high = inner_low
    k_tile = load_tile(k, k_strides, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
    v_tile = load_tile(v, v_strides, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
    dk_sum = tl.zeros([BLOCK_N, PADDED_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, PADDED_D], tl.float32)
    for head in range(kv_head * group, (kv_head + 1) * group):
        lse_ptr = statistics_ptr + statistics(head, padded, INT64)
        delta_ptr = lse_ptr + statistics(kv_heads * group, padded, INT64)
        for i in tl.range(low, high, BLOCK_M):
            q_tile = load_tile(q, q_strides, i, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
            do = load_tile(grad_o, grad_o_strides, i, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
            row = i + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_ptr + row)
            delta = tl.load(delta_ptr + row)
            s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
            # dp - delta: delta as the matmul's initial sum costs no registers beside it, and spills nothing.
            dp = tl.broadcast_to(-delta[None, :], (BLOCK_N, BLOCK_M))
            dp = tl.dot(v_tile, do.T, dp, input_precision=PRECISION)
            p = tl.exp2(s * scale_log2 - lse[None, :])
            if (i < inner_low) | (i >= inner_high):
                start, end = row_limits(q_start_ptr, q_end_ptr, first, keys, BLOCK_N)  # here: registers are scarce
                p = tl.where((row[None, :] >= start[:, None]) & (row[None, :] < end[:, None]), p, 0.0)
            dv_sum = tl.dot(p.to(do.dtype), do, dv_sum, input_precision=PRECISION)
            ds = (p * dp).to(q_tile.dtype)
            dk_sum = tl.dot(ds, q_tile, dk_sum, input_precision=PRECISION)
            if FUSED:
                _add_dq(
                    dq, dq_strides, tl.dot(ds.T, k_tile, input_precision=PRECISION),
                    i, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64,
                )  # fmt: skip
    store_tile(dk, dk_strides, dk_sum * scale, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
    store_tile(dv, dv_strides, dv_sum, first, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)


@triton.jit
def _add_dq(
    dq, strides, value, first, head, rows, D: tl.constexpr, BLOCK: tl.constexpr, PADDED_D: tl.constexpr,
    RANK: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    if RANK == 2:
        dq.atomic_add([first, head * D], value)
    elif RANK == 3:
        dq.atomic_add([first, head, 0], value.reshape(BLOCK, 1, PADDED_D))
    else:
        offset, mask = pointer_tile(strides, first, head, rows, D, BLOCK, PADDED_D, INT64)
        tl.atomic_add(dq + offset, value, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["queries", "keys", "padded", "per_section"])
def _query_kernel(
    q,
    k,
    v,
    grad_o,
    dq,
    statistics_ptr,
    kv_start_ptr,
    kv_end_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_o_strides,
    dq_strides,
    queries,
    padded,
    keys,
    heads,
    group,
    per_section,
    scale,
    scale_log2,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a query tile and head."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, head = work_item(tl.program_id(0), tiles, heads, per_section)
    first = (tiles - 1 - tile) * BLOCK_M
    low, high, inner_low, inner_high = tile_bounds(kv_start_ptr, kv_end_ptr, first, queries, BLOCK_M, BLOCK_N)
    start, end = row_limits(kv_start_ptr, kv_end_ptr, first, queries, BLOCK_M)
    q_tile = load_tile(q, q_strides, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
    do = load_tile(grad_o, grad_o_strides, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
    at = statistics_ptr + statistics(head, padded, INT64) + first + tl.arange(0, BLOCK_M)
    lse = tl.load(at)[:, None]
    delta = tl.load(at + statistics(heads, padded, INT64))[:, None]
    kv_head = head // group
    dq_sum = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    for j in tl.range(low, high, BLOCK_N):
        k_tile = load_tile(k, k_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        v_tile = load_tile(v, v_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(do, v_tile.T, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse)
        if (j < inner_low) | (j >= inner_high):
            key = (j + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where((key >= start[:, None]) & (key < end[:, None]), p, 0.0)
        ds = (p * (dp - delta)).to(k_tile.dtype)
        dq_sum = tl.dot(ds, k_tile, dq_sum, input_precision=PRECISION)
    store_tile(dq, dq_strides, dq_sum * scale, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)


@triton.jit(do_not_specialize=["elements"])
def _round_kernel(sum_ptr, out_ptr, scale, elements, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """out = sum * scale, rounded: the fused backward's dq."""
    at = tl.program_id(0).to(tl.int64) * BLOCK if INT64 else tl.program_id(0) * BLOCK
    at += tl.arange(0, BLOCK)
    total = tl.load(sum_ptr + at, mask=at < elements)
    tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=at < elements)


def _statistics(grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor) -> Tensor:
    """fp32 [2, H, padded], see _delta_kernel. One launch; every element is written."""
    queries, heads, head_dim = o.shape
    padded = triton.cdiv(queries, MAX_BLOCK) * MAX_BLOCK
    result = torch.empty((2, heads, padded), dtype=torch.float32, device=o.device)
    tensors = grad_o, o, lse, result, *(() if grad_lse is None else (grad_lse,))
    _delta_kernel[(padded // MAX_BLOCK, heads)](
        grad_o,
        o,
        lse,
        grad_lse,
        result,
        grad_o.stride()[:2],
        o.stride()[:2],
        (0, 0) if grad_lse is None else grad_lse.stride(),
        queries,
        padded,
        heads,
        D=head_dim,
        PADDED_D=configs.padded_head_dim(head_dim),
        BLOCK=MAX_BLOCK,
        INT64=checks.needs_int64_offsets(*tensors),
        num_warps=8,
    )
    return result


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    limits: RowLimits,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py. Three launches (fused: two, a memset and one that rounds dq); nothing waits for the GPU."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    fused = not deterministic and configs.fuses_backward(q)
    with checks.device_guard(q):
        stats = _statistics(grad_o, grad_lse, o, lse)
        if any(configs.choose(kernel, q).descriptors for kernel in (("fused",) if fused else ("dkdv", "dq"))):
            q, k, v, grad_o = map(describable, (q, k, v, grad_o))
        if fused:
            _fused_backward(q, k, v, grad_o, stats, limits, scale, dq, dk, dv)
        else:
            _key_pass("dkdv", q, k, v, grad_o, stats, limits, scale, None, dk, dv)
            _query_pass(q, k, v, grad_o, stats, limits, scale, dq)
    return dq, dk, dv


def _fused_backward(q, k, v, grad_o, stats, limits, scale, dq, dk, dv) -> None:
    dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    _key_pass("fused", q, k, v, grad_o, stats, limits, scale, dq_sum, dk, dv)
    grid = (triton.cdiv(dq.numel(), ROUND_BLOCK),)
    int64 = checks.needs_int64_offsets(dq)
    _round_kernel[grid](dq_sum, dq, scale, dq.numel(), BLOCK=ROUND_BLOCK, INT64=int64, num_warps=4)


def _key_pass(kernel, q, k, v, grad_o, stats, limits, scale, dq_sum, dk, dv) -> None:
    keys, kv_heads, head_dim = k.shape
    heads = q.shape[1]
    config = configs.choose(kernel, q)
    m, n = config.block_m, config.block_n
    tensors, blocks = (q, k, v, grad_o, dk, dv), (m, n, n, m, n, n)
    if dq_sum is not None:
        tensors, blocks = (*tensors, dq_sum), (*blocks, m)
    views, strides = configs.operands(tensors, blocks, config)
    if dq_sum is None:
        views, strides = [*views, None], [*strides, (0, 0)]
    # What a program streams here is q and the gradient of o, for all heads of the group.
    streamed = heads_per_section(kv_heads, heads // kv_heads * q.shape[0], head_dim, q.element_size())
    _key_kernel[(triton.cdiv(keys, n) * kv_heads,)](
        *views,
        stats,
        limits.q_start.contiguous(),
        limits.q_end.contiguous(),
        *strides,
        q.shape[0],
        stats.shape[2],
        keys,
        kv_heads,
        heads // kv_heads,
        streamed,
        scale,
        scale * LOG2_E,
        FUSED=dq_sum is not None,
        **configs.options(config, q, checks.needs_int64_offsets(*tensors, stats)),
    )


def _query_pass(q, k, v, grad_o, stats, limits, scale, dq) -> None:
    queries, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    config = configs.choose("dq", q)
    m, n = config.block_m, config.block_n
    tensors, blocks = (q, k, v, grad_o, dq), (m, n, n, m, m)
    views, strides = configs.operands(tensors, blocks, config)
    _query_kernel[(triton.cdiv(queries, m) * heads,)](
        *views,
        stats,
        limits.kv_start.contiguous(),
        limits.kv_end.contiguous(),
        *strides,
        queries,
        stats.shape[2],
        keys,
        heads,
        group,
        group * heads_per_section(kv_heads, keys, head_dim, k.element_size()),
        scale,
        scale * LOG2_E,
        **configs.options(config, q, checks.needs_int64_offsets(*tensors, stats)),
    )
