"""MM-RoPE as Triton kernels: compiled for sm_80, sm_90 and sm_100, run in the interpreter, not yet run on a GPU.

Forward: y = LayerNorm(x), then each pair of channels (i, i + D/2) turns by its angle p * f.
Backward: the gradient turns back, dy = R(-angle) * grad, and with g = dy * weight
    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),   dweight = sum of dy * x_hat,   dbias = sum of dy.

A program owns BLOCK_T tokens and a group of heads of q or of k, all of one row of the norm. It makes the tokens' cos
and sin once, then walks over its heads: the two rotation halves of a head are two [BLOCK_T, D/2] tiles, so that a
pair's channels sit in the same thread, and a row's statistics stay inside a warp.

Shapes: T tokens, D head_dim, HALF = D/2 pairs, PADDED_HALF the next power of two (64 for the 48 of D = 96).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumos_kernels import checks
from lumos_kernels.mm_rope.common import AXES

Norm = tuple[Tensor, Tensor] | None


class Config(NamedTuple):
    """How a kernel is cut into programs."""

    block_tokens: int  # in bf16 and fp16; half as many in fp32
    heads: int  # of a program, at most
    num_warps: int


# PADDED_HALF -> configuration; larger heads take the last one. Chosen by arithmetic, not yet by measurement.
# A tile of 1,024 pairs gives each of 128 threads 8 neighbouring pairs: one 16-byte access per half.
# H100, forward at 3.0 TB/s: 1.5 TB/s of reads with 0.7 us of latency need 8 KB in flight on each of 132 SMs. A warp
# loads 1 KB at a time, and 24 warps are resident (80 registers a thread), so it is enough that a third of them wait.
# Backward reads 2.0 TB/s, 11 KB in flight, with 12 warps of 2 KB (up to 168 registers). Loading the next head before
# computing this one would not help: ptxas moves those loads behind the computation.
# Sine and cosine of a pair cost about 45 instructions, against the 76 that 132 SMs can issue in the time HBM takes for
# a pair's 8 bytes: 8 heads share them.
FORWARD = {16: Config(64, 8, 4), 32: Config(32, 8, 4), 64: Config(16, 8, 4), 128: Config(8, 8, 4)}
BACKWARD = {16: Config(64, 8, 4), 32: Config(32, 8, 4), 64: Config(16, 8, 4), 128: Config(8, 8, 4)}

# dweight and dbias: the token blocks are cut into at most so many splits, each with its own partial sum. The cut
# depends on T alone, so the sums are the same on every GPU. Partials of full groups cost 1/190 of the traffic.
MAX_SPLITS = 1024
# Second stage: partials added at once, and columns (16 of fp32 are 64 bytes; head_dim is a multiple of 32).
SUM_PARTIALS, SUM_COLUMNS = 512, 16


class Side(NamedTuple):
    """What a kernel knows of q, or of k."""

    x: Tensor
    grad: Tensor | None  # backward only
    out: Tensor  # contiguous: y forward, dx backward
    weight: Tensor | None
    bias: Tensor | None
    partials: Tensor | None  # backward with a norm: fp32 [groups, splits, 2, D]
    x_stride_t: int
    x_stride_h: int
    grad_stride_t: int
    grad_stride_h: int
    heads: int
    heads_per_row: int  # row: of the norm
    groups_per_row: int


# Bit i: pairs with i = pair % 16 turn by the h position, or by the w position; the others by t.
_ON_H = tl.constexpr(sum(1 << slot for slot, axis in enumerate(AXES) if axis == 1))
_ON_W = tl.constexpr(sum(1 << slot for slot, axis in enumerate(AXES) if axis == 2))

# pi/2 in three parts. The first two have so few bits that n * part is exact for every n up to 2^19, with or without
# FMA: what is lost of pi/2 is n * 2^-43, and of the last product half its unit in the last place.
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
_HALF_PI_1 = tl.constexpr(1.5625)  # 25 / 2^4
_HALF_PI_2 = tl.constexpr(0.00830078125)  # 17 / 2^11
_HALF_PI_3 = tl.constexpr(-4.454455103380768614e-6)


@triton.jit
def _cos_sin(angle):
    """cos and sin of fp32 angles up to 10^5, to about one unit in the last place of 1.

    libdevice's are as good, but keep a table in local memory for huge angles and do not run in the interpreter.
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
def _token_cos_sin(positions_ptr, inv_freq_ptr, token, token_mask, pair, pair_mask, tokens):
    """fp32 [BLOCK_T, PADDED_HALF]: cos and sin of every pair's angle, which is the rounded product p * f.

    The kernels are compiled without FMA contraction: contracted into the range reduction, the product would keep all
    its bits, and at position 90,000 the angle would differ from the reference's by 4e-3.
    """
    t = tl.load(positions_ptr + token, mask=token_mask, other=0)[:, None]
    h = tl.load(positions_ptr + tokens + token, mask=token_mask, other=0)[:, None]
    w = tl.load(positions_ptr + tokens + tokens + token, mask=token_mask, other=0)[:, None]
    slot = (1 << (pair % 16))[None, :]
    position = tl.where((slot & _ON_W) != 0, w, tl.where((slot & _ON_H) != 0, h, t))
    inv_freq = tl.load(inv_freq_ptr + pair, mask=pair_mask, other=0.0)[None, :]
    return _cos_sin(position.to(tl.float32) * inv_freq)


