"""MM-RoPE in C++ (csrc/cpu/mm_rope_kernel.h), one pass over q and k. The contract is at the top of ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import _host, library

Norm = tuple[Tensor, Tensor] | None


def forward(
    q: Tensor, k: Tensor, positions: Tensor, q_norm: Norm, k_norm: Norm, inv_freq: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.lumos_native.mm_rope_forward.default(
        q, k, positions, *_fp32(q_norm), *_fp32(k_norm), inv_freq, eps, _host.ISA_VALUES[library.isa()]
    )


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
    norms = (*_fp32(q_norm), *_fp32(k_norm))
    dq, dk, *dnorms = torch.ops.lumos_native.mm_rope_backward.default(
        grad_q, grad_k, q, k, positions, *norms, inv_freq, eps, _host.ISA_VALUES[library.isa()]
    )
    return dq, dk, _like(q_norm, *dnorms[:2]), _like(k_norm, *dnorms[2:])


def _fp32(norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    """What the kernels read: fp32 and contiguous."""
    if norm is None:
        return None, None
    weight, bias = norm
    return weight.float().contiguous(), bias.float().contiguous()


def _like(norm: Norm, dweight: Tensor, dbias: Tensor) -> Norm:
    return None if norm is None else (dweight.to(norm[0].dtype), dbias.to(norm[1].dtype))
