"""masked_sample on the CPU: matmuls with fp32 sums and results, and one C++ pass over the logits (csrc/masked_sample).

Rows of both branches come in chunks, and the classes of a chunk in blocks whose logits stay in cache: no memory grows
with the number of rows or classes. Every sum has one order. So the draw and the confidence of a row depend on its own
key and hidden states alone, bit for bit, whatever chunk, batch or thread it is in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import library
from ..packed_matmul import pack_bf16, pack_fp32
from .contract import Inputs, Outputs

WORKSPACE_BYTES = 48 << 20  # of a chunk, by workspace_bytes
BLOCK_CLASSES = 1024  # a multiple of 64, the tile of the row pass
MAX_ROWS = 512  # of a chunk


def forward(inputs: Inputs) -> Outputs:
    """Draw a class for each row. contract.py says what comes in and goes out."""
    rows, classes = inputs.hidden_cond.shape[0], inputs.weight.shape[0]
    branches = 1 if inputs.hidden_uncond is None else 2
    size = min(rows, chunk_rows(branches, inputs.weight))
    ids, confidence = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    buffer = torch.empty(branches * size * min(BLOCK_CLASSES, classes), dtype=torch.float32)
    for start in range(0, rows, max(1, size)):
        part = slice(start, min(start + size, rows))
        chunk = _Chunk(inputs, part, ids[part])
        for first in range(0, classes, BLOCK_CLASSES):
            chunk.add(first, buffer)
        chunk.finish(confidence[part])
    return Outputs(ids, confidence)


def chunk_rows(branches: int, weight: Tensor) -> int:
    """Return the rows of a chunk: MAX_ROWS, fewer where the width makes their workspace exceed WORKSPACE_BYTES."""
    fixed = workspace_bytes(0, weight)
    return max(1, min(MAX_ROWS, (WORKSPACE_BYTES - fixed) // (workspace_bytes(branches, weight) - fixed)))


def workspace_bytes(rows: int, weight: Tensor) -> int:
    """Return the memory beside inputs and outputs, for `rows` rows of both branches together.

    It holds the rows gathered, widened and packed for the matmul, a block of logits, 28 bytes of state a row, and a
    block of the weight where that has no unit last stride.
    """
    width = weight.shape[1]
    row = width * (8 if weight.dtype == torch.float32 else 10) + 4 * BLOCK_CLASSES + 28
    return rows * row + (0 if weight.stride(1) == 1 else BLOCK_CLASSES * width * weight.itemsize)


def _ops() -> Any:
    return torch.ops.lumos_native


class _Chunk:
    """The rows of a chunk, packed for the matmul, and their state between blocks of classes."""

    def __init__(self, inputs: Inputs, part: slice, ids: Tensor) -> None:
        self.inputs, self.isa = inputs, library.isa_value()
        x = torch.cat([branch[part] for branch in inputs[:2] if branch is not None])
        packed = pack_bf16(x, self.isa) if x.dtype == torch.bfloat16 else None
        self.packed, self.rows = packed or pack_fp32(x, self.isa), len(x)
        self.keys = None if inputs.row_keys is None else inputs.row_keys[part].contiguous()
        score, logit, maximum = torch.empty(3, len(ids), dtype=torch.float32)
        self.state = score, ids, logit, maximum, torch.empty(len(ids), dtype=torch.float64)

    def add(self, first: int, buffer: Tensor) -> None:
        """Let the block of classes from `first` on compete. The logits take the memory of `buffer`."""
        weight = self.inputs.weight[first : first + BLOCK_CLASSES]
        logits = buffer[: self.rows * len(weight)].view(self.rows, len(weight))
        self.packed.multiply(weight, logits)
        guided = self.inputs.hidden_uncond is not None
        options = guided, self.inputs.guidance_scale, self.inputs.temperature
        _ops().masked_sample_reduce(logits, self.keys, *options, first, *self.state, self.isa)

    def finish(self, confidence: Tensor) -> None:
        """Write the probabilities of the drawn classes."""
        _ops().masked_sample_finish(*self.state, confidence, self.isa)
