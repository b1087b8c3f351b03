"""Matrix products of the compiled CPU library (csrc/matmul): a left factor packed once, fp32 sums, fp32 results.

torch's bf16 product on CPUs rounds its result to bf16, and its order of summation depends on the other rows and on the
threads. Here every element is summed in one order, whatever rows and threads are beside it. The loss and sampling use
these products with many blocks of classes as the right factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """Rows x [R, C], packed for products with any number of right factors."""

    packed: Tensor
    is_bf16: bool
    isa: int

    def multiply(self, weight: Tensor, out: Tensor) -> None:
        """Write x weight^T into out, fp32 [R, K], contiguous.

        weight: [K, C]. bf16 where the rows were packed by pack_bf16, else bf16, fp16 or fp32.
        """
        ops = torch.ops.lumos_native
        product = ops.packed_matmul_bf16 if self.is_bf16 else ops.packed_matmul_fp32
        product(self.packed, weight if weight.stride(1) == 1 else weight.contiguous(), out, self.isa)


def pack_bf16(x: Tensor, isa: int) -> PackedRows | None:
    """Return bf16 rows packed for products of bf16 pairs, None where the instruction set has no such products."""
    packed = torch.ops.lumos_native.pack_rows_bf16(x, isa)
    return PackedRows(packed, True, isa) if packed.numel() else None


def pack_fp32(x: Tensor, isa: int) -> PackedRows:
    """Return rows of any dtype packed for products in fp32."""
    return PackedRows(torch.ops.lumos_native.pack_rows_fp32(x.float(), isa), False, isa)
