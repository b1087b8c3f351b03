"""What the mm_rope kernels share: cos and sin of a tile's angles, the LayerNorm, and tiles in and out.

A program owns BLOCK_T tokens and a group of heads of q or of k, all of which share one row of the norm. It makes the
tokens' cos and sin once and then walks over its heads. The two rotation halves of a head are two [BLOCK_T, D/2] tiles:
the two channels of a pair sit in the same thread, and the statistics of a row stay inside a warp.

Legend: T tokens, D head_dim, HALF = D/2 pairs, PADDED_HALF the next power of two (64 for the 48 of D = 96).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import kernel_types as kt
from ..contract import Norm
from ..frequencies import AXES
from .configs import Config


class Side(NamedTuple):
    """What a kernel knows of q, or of k."""

    x: Tensor
    grad: Tensor | None  # backward only
    out: Tensor  # contiguous: the rotated x; in backward the gradient of x
    weight: Tensor | None
    bias: Tensor | None
    partials: Tensor | None  # backward with a norm: fp32 [groups, splits, 2, D]
    x_stride_t: int
    x_stride_h: int
    grad_stride_t: int
    grad_stride_h: int
    heads: int
    heads_per_row: int  # heads that share a row of the norm
    groups_per_row: int  # groups of heads, one a program, that make up these


# Bit i of _ON_H says that pairs with pair % 16 == i turn by the h position, bit i of _ON_W that they turn by w. All
# other pairs turn by t.
_ON_H = tl.constexpr(sum(1 << slot for slot, axis in enumerate(AXES) if axis == 1))
_ON_W = tl.constexpr(sum(1 << slot for slot, axis in enumerate(AXES) if axis == 2))

# pi/2 in three parts. The first two have so few bits that n * part is exact for every n up to 2^19, with or without
# FMA. The error is n * 2^-43 from the three parts and half a unit in the last place from the last product.
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
_HALF_PI_1 = tl.constexpr(1.5625)  # 25 / 2^4
_HALF_PI_2 = tl.constexpr(0.00830078125)  # 17 / 2^11
_HALF_PI_3 = tl.constexpr(-4.454455103380768614e-6)


@triton.jit
def cos_sin(angle: kt.Block) -> tuple[kt.Block, kt.Block]:
    """Return cos and sin of fp32 angles up to 10^5, to about one unit in the last place of 1.

    The functions of libdevice are as good. But they keep a table in local memory for huge angles, and they do not run
    in the interpreter.
    """
    n = tl.floor(tl.fma(angle, _TWO_OVER_PI, 0.5))
    r = tl.fma(n, -_HALF_PI_1, angle)
    r = tl.fma(n, -_HALF_PI_2, r)
    r = tl.fma(n, -_HALF_PI_3, r)
    # Minimax polynomials on [-pi/4, pi/4], those of Cephes' sinf and cosf.
    r2 = r * r
    sin = tl.fma(r2, -1.9515295891e-4, 8.3321608736e-3)
    sin = tl.fma(r2, sin, -1.6666654611e-1)
    sin = tl.fma(sin * r2, r, r)
    cos = tl.fma(r2, 2.443315711809948e-5, -1.388731625493765e-3)
    cos = tl.fma(r2, cos, 4.166664568298827e-2)
    cos = tl.fma(cos * r2, r2, tl.fma(r2, -0.5, 1.0))
    quadrant = n.to(tl.int32)
    odd = (quadrant & 1) != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((quadrant + 1) & 2) != 0, -cos, cos), tl.where((quadrant & 2) != 0, -sin, sin)


@triton.jit
def token_cos_sin(
    positions_ptr: kt.Pointer,
    inv_freq_ptr: kt.Pointer,
    token: kt.Block,
    token_mask: kt.Block,
    pair: kt.Block,
    pair_mask: kt.Block,
    tokens: kt.Scalar,
) -> tuple[kt.Block, kt.Block]:
    """Return cos and sin of every pair's angle, fp32 [BLOCK_T, PADDED_HALF].

    The angle is the rounded product p * f, as the model was trained. So the kernels are compiled without FMA
    contraction (configs.options): contracted into the range reduction, the product would keep all its bits, and at
    position 90,000 the angle would differ from the reference's by 4e-3.
    """
    t = tl.load(positions_ptr + token, mask=token_mask, other=0)[:, None]
    h = tl.load(positions_ptr + tokens + token, mask=token_mask, other=0)[:, None]
    w = tl.load(positions_ptr + tokens + tokens + token, mask=token_mask, other=0)[:, None]
    slot = (1 << (pair % 16))[None, :]
    position = tl.where((slot & _ON_W) != 0, w, tl.where((slot & _ON_H) != 0, h, t))
    inv_freq = tl.load(inv_freq_ptr + pair, mask=pair_mask, other=0.0)[None, :]
    cos, sin = cos_sin(position.to(tl.float32) * inv_freq)
    return cos, sin


@triton.jit
def rotate(x1: kt.Block, x2: kt.Block, cos: kt.Block, sin: kt.Block) -> tuple[kt.Block, kt.Block]:
    """Return the two halves, each pair turned by its angle."""
    return tl.fma(x1, cos, -(x2 * sin)), tl.fma(x2, cos, x1 * sin)


@triton.jit
def normalise(
    x1: kt.Block,
    x2: kt.Block,
    token_mask: kt.Block,
    pair_mask: kt.Block,
    eps: kt.Scalar,
    HALF: tl.constexpr,
    REFINED: tl.constexpr,
) -> tuple[kt.Block, kt.Block, kt.Block]:
    """Return the two halves of x_hat, and rstd [BLOCK_T, 1]. They are 0 outside the masks, also with eps = 0."""
    x1, x2 = centre(x1, x2, pair_mask, HALF, REFINED)
    variance = tl.sum(tl.fma(x1, x1, x2 * x2), axis=1) * (0.5 / HALF)
    rstd = tl.where(token_mask, tl.rsqrt(variance + eps), 0.0)[:, None]
    return x1 * rstd, x2 * rstd, rstd


@triton.jit
def centre(
    x1: kt.Block, x2: kt.Block, pair_mask: kt.Block, HALF: tl.constexpr, REFINED: tl.constexpr
) -> tuple[kt.Block, kt.Block]:
    """Return the two halves minus the mean of their row, and 0 outside the mask.

    The rounded mean is off by some units in the last place of x. On a constant row that is all that is left of it, and
    rstd = eps^-1/2 makes it 300 times larger. So for fp32 (REFINED) the mean of what is left is taken off as well. In
    half precision the result's own rounding is larger.
    """
    for _ in tl.static_range(2 if REFINED else 1):
        mean = (tl.sum(x1 + x2, axis=1) * (0.5 / HALF))[:, None]
        x1, x2 = x1 - mean, x2 - mean
        if x1.shape[1] != HALF:
            x1, x2 = tl.where(pair_mask[None, :], x1, 0.0), tl.where(pair_mask[None, :], x2, 0.0)
    return x1, x2


@triton.jit
def load_halves(ptr: kt.Pointer, mask: kt.Block, HALF: tl.constexpr) -> tuple[kt.Block, kt.Block]:
    """Return the two halves of a tile or a row in fp32, 0 where masked."""
    x1, x2 = tl.load(ptr, mask=mask, other=0.0), tl.load(ptr + HALF, mask=mask, other=0.0)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def store_halves(ptr: kt.Pointer, x1: kt.Block, x2: kt.Block, mask: kt.Block, HALF: tl.constexpr) -> None:
    """Write the two halves, rounded to the tensor's dtype."""
    tl.store(ptr, x1.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF, x2.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row(
    ptr: kt.Pointer, row: kt.Scalar, pair: kt.Block, pair_mask: kt.Block, HALF: tl.constexpr
) -> tuple[kt.Block, kt.Block]:
    """Return the two halves of a row of the norm's weight or bias, fp32 [1, PADDED_HALF] each."""
    p1, p2 = load_halves(ptr + row * (2 * HALF) + pair, pair_mask, HALF)
    return p1[None, :], p2[None, :]


@triton.jit
def heads_of_group(side: kt.Struct, group: kt.Scalar, HEADS: tl.constexpr) -> tuple[kt.Scalar, kt.Scalar, kt.Scalar]:
    """Return the group's row of the norm, its first head, and the head after its last."""
    row = group // side.groups_per_row
    first = row * side.heads_per_row + (group % side.groups_per_row) * HEADS
    return row, first, tl.minimum(first + HEADS, (row + 1) * side.heads_per_row)


@triton.jit
def token_block(
    block: kt.Scalar, tokens: kt.Scalar, BLOCK_T: tl.constexpr, INT64: tl.constexpr
) -> tuple[kt.Block, kt.Block]:
    """Return the block's token indices, and which of them exist."""
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    if INT64:
        token = token.to(tl.int64)
    return token, token < tokens


@triton.jit
def tile_mask(token_mask: kt.Block, pair_mask: kt.Block, HALF: tl.constexpr) -> kt.Block:
    """Return which elements of a tile exist. Where HALF is a power of two, all pairs do."""
    mask = token_mask[:, None]
    if pair_mask.shape[0] != HALF:
        mask = mask & pair_mask[None, :]
    return mask


def make_side(x: Tensor, grad: Tensor | None, norm: Norm | None, config: Config, splits: int = 0) -> Side:
    """Return the kernels' view of q or k, with its outputs allocated. grad and splits are for backward."""
    heads, head_dim = x.shape[1:]
    weight, bias = (p.contiguous() for p in norm) if norm is not None else (None, None)
    rows = 1 if weight is None else weight.shape[0]
    heads_per_row = heads // rows
    groups_per_row = triton.cdiv(heads_per_row, config.heads)
    partials = None
    if grad is not None and weight is not None:
        shape = (rows * groups_per_row, splits, 2, head_dim)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    return Side(
        x=x,
        grad=grad,
        out=torch.empty(x.shape, dtype=x.dtype, device=x.device),
        weight=weight,
        bias=bias,
        partials=partials,
        x_stride_t=x.stride(0),
        x_stride_h=x.stride(1),
        grad_stride_t=0 if grad is None else grad.stride(0),
        grad_stride_h=0 if grad is None else grad.stride(1),
        heads=heads,
        heads_per_row=heads_per_row,
        groups_per_row=groups_per_row,
    )


def group_count(side: Side) -> int:
    """Return how many groups of heads the side has, each of which takes a program of its own."""
    groups: int = side.groups_per_row * (1 if side.weight is None else side.weight.shape[0])
    return groups
