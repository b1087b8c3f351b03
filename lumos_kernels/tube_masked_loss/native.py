"""tube_masked_loss on the CPU: large matmuls by torch, everything between them in C++ (csrc/tube_masked_loss).

Rows come in chunks, and the classes of a chunk in blocks. A block's logits are fp32 and stay in cache. Only the
gradients of a chunk's logits, [rows, K] in the dtype of the matmuls, grow with K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import library
from ..launch import equal_chunk
from ..packed_matmul import pack_bf16
from .contract import Inputs, Outputs, RowLoss, StatisticGradients, Wanted

DLOGITS_BYTES = 44 << 20  # of a chunk's gradients of the logits; with the blocks below 64 MB in all
BLOCK_CLASSES = 1024
MAX_ROWS = 1024  # of a chunk


def forward(inputs: Inputs, loss: RowLoss, wanted: Wanted) -> Outputs:
    """Return the statistics and, where wanted, the gradients of the sum of the row losses."""
    work = _Work(inputs, wanted)
    token_weight = None if loss.token_weight is None else loss.token_weight.float().contiguous()
    statistics = []
    for part in work.chunks():
        chunk = work.chunk(part)
        partial = _block_statistics(len(chunk.targets), work.blocks)
        for block, first, logits in work.logits(chunk):
            _ops().tube_masked_loss_reduce(logits, chunk.targets, first, block, *partial, chunk.dlogits, work.isa)
        factor = None if token_weight is None else token_weight[part]
        sizes = work.classes, BLOCK_CLASSES
        finished = _ops().tube_masked_loss_finish(
            chunk.targets, factor, loss.z_loss_weight, *sizes, *partial, chunk.dlogits, work.isa
        )
        statistics.append(finished)
        work.add(chunk)
    nll, lse, correct = (torch.cat(parts) for parts in zip(*statistics, strict=True))
    return Outputs(nll, lse, correct, work.dhidden)


def backward(inputs: Inputs, lse: Tensor, grad: StatisticGradients, wanted: Wanted) -> Tensor | None:
    """Return and write the gradients of the statistics, given those that arrive there."""
    work = _Work(inputs, wanted)
    if not work.trains:
        return None
    per_row = [x.float().contiguous() for x in (lse, *grad)]
    for part in work.chunks():
        chunk = work.chunk(part)
        for _, first, logits in work.logits(chunk):
            rows = (x[part] for x in per_row)
            _ops().tube_masked_loss_gradient(logits, chunk.targets, first, *rows, chunk.dlogits, work.isa)
        work.add(chunk)
    return work.dhidden


def _ops() -> Any:
    return torch.ops.lumos_native


def _block_statistics(rows: int, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return unwritten statistics of a chunk's blocks: maximum, sum, logit of the target, whether that is beaten."""
    floats = torch.empty(rows * (2 * blocks + 1), dtype=torch.float32)
    maximum, total, target_logit = floats.split([rows * blocks, rows * blocks, rows])
    beaten = torch.empty(rows, dtype=torch.bool)
    return maximum.view(rows, blocks), total.view(rows, blocks), target_logit, beaten


class _Chunk(NamedTuple):
    """Target rows that are worked on together."""

    rows: Tensor  # int64 [R]: their places in hidden
    targets: Tensor  # int64 [R], contiguous
    x: Tensor  # [R, C], the hidden states
    dlogits: Tensor | None  # [R, K] in the dtype of the matmuls: the gradients of the logits, None where not wanted


class _Work:
    """The matmuls of a call, and the buffers that its chunks share.

    With bf16 hidden states the gradients of the logits are bf16, summed in fp32. Everything else computes in fp32.
    """

    def __init__(self, inputs: Inputs, wanted: Wanted) -> None:
        self.inputs, self.weight, self.dweight = inputs, inputs.weight, wanted.weight
        self.isa = library.isa_value()
        self.classes = self.weight.shape[0]
        self.blocks = -(-self.classes // BLOCK_CLASSES)
        self.dtype = torch.bfloat16 if inputs.hidden.dtype == torch.bfloat16 else torch.float32
        self.dhidden = torch.zeros_like(inputs.hidden) if wanted.hidden else None
        if self.dweight is not None:
            self.dweight.zero_()
        self.trains = wanted.hidden or self.dweight is not None
        self.has_bf16_products = False  # known from the first packed chunk on
        self._buffers: dict[str, Tensor] = {}

    def chunks(self) -> Iterator[slice]:
        """Yield equal parts of the target rows."""
        rows = len(self.inputs.rows)
        row_bytes = self.dtype.itemsize * self.classes if self.trains else 1
        size = equal_chunk(rows, max(1, min(MAX_ROWS, DLOGITS_BYTES // row_bytes)))
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    def chunk(self, part: slice) -> _Chunk:
        rows, x = self.inputs.rows[part], self.inputs.hidden[self.inputs.rows[part]]
        dlogits = self._buffer("dlogits", len(x), self.classes, self.dtype) if self.trains else None
        return _Chunk(rows, self.inputs.targets[part].contiguous(), x, dlogits)

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return unwritten [rows, columns]. The next request by that name takes the same memory."""
        flat = self._buffers.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._buffers[name] = torch.empty(rows * columns, dtype=dtype)
        return flat[: rows * columns].view(rows, columns)

    def _class_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        for index, weight in enumerate(self.weight.split(BLOCK_CLASSES)):
            yield index, index * BLOCK_CLASSES, weight

    def logits(self, chunk: _Chunk) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the index, the first class and the fp32 logits of every block. The next block's take their memory."""
        packed = pack_bf16(chunk.x, self.isa) if self.dtype == torch.bfloat16 else None
        self.has_bf16_products = packed is not None
        x = chunk.x.float() if packed is None else chunk.x
        for index, first, weight in self._class_blocks():
            out = self._buffer("logits", len(x), len(weight), torch.float32)
            if packed is None:
                torch.mm(x, weight.float().T, out=out)
            else:
                packed.multiply(weight, out)
            yield index, first, out

    def add(self, chunk: _Chunk) -> None:
        """Add the chunk's part of the gradients."""
        if chunk.dlogits is None:
            return
        if self.dhidden is not None:
            self.dhidden.index_copy_(0, chunk.rows, self._dx(chunk.dlogits).to(self.dhidden.dtype))
        if self.dweight is not None:
            self._add_dweight(self.dweight, chunk.dlogits, chunk.x.to(self.dtype))

    def _dx(self, dlogits: Tensor) -> Tensor:
        if self.weight.dtype == self.dtype:
            return torch.mm(dlogits, self.weight)
        dx = dlogits.new_zeros(len(dlogits), self.weight.shape[1])
        for _, first, weight in self._class_blocks():
            dx.addmm_(dlogits[:, first : first + len(weight)], weight.to(self.dtype))
        return dx

    def _add_dweight(self, dweight: Tensor, dlogits: Tensor, x: Tensor) -> None:
        if self.dtype == torch.float32:
            dweight.addmm_(dlogits.T, x)
        elif self.has_bf16_products:
            _ops().add_outer_bf16(dlogits, x, dweight, self.isa)
        else:
            for _, first, weight in self._class_blocks():
                part = slice(first, first + len(weight))
                dweight[part].add_(torch.mm(dlogits[:, part].T, x))
