"""What the frame_attention kernels share: tiles in and out, the order of the work, the row limits of a tile.

A tensor [T, H, D] reaches a kernel in one of three ways, its RANK:
- 2: a host tensor descriptor of the view [T, H * D] with boxes [rows, D], which the copy engine of sm_90 and later
  fills.
- 3: a descriptor of [T, H, D] with boxes [rows, 1, PADDED_D]. Only D = 96 takes it, where a box of the view would reach
  into the next head. Elsewhere it would cost: with the reshape after the load Triton keeps left operands in registers
  (D = 128: 59 spills).
- 0: a pointer and two strides.
Rows and channels outside the tensor are read as zeros and are not written.

Legend: M rows of a query tile, N rows of a key tile, D head_dim, PADDED_D the next power of two (128 for D = 96).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import kernel_types as kt
from ... import limits

LOG2_E = 1.4426950408889634
MAX_BLOCK = 128  # rows of the largest tile; rows of lse and delta are padded to a multiple of it

# The kv heads are walked over in sections whose K and V take at most this much: half of an H100's L2 partition of
# 25 MB, so that q, o and the gradients do not push them out. A100: 20 MB.
SECTION_BYTES = 12 * 2**20


@triton.jit
def load_tile(
    x: kt.Descriptor, strides: kt.Scalar, first: kt.Scalar, head: kt.Scalar, rows: kt.Scalar,
    D: tl.constexpr, BLOCK: tl.constexpr, PADDED_D: tl.constexpr, RANK: tl.constexpr, INT64: tl.constexpr,
) -> kt.Block:  # fmt: skip
    """Return [BLOCK, PADDED_D]: rows first .. first + BLOCK - 1 of a head, zeros outside the tensor."""
    if RANK == 2:
        return x.load([first, head * D])
    elif RANK == 3:  # noqa: RET505 (Triton's compiler wants the branches)
        return x.load([first, head, 0]).reshape(BLOCK, PADDED_D)
    else:
        offset, mask = pointer_tile(strides, first, head, rows, D, BLOCK, PADDED_D, INT64)
        return tl.load(x + offset, mask=mask, other=0.0)


@triton.jit
def store_tile(
    x: kt.Descriptor, strides: kt.Scalar, value: kt.Block, first: kt.Scalar, head: kt.Scalar, rows: kt.Scalar,
    D: tl.constexpr, BLOCK: tl.constexpr, PADDED_D: tl.constexpr, RANK: tl.constexpr, INT64: tl.constexpr,
) -> None:  # fmt: skip
    """Write fp32 [BLOCK, PADDED_D], rounded to the tensor's dtype, where load_tile reads."""
    if RANK == 2:
        x.store([first, head * D], value.to(x.dtype))
    elif RANK == 3:
        x.store([first, head, 0], value.to(x.dtype).reshape(BLOCK, 1, PADDED_D))
    else:
        offset, mask = pointer_tile(strides, first, head, rows, D, BLOCK, PADDED_D, INT64)
        tl.store(x + offset, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def pointer_tile(
    strides: kt.Scalar, first: kt.Scalar, head: kt.Scalar, rows: kt.Scalar, D: tl.constexpr, BLOCK: tl.constexpr,
    PADDED_D: tl.constexpr, INT64: tl.constexpr,
) -> tuple[kt.Block, kt.Block]:  # fmt: skip
    """Return the offsets of a tile's elements, and which of them lie inside the tensor."""
    row = first + tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED_D)
    mask = (row < rows)[:, None]
    if PADDED_D != D:
        mask = mask & (channel < D)[None, :]
    if INT64:
        row = row.to(tl.int64)
        head = tl.full([1], 1, tl.int64) * head
    return (row * strides[0] + head * strides[1])[:, None] + channel[None, :], mask


@triton.jit
def head_offset(head: kt.Scalar, rows: kt.Scalar, INT64: tl.constexpr) -> kt.Scalar:
    """Return the offset of a head's row in an fp32 tensor [H, rows]."""
    if INT64:
        rows = rows.to(tl.int64)
    return head * rows


@triton.jit
def work_item(
    pid: kt.Scalar, tiles: kt.Scalar, heads: kt.Scalar, per_section: kt.Scalar
) -> tuple[kt.Scalar, kt.Scalar]:
    """Return the tile and the head of a program.

    Sections of heads come one after the other. Inside a section the heads of a tile are neighbours, so the query heads
    that share K and V run side by side.
    """
    section = pid // (per_section * tiles)
    first = section * per_section
    width = tl.minimum(per_section, heads - first)
    rest = pid - first * tiles
    return rest // width, first + rest % width


