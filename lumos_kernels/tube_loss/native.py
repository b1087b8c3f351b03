"""Tube-masked loss on the CPU: matmuls by torch, everything between them in C++ (csrc/cpu/tube_loss_kernel.h).

Rows come in chunks, and the classes of a chunk in blocks: a block's logits are fp32 and stay in cache. What a chunk
keeps for its gradients, [rows, K] in the dtype of the matmuls, is all that grows with K. The contract is in ops.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lumos_kernels import _host, library

KEPT_BYTES = 44 << 20  # of a chunk's gradients of the logits; with the blocks below, 64 MB in all
BLOCK_CLASSES = 1024
MAX_ROWS = 1024  # of a chunk


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    row_weight: Tensor | None,
    z_loss: float,
    need_hidden: bool,
    dweight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    work = _Work(hidden, weight, need_hidden, dweight)
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    stats = []
    for part in work.chunks(rows):
        x, target = hidden[rows[part]], targets[part].contiguous()
        kept = work.kept(len(x))
        partial = _Partial(len(x), work.blocks)
        for index, first, logits in work.logits(x):
            _ops().tube_loss_reduce(logits, target, first, index, *partial, kept, work.isa)
        factor = None if row_weight is None else row_weight[part]
        sizes = work.classes, BLOCK_CLASSES
        stats.append(_ops().tube_loss_finish(target, factor, z_loss, *sizes, *partial, kept, work.isa))
        work.add(rows[part], x, kept)
    nll, lse, correct = (torch.cat(parts) for parts in zip(*stats, strict=True))
    return nll, lse, correct, work.dhidden


def backward(
    grad_nll: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    lse: Tensor,
    need_hidden: bool,
    dweight: Tensor | None,
) -> Tensor | None:
    work = _Work(hidden, weight, need_hidden, dweight)
    if not work.trained:
        return None
    per_row = [grad.float().contiguous() for grad in (lse, grad_nll, grad_lse)]
    for part in work.chunks(rows):
        x, target = hidden[rows[part]], targets[part].contiguous()
        kept = work.kept(len(x))
        for _, first, logits in work.logits(x):
            _ops().tube_loss_gradient(logits, target, first, *(t[part] for t in per_row), kept, work.isa)
        work.add(rows[part], x, kept)
    return work.dhidden


def _ops():
    return torch.ops.lumos_native


class _Partial(tuple):
    """Statistics of a chunk's blocks: maximum, sum, target_logit, beaten."""

    def __new__(cls, rows: int, blocks: int) -> _Partial:
        floats = torch.empty(rows * (2 * blocks + 1), dtype=torch.float32)
        maximum, total, target_logit = floats.split([rows * blocks, rows * blocks, rows])
        beaten = torch.empty(rows, dtype=torch.bool)
        return super().__new__(cls, (maximum.view(rows, blocks), total.view(rows, blocks), target_logit, beaten))


@dataclass
class _Work:
    """The matmuls of a call, and the buffers that its chunks share.

    bf16 gradients of the logits stay bf16, with fp32 sums; everything else computes in fp32.
    """

    hidden: Tensor
    weight: Tensor
    need_hidden: bool
    dweight: Tensor | None
    dhidden: Tensor | None = None
    isa: int = field(default_factory=lambda: _host.ISA_VALUES[library.isa()])

    def __post_init__(self) -> None:
        self.classes = self.weight.shape[0]
        self.blocks = -(-self.classes // BLOCK_CLASSES)
        self.dtype = torch.bfloat16 if self.hidden.dtype == torch.bfloat16 else torch.float32
        if self.need_hidden:
            self.dhidden = torch.zeros_like(self.hidden)
        if self.dweight is not None:
            self.dweight.zero_()
        self.trained = self.need_hidden or self.dweight is not None
        self.row_bytes = self.dtype.itemsize * self.classes if self.trained else 1
        self._buffers: dict[str, Tensor] = {}

    def chunks(self, rows: Tensor) -> Iterator[slice]:
        size = max(1, min(MAX_ROWS, KEPT_BYTES // self.row_bytes))
        count = max(1, -(-len(rows) // size))
        size = -(-len(rows) // count)  # equal chunks
        return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), max(1, size)))

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns], contiguous and unwritten; the next request of that name takes the same memory."""
        flat = self._buffers.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._buffers[name] = torch.empty(rows * columns, dtype=dtype)
        return flat[: rows * columns].view(rows, columns)

    def kept(self, rows: int) -> Tensor | None:
        if not self.trained:
            return None
        return self._buffer("kept", rows, self.classes, self.dtype)

    def _class_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        for index, weight in enumerate(self.weight.split(BLOCK_CLASSES)):
            yield index, index * BLOCK_CLASSES, weight

    def logits(self, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Index, first class and fp32 logits of every block; the next block's take their memory."""
        packed = self._packed(x)
        x = x.float() if packed is None else x
        for index, first, weight in self._class_blocks():
            out = self._buffer("logits", len(x), len(weight), torch.float32)
            if packed is None:
                torch.mm(x, weight.float().T, out=out)
            else:
                weight = weight if weight.stride(1) == 1 else weight.contiguous()
                _ops().tube_loss_logits(packed, weight, out, self.isa)
            yield index, first, out

    def _packed(self, x: Tensor) -> Tensor | None:
        """None where bf16 products are torch's."""
        if self.dtype != torch.bfloat16:
            return None
        packed = _ops().tube_loss_pack_rows(x, self.isa)
        self.has_dots = packed.numel() > 0
        return packed if self.has_dots else None

    def add(self, rows: Tensor, x: Tensor, dlogits: Tensor | None) -> None:
        """Adds a chunk's part of the gradients."""
        if self.dhidden is not None:
            self.dhidden.index_copy_(0, rows, self._dx(dlogits).to(self.dhidden.dtype))
        if self.dweight is not None:
            self._add_dweight(x.to(self.dtype), dlogits)

    def _dx(self, dlogits: Tensor) -> Tensor:
        if self.weight.dtype == self.dtype:
            return torch.mm(dlogits, self.weight)
        dx = dlogits.new_zeros(len(dlogits), self.weight.shape[1])
        for _, first, weight in self._class_blocks():
            dx.addmm_(dlogits[:, first : first + len(weight)], weight.to(self.dtype))
        return dx

    def _add_dweight(self, x: Tensor, dlogits: Tensor) -> None:
        if self.dtype == torch.float32:
            self.dweight.addmm_(dlogits.T, x)
            return
        if self.has_dots:
            _ops().tube_loss_add_outer(dlogits, x, self.dweight, self.isa)
            return
        for _, first, weight in self._class_blocks():
            part = slice(first, first + len(weight))
            self.dweight[part].add_(torch.mm(dlogits[:, part].T, x))