@triton.jit
def _rotate(x1, x2, cos, sin):
    return tl.fma(x1, cos, -(x2 * sin)), tl.fma(x2, cos, x1 * sin)


@triton.jit
def _normalise(x1, x2, token_mask, pair_mask, eps, HALF: tl.constexpr):
    """x_hat, its two halves, and rstd [BLOCK_T, 1]; 0 outside the masks, also with eps = 0."""
    mean = (tl.sum(x1 + x2, axis=1) * (0.5 / HALF))[:, None]
    x1, x2 = x1 - mean, x2 - mean
    if x1.shape[1] != HALF:
        x1, x2 = tl.where(pair_mask[None, :], x1, 0.0), tl.where(pair_mask[None, :], x2, 0.0)
    variance = tl.sum(tl.fma(x1, x1, x2 * x2), axis=1) * (0.5 / HALF)
    rstd = tl.where(token_mask, tl.rsqrt(variance + eps), 0.0)[:, None]
    return x1 * rstd, x2 * rstd, rstd


@triton.jit
def _load_halves(ptr, mask, HALF: tl.constexpr):
    """The two halves of a tile or a row, in fp32, 0 where masked."""
    x1, x2 = tl.load(ptr, mask=mask, other=0.0), tl.load(ptr + HALF, mask=mask, other=0.0)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def _store_halves(ptr, x1, x2, mask, HALF: tl.constexpr):
    tl.store(ptr, x1.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF, x2.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(ptr, row, pair, pair_mask, HALF: tl.constexpr):
    """fp32 [1, PADDED_HALF] twice: a row of the norm's weight or bias."""
    p1, p2 = _load_halves(ptr + row * (2 * HALF) + pair, pair_mask, HALF)
    return p1[None, :], p2[None, :]


@triton.jit
def _heads_of_group(side, group, HEADS: tl.constexpr):
    """The group's row of the norm, its first head and the one after its last."""
    row = group // side.groups_per_row
    first = row * side.heads_per_row + (group % side.groups_per_row) * HEADS
    return row, first, tl.minimum(first + HEADS, (row + 1) * side.heads_per_row)


@triton.jit
def _token_block(block, tokens, BLOCK_T: tl.constexpr, INT64: tl.constexpr):
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    if INT64:
        token = token.to(tl.int64)
    return token, token < tokens


@triton.jit
def _tile_mask(token_mask, pair_mask, HALF: tl.constexpr):
    mask = token_mask[:, None]
    if pair_mask.shape[0] != HALF:
        mask = mask & pair_mask[None, :]
    return mask


@triton.jit
def _forward_group(
    side, group, token, token_mask, pair, pair_mask, cos, sin, eps, HALF: tl.constexpr, HEADS: tl.constexpr
):
    row, first, last = _heads_of_group(side, group, HEADS)
    if side.weight is not None:
        w1, w2 = _load_row(side.weight, row, pair, pair_mask, HALF)
        b1, b2 = _load_row(side.bias, row, pair, pair_mask, HALF)
    mask = _tile_mask(token_mask, pair_mask, HALF)
    x_tile = token[:, None] * side.x_stride_t + pair[None, :]
    out_tile = token[:, None] * (side.heads * 2 * HALF) + pair[None, :]
    x_ptr, out_ptr = side.x + first * side.x_stride_h, side.out + first * (2 * HALF)
    for _ in range(first, last):
        x1, x2 = _load_halves(x_ptr + x_tile, mask, HALF)
        if side.weight is not None:
            x1, x2, _ = _normalise(x1, x2, token_mask, pair_mask, eps, HALF)
            x1, x2 = tl.fma(x1, w1, b1), tl.fma(x2, w2, b2)
        y1, y2 = _rotate(x1, x2, cos, sin)
        _store_halves(out_ptr + out_tile, y1, y2, mask, HALF)
        x_ptr += side.x_stride_h
        out_ptr += 2 * HALF


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    q,
    k,
    positions_ptr,
    inv_freq_ptr,
    tokens,
    q_groups,
    groups,
    eps,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    INT64: tl.constexpr,
):
    # The groups of a token block are neighbours, so that DRAM pages and positions are shared while they are open.
    block, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    if INT64:
        group = group.to(tl.int64)
    token, token_mask = _token_block(block, tokens, BLOCK_T, INT64)
    pair = tl.arange(0, PADDED_HALF)
    pair_mask = pair < HALF
    cos, sin = _token_cos_sin(positions_ptr, inv_freq_ptr, token, token_mask, pair, pair_mask, tokens)
    if group < q_groups:
        _forward_group(q, group, token, token_mask, pair, pair_mask, cos, sin, eps, HALF, HEADS)
    else:
        _forward_group(k, group - q_groups, token, token_mask, pair, pair_mask, cos, sin, eps, HALF, HEADS)


