"""The backward pass. The gradient turns back, dy = R(-angle) * grad. With x_hat the normalised x and g = dy * weight,
    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),   dweight = sum of dy * x_hat,   dbias = sum of dy.

A program of the first kernel owns a split of the token blocks and a group of heads. It writes dx, and one partial sum
of dweight and dbias. The second kernel adds the partial sums of a norm's row, always in the same order. primitives.py
has the legend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import kernel_types as kt
from ... import limits, tensors
from ..contract import Gradients, Inputs, Norm, Rotated
from . import configs
from .primitives import (
    Side,
    centre,
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
def _backward_group(
    side: kt.Struct,
    positions_ptr: kt.Pointer,
    inv_freq_ptr: kt.Pointer,
    group: kt.Scalar,
    split: kt.Scalar,
    splits: kt.Scalar,
    first_block: kt.Scalar,
    last_block: kt.Scalar,
    tokens: kt.Scalar,
    eps: kt.Scalar,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    INT64: tl.constexpr,
) -> None:
    """Write dx of a split's tokens and a group's heads, and the group's partial sums of dweight and dbias."""
    pair = tl.arange(0, PADDED_HALF)
    pair_mask = pair < HALF
    row, first, last = heads_of_group(side, group, HEADS)
    REFINED: tl.constexpr = side.x.dtype.element_ty == tl.float32
    if side.weight is not None:
        w1, w2 = load_row(side.weight, row, pair, pair_mask, HALF)
        # Each thread sums dweight and dbias over its own tokens. One reduction over the tile's tokens comes at the end.
        dw1 = tl.zeros([BLOCK_T, PADDED_HALF], tl.float32)
        dw2, db1, db2 = dw1, dw1, dw1
    for block in range(first_block, last_block):
        token, token_mask = token_block(block, tokens, BLOCK_T, INT64)
        cos, sin = token_cos_sin(positions_ptr, inv_freq_ptr, token, token_mask, pair, pair_mask, tokens)
        mask = tile_mask(token_mask, pair_mask, HALF)
        grad_tile = token[:, None] * side.grad_stride_t + pair[None, :]
        out_tile = token[:, None] * (side.heads * 2 * HALF) + pair[None, :]
        grad_ptr, out_ptr = side.grad + first * side.grad_stride_h, side.out + first * (2 * HALF)
        if side.weight is not None:
            x_tile = token[:, None] * side.x_stride_t + pair[None, :]
            x_ptr = side.x + first * side.x_stride_h
        for _ in range(first, last):
            g1, g2 = load_halves(grad_ptr + grad_tile, mask, HALF)
            dx1, dx2 = rotate(g1, g2, cos, -sin)
            if side.weight is not None:
                x1, x2 = load_halves(x_ptr + x_tile, mask, HALF)
                x_ptr += side.x_stride_h
                x1, x2, rstd = normalise(x1, x2, token_mask, pair_mask, eps, HALF, REFINED)
                dw1, dw2 = tl.fma(dx1, x1, dw1), tl.fma(dx2, x2, dw2)
                db1, db2 = db1 + dx1, db2 + dx2
                g1, g2 = centre(dx1 * w1, dx2 * w2, pair_mask, HALF, REFINED)
                mean_gx = (tl.sum(tl.fma(g1, x1, g2 * x2), axis=1) * (0.5 / HALF))[:, None]
                dx1, dx2 = rstd * tl.fma(x1, -mean_gx, g1), rstd * tl.fma(x2, -mean_gx, g2)
            store_halves(out_ptr + out_tile, dx1, dx2, mask, HALF)
            grad_ptr += side.grad_stride_h
            out_ptr += 2 * HALF
    if side.weight is not None:
        partial = side.partials + (group * splits + split) * (4 * HALF) + pair
        store_halves(partial, tl.sum(dw1, axis=0), tl.sum(dw2, axis=0), pair_mask, HALF)
        store_halves(partial + 2 * HALF, tl.sum(db1, axis=0), tl.sum(db2, axis=0), pair_mask, HALF)


@triton.jit(do_not_specialize=["tokens", "splits", "blocks_per_split"])
def _backward_kernel(
    q: kt.Struct,
    k: kt.Struct,
    positions_ptr: kt.Pointer,
    inv_freq_ptr: kt.Pointer,
    tokens: kt.Scalar,
    splits: kt.Scalar,
    blocks_per_split: kt.Scalar,
    q_groups: kt.Scalar,
    groups: kt.Scalar,
    eps: kt.Scalar,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    INT64: tl.constexpr,
) -> None:
    split, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    if INT64:
        group = group.to(tl.int64)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(tokens, BLOCK_T))
    if group < q_groups:
        _backward_group(
            q, positions_ptr, inv_freq_ptr, group, split, splits, first_block, last_block, tokens, eps,
            HALF, PADDED_HALF, BLOCK_T, HEADS, INT64,
        )  # fmt: skip
    else:
        _backward_group(
            k, positions_ptr, inv_freq_ptr, group - q_groups, split, splits, first_block, last_block, tokens, eps,
            HALF, PADDED_HALF, BLOCK_T, HEADS, INT64,
        )  # fmt: skip


