"""Reading a layout in C++, one pass over the ids (csrc/cpu/frame_layout.cpp). The contract is at the top of ops.py."""

from __future__ import annotations

import torch
from torch import Tensor


def read(ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.lumos_native.frame_layout.default(ids, cu_seqlens)