@triton.jit
def _backward_group(
    side,
    positions_ptr,
    inv_freq_ptr,
    group,
    split,
    splits,
    first_block,
    last_block,
    tokens,
    eps,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    INT64: tl.constexpr,
):
    pair = tl.arange(0, PADDED_HALF)
    pair_mask = pair < HALF
    row, first, last = _heads_of_group(side, group, HEADS)
    if side.weight is not None:
        w1, w2 = _load_row(side.weight, row, pair, pair_mask, HALF)
        # dweight and dbias of this thread's tokens: summed over the tile's tokens once, at the end.
        dw1 = tl.zeros([BLOCK_T, PADDED_HALF], tl.float32)
        dw2, db1, db2 = dw1, dw1, dw1
    for block in range(first_block, last_block):
        token, token_mask = _token_block(block, tokens, BLOCK_T, INT64)
        cos, sin = _token_cos_sin(positions_ptr, inv_freq_ptr, token, token_mask, pair, pair_mask, tokens)
        mask = _tile_mask(token_mask, pair_mask, HALF)
        grad_tile = token[:, None] * side.grad_stride_t + pair[None, :]
        out_tile = token[:, None] * (side.heads * 2 * HALF) + pair[None, :]
        grad_ptr, out_ptr = side.grad + first * side.grad_stride_h, side.out + first * (2 * HALF)
        if side.weight is not None:
            x_tile = token[:, None] * side.x_stride_t + pair[None, :]
            x_ptr = side.x + first * side.x_stride_h
        for _ in range(first, last):
            g1, g2 = _load_halves(grad_ptr + grad_tile, mask, HALF)
            dx1, dx2 = _rotate(g1, g2, cos, -sin)
            if side.weight is not None:
                x1, x2 = _load_halves(x_ptr + x_tile, mask, HALF)
                x_ptr += side.x_stride_h
                x1, x2, rstd = _normalise(x1, x2, token_mask, pair_mask, eps, HALF)
                dw1, dw2 = tl.fma(dx1, x1, dw1), tl.fma(dx2, x2, dw2)
                db1, db2 = db1 + dx1, db2 + dx2
                g1, g2 = dx1 * w1, dx2 * w2
                mean_g = (tl.sum(g1 + g2, axis=1) * (0.5 / HALF))[:, None]
                mean_gx = (tl.sum(tl.fma(g1, x1, g2 * x2), axis=1) * (0.5 / HALF))[:, None]
                dx1, dx2 = rstd * tl.fma(x1, -mean_gx, g1 - mean_g), rstd * tl.fma(x2, -mean_gx, g2 - mean_g)
            _store_halves(out_ptr + out_tile, dx1, dx2, mask, HALF)
            grad_ptr += side.grad_stride_h
            out_ptr += 2 * HALF
    if side.weight is not None:
        partial = side.partials + (group * splits + split) * (4 * HALF) + pair
        _store_halves(partial, tl.sum(dw1, axis=0), tl.sum(dw2, axis=0), pair_mask, HALF)
        _store_halves(partial + 2 * HALF, tl.sum(db1, axis=0), tl.sum(db2, axis=0), pair_mask, HALF)


@triton.jit(do_not_specialize=["tokens", "splits", "blocks_per_split"])
def _backward_kernel(
    q,
    k,
    positions_ptr,
    inv_freq_ptr,
    tokens,
    splits,
    blocks_per_split,
    q_groups,
    groups,
    eps,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    INT64: tl.constexpr,
):
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
    """The second stage's view of q's, or of k's, norm."""

    partials: Tensor | None  # fp32 [rows, partials of a row, 2, D]
    dweight: Tensor | None
    dbias: Tensor | None
    rows: int


