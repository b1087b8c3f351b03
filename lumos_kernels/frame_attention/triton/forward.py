"""The forward pass: o and lse of one tile of queries and one head a program.

One loop over key tiles with a branch around the mask: three loops (masked, whole, masked) would be more than twice the
code and, on sm_90, cost spills. Softmax in base 2 with the scale folded in: p = exp2(s * c - max) with
c = scale * log2(e) is one FFMA and one MUFU an element.
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
    describable,
    heads_per_section,
    load_tile,
    row_limits,
    statistics,
    store_tile,
    tile_bounds,
    work_item,
)
from lumos_kernels.layout import RowLimits

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["queries", "keys", "per_section"])
def _forward_kernel(
    q,
    k,
    v,
    o,
    lse_ptr,
    kv_start_ptr,
    kv_end_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    queries,
    keys,
    heads,
    group,
    per_section,
    scale_log2,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, head = work_item(tl.program_id(0), tiles, heads, per_section)
    first = (tiles - 1 - tile) * BLOCK_M  # heaviest first: the last tile of a video sees the most keys
    low, high, inner_low, inner_high = tile_bounds(kv_start_ptr, kv_end_ptr, first, queries, BLOCK_M, BLOCK_N)
    start, end = row_limits(kv_start_ptr, kv_end_ptr, first, queries, BLOCK_M)
    q_tile = load_tile(q, q_strides, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
    kv_head = head // group
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of the scores, times c
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    for j in tl.range(low, high, BLOCK_N):
        k_tile = load_tile(k, k_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        v_tile = load_tile(v, v_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if (j < inner_low) | (j >= inner_high):
            key = (j + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((key >= start[:, None]) & (key < end[:, None]), s, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(s, 1) * scale_log2)
        # A row that has seen no key yet: -inf - -inf would be NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        p = tl.exp2(s * scale_log2 - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(p, 1)
        out = out * rescale[:, None]
        out = tl.dot(p.to(v_tile.dtype), v_tile, out, input_precision=PRECISION)
        maximum = new_maximum
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    row = first + tl.arange(0, BLOCK_M)
    lse = (maximum + tl.log2(total)) * _LN_2  # a row without keys: -inf
    tl.store(lse_ptr + statistics(head, queries, INT64) + row, lse, mask=row < queries)
    store_tile(o, o_strides, out, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)


def forward(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float) -> tuple[Tensor, Tensor]:
    """See ops.py. One launch; nothing waits for the GPU."""
    queries, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    if not queries or not keys:
        return o.zero_(), lse.fill_(-torch.inf)
    if scale <= 0:  # the running maximum is that of s * c only for c > 0; both rewrites are exact
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    config = configs.choose("forward", q)
    if config.descriptors:
        q, k, v = map(describable, (q, k, v))
    blocks = config.block_m, config.block_n, config.block_n, config.block_m
    views, strides = configs.operands((q, k, v, o), blocks, config)
    group = heads // kv_heads
    grid = (triton.cdiv(queries, config.block_m) * heads,)
    with checks.device_guard(q):
        _forward_kernel[grid](
            *views,
            lse,
            limits.kv_start.contiguous(),
            limits.kv_end.contiguous(),
            *strides,
            queries,
            keys,
            heads,
            group,
            group * heads_per_section(kv_heads, keys, head_dim, k.element_size()),
            scale * LOG2_E,
            **configs.options(config, q, checks.needs_int64_offsets(q, k, v, o, lse)),
        )
    return o, lse
