"""Sampling on the CPU: matmuls with fp32 sums and results, and one pass over the logits (csrc/cpu/masked_sample*).

Rows of both branches come in chunks, and the classes of a chunk in blocks, whose logits stay in cache: nothing grows
with the number of rows or classes. Every sum has an order of its own, so a row's draw and confidence depend on its own
key and hidden states alone, bit for bit, whatever chunk, batch or thread it is in. The contract is in ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import _host, library

WORKSPACE_BYTES = 48 << 20  # of a chunk, by workspace_bytes
BLOCK_CLASSES = 1024  # a multiple of 64, the tile of the row pass
MAX_ROWS = 512  # of a chunk


def forward(
    hidden_cond: Tensor,
    hidden_uncond: Tensor | None,
    weight: Tensor,
    row_keys: Tensor | None,
    guidance: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    rows = hidden_cond.shape[0]
    branches = [hidden_cond] if hidden_uncond is None else [hidden_cond, hidden_uncond]
    keys = None if row_keys is None else row_keys.contiguous()
    ids, confidence = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    size = min(rows, chunk_rows(len(branches), weight))
    logits = torch.empty(len(branches) * size * min(BLOCK_CLASSES, len(weight)), dtype=torch.float32)
    isa = _host.ISA_VALUES[library.isa()]
    for start in range(0, rows, max(1, size)):
        part = slice(start, min(start + size, rows))
        x = torch.cat([branch[part] for branch in branches])
        chunk = _Chunk(x, None if keys is None else keys[part], ids[part], isa)
        for first in range(0, len(weight), BLOCK_CLASSES):
            chunk.add(weight[first : first + BLOCK_CLASSES], first, logits, len(branches) == 2, guidance, temperature)
        chunk.finish(confidence[part])
    return ids, confidence


def chunk_rows(branches: int, weight: Tensor) -> int:
    """Rows of a chunk: MAX_ROWS, or fewer where the width would make its workspace larger than WORKSPACE_BYTES."""
    fixed = workspace_bytes(0, weight)
    return max(1, min(MAX_ROWS, (WORKSPACE_BYTES - fixed) // (workspace_bytes(branches, weight) - fixed)))


def workspace_bytes(rows: int, weight: Tensor) -> int:
    """Memory beside inputs and outputs, for `rows` rows of both branches together: the rows gathered, widened and
    packed for the matmul, a block of logits, 28 bytes of state; and a block of weights that lie with strides.
    """
    width = weight.shape[1]
    row = width * (8 if weight.dtype == torch.float32 else 10) + 4 * BLOCK_CLASSES + 28
    return rows * row + (0 if weight.stride(1) == 1 else BLOCK_CLASSES * width * weight.itemsize)


class _Chunk:
    """The rows of a chunk, packed for the matmul, and their state between blocks."""

    def __init__(self, x: Tensor, keys: Tensor | None, ids: Tensor, isa: int) -> None:
        self.ops, self.isa, self.keys, self.rows = torch.ops.lumos_native, isa, keys, len(x)
        self.dots = self.ops.tube_loss_logits
        self.packed = self.ops.tube_loss_pack_rows(x, isa) if x.dtype == torch.bfloat16 else x.new_empty(0)
        if self.packed.numel() == 0:  # no bf16 products on this CPU, or another dtype
            self.dots = self.ops.masked_sample_logits
            self.packed = self.ops.masked_sample_pack_rows(x.float(), isa)
        score, logit, maximum = torch.empty(3, len(ids), dtype=torch.float32)
        self.state = score, ids, logit, maximum, torch.empty(len(ids), dtype=torch.float64)

    def add(
        self, weight: Tensor, first: int, buffer: Tensor, guided: bool, guidance: float, temperature: float
    ) -> None:
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        logits = buffer[: self.rows * len(weight)].view(self.rows, len(weight))
        self.dots(self.packed, weight, logits, self.isa)
        self.ops.masked_sample_reduce(logits, self.keys, guided, guidance, temperature, first, *self.state, self.isa)

    def finish(self, confidence: Tensor) -> None:
        self.ops.masked_sample_finish(*self.state, confidence, self.isa)