class Sums(NamedTuple):
    """What the second stage knows of the norm of q, or of k."""

    partials: Tensor | None  # fp32 [rows, partials of a row, 2, D]
    dweight: Tensor | None
    dbias: Tensor | None
    rows: int


@triton.jit
def _sum_row(
    sums: kt.Struct,
    row: kt.Scalar,
    count: kt.Scalar,
    chunk: kt.Scalar,
    head_dim: kt.Scalar,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Write BLOCK_C columns of a row of dweight | dbias. The partials are added in the same order every time."""
    column = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    partial = sums.partials + row * count * (2 * head_dim) + column[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        total += tl.load(partial + n * (2 * head_dim), mask=n < count, other=0.0)
    total = tl.sum(total, axis=0)
    if chunk * BLOCK_C < head_dim:
        tl.store(sums.dweight + row * head_dim + column, total.to(sums.dweight.dtype.element_ty))
    else:
        tl.store(sums.dbias + row * head_dim + column - head_dim, total.to(sums.dbias.dtype.element_ty))


@triton.jit(do_not_specialize=["q_count", "k_count"])
def _sum_partials_kernel(
    q: kt.Struct,
    k: kt.Struct,
    q_count: kt.Scalar,
    k_count: kt.Scalar,
    head_dim: kt.Scalar,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """The second stage of dweight and dbias. A program takes one row of a norm and BLOCK_C columns."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    # The outer conditions are decided at compile time: an absent norm leaves no code behind.
    if q.partials is not None:  # noqa: SIM102
        if row < q.rows:
            _sum_row(q, row, q_count, chunk, head_dim, BLOCK_N, BLOCK_C)
    if k.partials is not None:  # noqa: SIM102
        if row >= q.rows:
            _sum_row(k, row - q.rows, k_count, chunk, head_dim, BLOCK_N, BLOCK_C)


def _sums(side: Side) -> Sums:
    if side.partials is None or side.weight is None or side.bias is None:
        return Sums(None, None, None, 0)
    dweight, dbias = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (side.weight, side.bias))
    return Sums(side.partials, dweight, dbias, side.weight.shape[0])


def backward(inputs: Inputs, grad: Rotated) -> Gradients:
    """Return the gradients in one launch, and with a norm in a second one that adds up dweight and dbias."""
    q, k, positions, q_norm, k_norm, inv_freq, eps = inputs
    tokens, head_dim = q.shape[0], q.shape[2]
    positions = positions.contiguous()
    config = configs.choose(configs.BACKWARD, q)
    blocks = triton.cdiv(tokens, config.block_tokens)
    most = limits.capped(configs.MAX_SPLITS, limits.current().splits)
    blocks_per_split = max(triton.cdiv(blocks, most), 1)
    splits = triton.cdiv(blocks, blocks_per_split)
    q_side, k_side = make_side(q, grad.q, q_norm, config, splits), make_side(k, grad.k, k_norm, config, splits)
    int64 = tensors.needs_int64_offsets(*grad, q, k, positions, q_side.out, k_side.out)
    options = configs.options(config, head_dim, int64)
    q_groups, groups = group_count(q_side), group_count(q_side) + group_count(k_side)
    with tensors.device_guard(q):
        if splits * groups:
            _backward_kernel[(splits * groups,)](
                q_side, k_side, positions, inv_freq, tokens, splits, blocks_per_split, q_groups, groups, eps, **options
            )
        return Gradients(q_side.out, k_side.out, *_add_partials(q_side, k_side, splits))


def _add_partials(q_side: Side, k_side: Side, splits: int) -> tuple[Norm | None, Norm | None]:
    """Run the second stage and return the gradients of both norms."""
    q_sums, k_sums, head_dim = _sums(q_side), _sums(k_side), q_side.x.shape[2]
    if q_sums.rows + k_sums.rows:
        grid = (q_sums.rows + k_sums.rows, 2 * head_dim // configs.SUM_COLUMNS)
        at_once = limits.capped(configs.SUM_PARTIALS, limits.current().partials)
        counts = q_side.groups_per_row * splits, k_side.groups_per_row * splits  # partials of a row
        _sum_partials_kernel[grid](
            q_sums, k_sums, *counts, head_dim, BLOCK_N=at_once, BLOCK_C=configs.SUM_COLUMNS, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    dq_norm, dk_norm = (
        None if sums.dweight is None or sums.dbias is None else Norm(sums.dweight, sums.dbias)
        for sums in (q_sums, k_sums)
    )
    return dq_norm, dk_norm
