"""The forward pass: online softmax in base 2 over tiles of keys.

With c = scale * log2(e) and m the running maximum of s * c over the keys so far,
    p = exp2(s * c - m),   total = total * exp2(m_old - m) + sum p,   out = out * exp2(m_old - m) + p v,
and at the end o = out / total, lse = (m + log2(total)) * ln 2. An element of p is one FFMA and one MUFU.

A program owns one tile of queries and one head. It has one loop over key tiles with a branch around the mask. Three
loops (masked, whole, masked) would be more than twice the code and, on sm_90, cost spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernel_types as kt
from ... import tensors
from ..contract import Inputs, Outputs
from . import configs
from .defaults import Config
from .primitives import (
    LOG2_E,
    describable,
    head_offset,
    heads_per_section,
    load_tile,
    row_limits,
    store_tile,
    visible_range,
    whole_range,
    work_item,
)

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["queries", "keys", "per_section"])
def _forward_kernel(
    q: kt.Descriptor,
    k: kt.Descriptor,
    v: kt.Descriptor,
    o: kt.Descriptor,
    lse_ptr: kt.Pointer,
    kv_start_ptr: kt.Pointer,
    kv_end_ptr: kt.Pointer,
    q_strides: kt.Scalar,
    k_strides: kt.Scalar,
    v_strides: kt.Scalar,
    o_strides: kt.Scalar,
    queries: kt.Scalar,
    keys: kt.Scalar,
    heads: kt.Scalar,
    group: kt.Scalar,
    per_section: kt.Scalar,
    scale_log2: kt.Scalar,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write o and lse of a query tile and head."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, head = work_item(tl.program_id(0), tiles, heads, per_section)
    first = (tiles - 1 - tile) * BLOCK_M  # heaviest first: the last tile of a video sees the most keys
    start, end = row_limits(kv_start_ptr, kv_end_ptr, first, queries, keys, BLOCK_M)
    low, high = visible_range(start, end, keys, BLOCK_N)
    whole_low, whole_high = whole_range(start, end, first, queries, keys, BLOCK_M)
    q_tile = load_tile(q, q_strides, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)
    kv_head = head // group
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)  # m
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    for j in tl.range(low, high, BLOCK_N):
        k_tile = load_tile(k, k_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        v_tile = load_tile(v, v_strides, j, kv_head, keys, D, BLOCK_N, PADDED_D, RANK, INT64)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if (j < whole_low) | (j + BLOCK_N > whole_high):
            key = (j + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((key >= start[:, None]) & (key < end[:, None]), s, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(s, 1) * scale_log2)
        # A row that has seen no key yet has m = -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        p = tl.exp2(s * scale_log2 - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(p, 1)
        out = out * rescale[:, None]
        out = tl.dot(p.to(v_tile.dtype), v_tile, out, input_precision=PRECISION)
        maximum = new_maximum
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    row = first + tl.arange(0, BLOCK_M)
    lse = (maximum + tl.log2(total)) * _LN_2  # -inf for a row without keys
    tl.store(lse_ptr + head_offset(head, queries, INT64) + row, lse, mask=row < queries)
    store_tile(o, o_strides, out, first, head, queries, D, BLOCK_M, PADDED_D, RANK, INT64)


def forward(inputs: Inputs) -> Outputs:
    """Attend in one launch; nothing waits for the GPU. contract.py says what comes in and goes out."""
    return forward_with(configs.choose("forward", inputs.q), inputs)


def forward_with(config: Config, inputs: Inputs) -> Outputs:
    """Attend in a configuration that the caller chose."""
    q, k, v, limits, scale = inputs
    queries, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    if not queries or not keys:
        return Outputs(o.zero_(), lse.fill_(-torch.inf))
    if scale <= 0:  # max(s * c) is max(s) * c only for c > 0. Both rewrites are exact.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    if config.descriptors:
        q, k, v = map(describable, (q, k, v))
    blocks = config.block_m, config.block_n, config.block_n, config.block_m
    views, strides = configs.operands((q, k, v, o), blocks, config)
    group = heads // kv_heads
    grid = (triton.cdiv(queries, config.block_m) * heads,)
    with tensors.device_guard(q):
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
            **configs.options(config, q, tensors.needs_int64_offsets(q, k, v, o, lse)),
        )
    return Outputs(o, lse)
