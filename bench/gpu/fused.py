"""Attention whose backward is chosen by name, deterministic or fused, whatever the tuned table says."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lumos_kernels import RowLimits, frame_attention
from lumos_kernels.frame_attention.contract import Gradients, Inputs, OutputGradients, Outputs


def backward_fused(impl: str, inputs: Inputs, outputs: Outputs, grad: OutputGradients) -> Gradients:
    """Return the gradients by the implementation's fused backward; by its faster one where it has no fused one."""
    module: Any = importlib.import_module(f"lumos_kernels.frame_attention.{impl}")
    if hasattr(module, "backward_fused"):
        return module.backward_fused(inputs, outputs, grad)
    return module.backward(inputs, outputs, grad, deterministic=False)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, impl: str) -> tuple[Tensor, Tensor]:
        module: Any = importlib.import_module(f"lumos_kernels.frame_attention.{impl}")
        inputs = Inputs(q, k, v, limits, q.shape[2] ** -0.5)
        o, lse = module.forward(inputs)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.limits, ctx.impl = limits, impl
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        inputs = Inputs(q, k, v, ctx.limits, q.shape[2] ** -0.5)
        grads = backward_fused(ctx.impl, inputs, Outputs(o, lse), OutputGradients(grad_o.contiguous(), None))
        return *grads, None, None


def attention_fused(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, impl: str) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of frame_attention; gradients come from the fused backward. lse takes none."""
    return _Attention.apply(q, k, v, limits, impl)


def attention_deterministic(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, impl: str) -> Tensor:
    """Return frame_attention, whose gradients come from the deterministic backward."""
    return frame_attention(q, k, v, limits, deterministic=True, impl=impl)
