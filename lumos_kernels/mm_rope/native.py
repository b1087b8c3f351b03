"""mm_rope in C++ (csrc/mm_rope), one pass over q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library
from .contract import Gradients, Inputs, Norm, Rotated


def forward(inputs: Inputs) -> Rotated:
    """Rotate q and k. contract.py says what comes in and goes out."""
    return Rotated(*torch.ops.lumos_native.mm_rope_forward.default(*_arguments(inputs)))


def backward(inputs: Inputs, grad: Rotated) -> Gradients:
    """Return the gradients. The sums over tokens have one order, whatever the number of threads."""
    dq, dk, *dnorms = torch.ops.lumos_native.mm_rope_backward.default(*grad, *_arguments(inputs))
    return Gradients(dq, dk, _like(inputs.q_norm, *dnorms[:2]), _like(inputs.k_norm, *dnorms[2:]))


def _arguments(inputs: Inputs) -> tuple[object, ...]:
    q, k, positions, q_norm, k_norm, inv_freq, eps = inputs
    return q, k, positions, *_fp32(q_norm), *_fp32(k_norm), inv_freq, eps, library.isa_value()


def _fp32(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the norm as the kernels read it: fp32 and contiguous."""
    if norm is None:
        return None, None
    return norm.weight.float().contiguous(), norm.bias.float().contiguous()


def _like(norm: Norm | None, dweight: Tensor, dbias: Tensor) -> Norm | None:
    return None if norm is None else Norm(dweight.to(norm.weight.dtype), dbias.to(norm.bias.dtype))
