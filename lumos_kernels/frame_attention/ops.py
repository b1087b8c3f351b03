"""frame_attention under torch.library: schemas, fakes and autograd. Imports torch only.

An implementation is a module of this folder with
    forward(q, k, v, limits, scale) -> o, lse
    backward(grad_o, grad_lse or None, q, k, v, o, lse, limits, scale, deterministic) -> dq, dk, dv
Inputs are validated and have a unit last stride; outputs are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumos_kernels import checks, dispatch
from lumos_kernels.dispatch import Problem, runs_anywhere
from lumos_kernels.layout import RowLimits
from lumos_kernels.library_ops import define


def _runs_native(problem: Problem) -> str | None:
    if problem.head_dim is not None and (problem.head_dim == 0 or problem.head_dim % 32):
        return f"computes head sizes that are multiples of 32, not {problem.head_dim}"
    return dispatch.runs_native(problem)


def _runs_triton(problem: Problem) -> str | None:
    if problem.head_dim is not None and problem.head_dim not in (32, 64, 96, 128):
        return f"computes head sizes 32, 64, 96 and 128, not {problem.head_dim}"
    return dispatch.runs_triton(problem)


def _runs_flash(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"runs CUDA tensors, not {problem.device}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bfloat16 and float16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.head_dim is not None and (problem.head_dim > 256 or problem.head_dim % 8):
        return f"computes head sizes that are multiples of 8 up to 256, not {problem.head_dim}"
    from lumos_kernels.frame_attention import flash

    return flash.refusal()


OP = dispatch.register(
    "frame_attention",
    "lumos_kernels.frame_attention",
    {"triton": _runs_triton, "native": _runs_native, "flash": _runs_flash, "reference": runs_anywhere},
)

_LIMITS = "Tensor kv_start, Tensor kv_end, Tensor q_start, Tensor q_end"


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _fake_forward(q, k, v, kv_start, kv_end, q_start, q_end, scale, impl):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))


@define(
    f"frame_attention(Tensor q, Tensor k, Tensor v, {_LIMITS}, float scale, str impl) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(q, k, v, kv_start, kv_end, q_start, q_end, scale, impl):
    chosen = OP.choose(impl, Problem.of(q, q.shape[-1]))
    q, k, v = (checks.unit_last_stride(x) for x in (q, k, v))
    o, lse = chosen.forward(q, k, v, RowLimits(kv_start, kv_end, q_start, q_end), scale)
    return o.contiguous(), lse.contiguous()


def _fake_backward(grad_o, grad_lse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@define(
    "frame_attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{_LIMITS}, float scale, bool deterministic, str impl) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad_o, grad_lse, q, k, v, o, lse, kv_start, kv_end, q_start, q_end, scale, deterministic, impl):
    chosen = OP.choose(impl, Problem.of(q, q.shape[-1]))
    grad_o, q, k, v = (checks.unit_last_stride(x) for x in (grad_o, q, k, v))
    limits = RowLimits(kv_start, kv_end, q_start, q_end)
    grads = chosen.backward(grad_o, grad_lse, q, k, v, o, lse, limits, scale, deterministic)
    return tuple(grad.contiguous() for grad in grads)


class FrameAttention(torch.autograd.Function):
    """Saves q, k, v, o and lse; the probabilities are recomputed in backward."""

    @staticmethod
    def forward(ctx, q, k, v, kv_start, kv_end, q_start, q_end, scale, deterministic, impl):
        limits = kv_start, kv_end, q_start, q_end
        o, lse = torch.ops.lumos_kernels.frame_attention.default(q, k, v, *limits, scale, impl)
        ctx.save_for_backward(q, k, v, o, lse, *limits)
        ctx.options = scale, deterministic, impl
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_lse):
        if grad_o is None and grad_lse is None:
            return (None,) * 10
        q, k, v, o, lse, *limits = ctx.saved_tensors
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o
        grads = torch.ops.lumos_kernels.frame_attention_backward.default(
            grad_o, grad_lse, q, k, v, o, lse, *limits, *ctx.options
        )
        needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return *needed, *(None,) * 7
