"""frame_attention in C++ (csrc/cpu/frame_attention_kernel.h), tiles and online softmax. The contract is in ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import _host, library
from lumos_kernels.layout import RowLimits


def forward(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.lumos_native.frame_attention_forward.default(
        q, k, v, *_contiguous(limits), scale, _host.ISA_VALUES[library.isa()]
    )


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    limits: RowLimits,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Always deterministic: every sum has one order, whatever the number of threads."""
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    return torch.ops.lumos_native.frame_attention_backward.default(
        grad_o, grad_lse, q, k, v, o, lse, *_contiguous(limits), scale, _host.ISA_VALUES[library.isa()]
    )


def _contiguous(limits: RowLimits) -> tuple[Tensor, ...]:
    views = limits.kv_start, limits.kv_end, limits.q_start, limits.q_end
    return tuple(view.contiguous() for view in views)