@triton.jit
def row_limits(
    start_ptr: kt.Pointer, end_ptr: kt.Pointer, first: kt.Scalar, rows: kt.Scalar, most: kt.Scalar, BLOCK: tl.constexpr
) -> tuple[kt.Block, kt.Block]:  # fmt: skip
    """Return the start and end of rows first .. first + BLOCK - 1, int32 [BLOCK] each, clamped to 0 .. most.

    The clamp keeps the loops inside the tensors, whatever the limits are. Rows past the last one see nothing.
    """
    row = first + tl.arange(0, BLOCK)
    start = tl.load(start_ptr + row, mask=row < rows, other=0)
    end = tl.load(end_ptr + row, mask=row < rows, other=0)
    return tl.minimum(tl.maximum(start, 0), most), tl.minimum(tl.maximum(end, 0), most)


@triton.jit
def visible_range(
    start: kt.Block, end: kt.Block, most: kt.Scalar, OTHER_BLOCK: tl.constexpr
) -> tuple[kt.Scalar, kt.Scalar]:
    """Return low and high: a tile whose rows have these limits sees nothing outside [low, high) of the other side.

    low is a multiple of OTHER_BLOCK. The rows may come in any order, and those that see nothing do not count.
    """
    sees = start < end
    low = tl.min(tl.where(sees, start, most), 0) // OTHER_BLOCK * OTHER_BLOCK
    return low, tl.max(tl.where(sees, end, 0), 0)


@triton.jit
def whole_range(
    start: kt.Block, end: kt.Block, first: kt.Scalar, rows: kt.Scalar, most: kt.Scalar, BLOCK: tl.constexpr
) -> tuple[kt.Scalar, kt.Scalar]:  # fmt: skip
    """Return the range of which every row first .. first + BLOCK - 1 sees all. Rows past the last one do not count."""
    row = first + tl.arange(0, BLOCK)
    return tl.max(start, 0), tl.min(tl.where(row < rows, end, most), 0)


def describable(x: Tensor) -> Tensor:
    """Return [T, H, D] itself where the copy engine can walk over it, else a contiguous copy.

    The copy engine takes a base and row strides that are multiples of 16 bytes, and the view [T, H * D] needs heads
    side by side. A slice of a fused projection has all that. The copy of anything else costs O(T), and the kernels read
    it O(T) times.
    """
    step = x.stride(0) * x.element_size()
    rows_fit = x.shape[0] <= 1 or (step % 16 == 0 and x.stride(0) >= x.shape[2])
    heads_fit = x.shape[1] == 1 or x.stride(1) == x.shape[2]
    fits = x.stride(2) == 1 and rows_fit and heads_fit and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def descriptor_rank(head_dim: int) -> int:
    """Return the RANK of a tensor that reaches a kernel by a descriptor."""
    return 2 if padded_head_dim(head_dim) == head_dim else 3


def operand(x: Tensor, block: int, rank: int) -> tuple[Tensor | TensorDescriptor, tuple[int, ...]]:
    """Return a kernel's view of [T, H, D] and its strides over T and H. A descriptor holds its strides itself."""
    tokens, heads, head_dim = x.shape
    if rank == 0:
        return x, x.stride()[:2]
    row = x.stride(0) if tokens > 1 else heads * head_dim  # the stride of one row alone may be anything
    if rank == 2:
        return TensorDescriptor(x, [tokens, heads * head_dim], [row, 1], [block, head_dim]), (0, 0)
    box = [block, 1, padded_head_dim(head_dim)]
    return TensorDescriptor(x, [tokens, heads, head_dim], [row, head_dim, 1], box), (0, 0)


def heads_per_section(kv_heads: int, keys: int, head_dim: int, element_size: int) -> int:
    """Return the number of kv heads whose K and V share the L2."""
    most = limits.capped(SECTION_BYTES, limits.current().section_bytes)
    return min(max(most // max(2 * keys * head_dim * element_size, 1), 1), max(kv_heads, 1))


def padded_head_dim(head_dim: int) -> int:
    """Return the channels of a tile: its sizes must be powers of two."""
    padded: int = triton.next_power_of_2(head_dim)
    return padded


def input_precision(dtype: torch.dtype) -> str:
    """Return the precision of a matmul of such tiles: fp32 stays fp32, where Triton's default would be tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
