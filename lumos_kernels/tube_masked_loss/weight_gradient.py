"""The gradient of the whole lm_head, made from the fp32 sums of its class slice.

It is the largest tensor of the loss (530 MB in bf16 at 2,048 channels), and the fp32 sums of its class slice are as
large again. In eager mode the two share one memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALED_FLOATS = 4 << 20  # elements that are scaled and rounded at once: 16 MB


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the statistics and of the sums of the class slice: fp32, fp64 for fp64 hidden states."""
    return torch.promote_types(hidden.dtype, torch.float32)


def can_share(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether the sums of the class slice and the gradient of the whole weight may share one memory."""
    return weight.itemsize <= statistics_dtype(hidden).itemsize and weight.numel() > 0


def class_sums(hidden: Tensor, weight: Tensor, first: int, last: int, shared: bool) -> Tensor:
    """Return unwritten [K, C] for the gradient of the class slice, in the statistics' dtype.

    shared: its storage holds the gradient of the whole weight as well, in weight's dtype. The sums end at the byte at
    which the class slice ends in that gradient. whole_weight_in_place rounds them row by row from the last one on, and
    because of this common end no rounded row lands on sums that are still to be read.
    """
    shape, dtype = (last - first, weight.shape[1]), statistics_dtype(hidden)
    if not shared or not can_share(hidden, weight):
        return hidden.new_empty(shape, dtype=dtype)
    taken, end = shape[0] * shape[1] * dtype.itemsize, last * shape[1] * weight.itemsize
    lead = taken - end if taken > end else -(end - taken) % dtype.itemsize  # bytes before the gradient; mostly 0
    storage = hidden.new_empty(lead + weight.numel() * weight.itemsize, dtype=torch.uint8)
    return storage[lead + end - taken : lead + end].view(dtype).view(shape)


def whole_weight(sums: Tensor, scale: Tensor | float, weight: Tensor, first: int, last: int) -> Tensor:
    """Return the gradient of the whole weight: `scale` times the sums in the class slice, zero elsewhere."""
    dweight = torch.zeros_like(weight)
    for part, out in zip(_blocks(sums), _blocks(dweight[first:last]), strict=True):
        torch.mul(part, scale, out=out)
    return dweight


def whole_weight_in_place(sums: Tensor, scale: Tensor | float, weight: Tensor, first: int, last: int) -> Tensor:
    """Return what whole_weight returns, in the storage that class_sums(shared=True) gave the sums."""
    end = (sums.storage_offset() + sums.numel()) * sums.itemsize
    start = end - last * weight.shape[1] * weight.itemsize
    whole = sums.view(torch.uint8).as_strided((weight.numel() * weight.itemsize,), (1,), start)
    dweight = whole.view(weight.dtype).view(weight.shape)
    for part, out in zip(reversed(_blocks(sums)), reversed(_blocks(dweight[first:last])), strict=True):
        out.copy_(part * scale)
    dweight[:first].zero_()
    dweight[last:].zero_()
    return dweight


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Split the rows: rounding a product needs a copy of the unrounded one."""
    blocks: tuple[Tensor, ...] = rows.split(max(1, SCALED_FLOATS // max(1, rows.shape[1])))
    return blocks
