"""The forward pass: y = LayerNorm(x), then each pair of channels (i, i + D/2) turns by its angle p * f.

primitives.py says how the work is cut into programs, and has the legend.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import kernel_types as kt
from ... import tensors
from ..contract import Inputs, Rotated
from . import configs
from .primitives import (
    group_count,
    heads_of_group,
    load_halves,
    load_row,
    make_side,
    normalise,
    rotate,
    store_halves,
    tile_mask,
    token_block,
    token_cos_sin,
)


@triton.jit
def _forward_group(
    side: kt.Struct,
    group: kt.Scalar,
    token: kt.Block,
    token_mask: kt.Block,
    pair: kt.Block,
    pair_mask: kt.Block,
    cos: kt.Block,
    sin: kt.Block,
    eps: kt.Scalar,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Walk over the heads of a group."""
    row, first, last = heads_of_group(side, group, HEADS)
    REFINED: tl.constexpr = side.x.dtype.element_ty == tl.float32
    if side.weight is not None:
        w1, w2 = load_row(side.weight, row, pair, pair_mask, HALF)
        b1, b2 = load_row(side.bias, row, pair, pair_mask, HALF)
    mask = tile_mask(token_mask, pair_mask, HALF)
    x_tile = token[:, None] * side.x_stride_t + pair[None, :]
    out_tile = token[:, None] * (side.heads * 2 * HALF) + pair[None, :]
    x_ptr, out_ptr = side.x + first * side.x_stride_h, side.out + first * (2 * HALF)
    for _ in range(first, last):
        x1, x2 = load_halves(x_ptr + x_tile, mask, HALF)
        if side.weight is not None:
            x1, x2, _ = normalise(x1, x2, token_mask, pair_mask, eps, HALF, REFINED)
            x1, x2 = tl.fma(x1, w1, b1), tl.fma(x2, w2, b2)
        y1, y2 = rotate(x1, x2, cos, sin)
        store_halves(out_ptr + out_tile, y1, y2, mask, HALF)
        x_ptr += side.x_stride_h
        out_ptr += 2 * HALF


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    q: kt.Struct,
    k: kt.Struct,
    positions_ptr: kt.Pointer,
    inv_freq_ptr: kt.Pointer,
    tokens: kt.Scalar,
    q_groups: kt.Scalar,
    groups: kt.Scalar,
    eps: kt.Scalar,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    INT64: tl.constexpr,
) -> None:
    """Rotate a block of tokens and a group of heads of q, or of k behind those of q."""
    # The groups of a token block are neighbours: they share its positions, and its DRAM pages while these are open.
    block, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    if INT64:
        group = group.to(tl.int64)
    token, token_mask = token_block(block, tokens, BLOCK_T, INT64)
    pair = tl.arange(0, PADDED_HALF)
    pair_mask = pair < HALF
    cos, sin = token_cos_sin(positions_ptr, inv_freq_ptr, token, token_mask, pair, pair_mask, tokens)
    if group < q_groups:
        _forward_group(q, group, token, token_mask, pair, pair_mask, cos, sin, eps, HALF, HEADS)
    else:
        _forward_group(k, group - q_groups, token, token_mask, pair, pair_mask, cos, sin, eps, HALF, HEADS)


def forward(inputs: Inputs) -> Rotated:
    """Rotate q and k in one launch. contract.py says what comes in and goes out."""
    q, k, positions, q_norm, k_norm, inv_freq, eps = inputs
    tokens, head_dim = q.shape[0], q.shape[2]
    positions = positions.contiguous()
    config = configs.choose(configs.FORWARD, q)
    q_side, k_side = make_side(q, None, q_norm, config), make_side(k, None, k_norm, config)
    int64 = tensors.needs_int64_offsets(q, k, positions, q_side.out, k_side.out)
    options = configs.options(config, head_dim, int64)
    q_groups, groups = group_count(q_side), group_count(q_side) + group_count(k_side)
    grid = (triton.cdiv(tokens, config.block_tokens) * groups,)
    if grid[0]:
        with tensors.device_guard(q):
            _forward_kernel[grid](q_side, k_side, positions, inv_freq, tokens, q_groups, groups, eps, **options)
    return Rotated(q_side.out, k_side.out)