@triton.jit
def _sum_row(sums, row, count, chunk, head_dim, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_C columns of a row of dweight | dbias. Its partials are added in the same order every time."""
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
def _sum_partials_kernel(q, k, q_count, k_count, head_dim, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Second stage of dweight and dbias: one program per row of a norm and BLOCK_C columns."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    # The outer conditions are settled when compiling: an absent norm leaves no code behind.
    if q.partials is not None:  # noqa: SIM102
        if row < q.rows:
            _sum_row(q, row, q_count, chunk, head_dim, BLOCK_N, BLOCK_C)
    if k.partials is not None:  # noqa: SIM102
        if row >= q.rows:
            _sum_row(k, row - q.rows, k_count, chunk, head_dim, BLOCK_N, BLOCK_C)


def _side(x: Tensor, grad: Tensor | None, norm: Norm, heads_per_program: int, splits: int = 0) -> Side:
    heads, head_dim = x.shape[1:]
    weight, bias = (p.contiguous() for p in norm) if norm is not None else (None, None)
    rows = 1 if weight is None else weight.shape[0]
    heads_per_row = heads // rows
    groups_per_row = triton.cdiv(heads_per_row, heads_per_program)
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


def _groups(side: Side) -> int:
    return side.groups_per_row * (1 if side.weight is None else side.weight.shape[0])


def _config(table: dict[int, Config], x: Tensor) -> Config:
    config = table[min(triton.next_power_of_2(x.shape[2] // 2), max(table))]
    return config._replace(block_tokens=config.block_tokens * 2 // x.element_size())


def _launch_options(config: Config, head_dim: int, int64: bool) -> dict:
    """The arguments that both kernels get by name."""
    return {
        "HALF": head_dim // 2,
        "PADDED_HALF": triton.next_power_of_2(head_dim // 2),
        "BLOCK_T": config.block_tokens,
        "HEADS": config.heads,
        "INT64": int64,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,  # _token_cos_sin says why
    }


def forward(
    q: Tensor, k: Tensor, positions: Tensor, q_norm: Norm, k_norm: Norm, inv_freq: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See ops.py. One launch."""
    tokens, head_dim = q.shape[0], q.shape[2]
    positions = positions.contiguous()
    config = _config(FORWARD, q)
    q_side, k_side = (_side(x, None, norm, config.heads) for x, norm in ((q, q_norm), (k, k_norm)))
    int64 = checks.needs_int64_offsets(q, k, positions, q_side.out, k_side.out)
    options = _launch_options(config, head_dim, int64)
    q_groups, groups = _groups(q_side), _groups(q_side) + _groups(k_side)
    grid = (triton.cdiv(tokens, config.block_tokens) * groups,)
    if grid[0]:
        with checks.device_guard(q):
            _forward_kernel[grid](q_side, k_side, positions, inv_freq, tokens, q_groups, groups, eps, **options)
    return q_side.out, k_side.out


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_norm: Norm,
    k_norm: Norm,
    inv_freq: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Norm, Norm]:
    """See ops.py. One launch, and with a norm a second one that adds the partial sums of dweight and dbias."""
    tokens, head_dim = q.shape[0], q.shape[2]
    positions = positions.contiguous()
    config = _config(BACKWARD, q)
    blocks = triton.cdiv(tokens, config.block_tokens)
    blocks_per_split = max(triton.cdiv(blocks, MAX_SPLITS), 1)
    splits = triton.cdiv(blocks, blocks_per_split)
    q_side = _side(q, grad_q, q_norm, config.heads, splits)
    k_side = _side(k, grad_k, k_norm, config.heads, splits)
    int64 = checks.needs_int64_offsets(grad_q, grad_k, q, k, positions, q_side.out, k_side.out)
    options = _launch_options(config, head_dim, int64)
    q_groups, groups = _groups(q_side), _groups(q_side) + _groups(k_side)
    q_sums, k_sums = (_sums(side) for side in (q_side, k_side))
    with checks.device_guard(q):
        if splits * groups:
            _backward_kernel[(splits * groups,)](
                q_side, k_side, positions, inv_freq, tokens, splits, blocks_per_split, q_groups, groups, eps, **options
            )
        if q_sums.rows + k_sums.rows:
            grid = (q_sums.rows + k_sums.rows, 2 * head_dim // SUM_COLUMNS)
            counts = q_side.groups_per_row * splits, k_side.groups_per_row * splits  # partials of a row
            _sum_partials_kernel[grid](
                q_sums, k_sums, *counts, head_dim, BLOCK_N=SUM_PARTIALS, BLOCK_C=SUM_COLUMNS, num_warps=8
            )
    dq_norm, dk_norm = (None if s.dweight is None else (s.dweight, s.dbias) for s in (q_sums, k_sums))
    return q_side.out, k_side.out, dq_norm, dk_norm


def _sums(side: Side) -> Sums:
    if side.partials is None:
        return Sums(None, None, None, 0)
    dweight, dbias = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (side.weight, side.bias))
    return Sums(side.partials, dweight, dbias, side.weight.shape[0])
