"""mm_rope under torch.library: schemas, fakes and autograd. Imports torch only.

An implementation is a module of this folder with
    forward(q, k, positions, q_norm, k_norm, inv_freq, eps) -> q_out, k_out
    backward(grad_q, grad_k, q, k, positions, q_norm, k_norm, inv_freq, eps) -> dq, dk, dq_norm, dk_norm
where a norm is None or (weight, bias). Inputs are validated and have a unit last stride; outputs are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumos_kernels import checks, dispatch
from lumos_kernels.dispatch import Problem, runs_anywhere
from lumos_kernels.library_ops import define
from lumos_kernels.mm_rope.common import inverse_frequencies

OP = dispatch.register(
    "mm_rope",
    "lumos_kernels.mm_rope",
    {"triton": dispatch.runs_triton, "native": dispatch.runs_native, "reference": runs_anywhere},
)

_NORMS = "Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, float theta, float eps, str impl"


def _norm(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if weight is None else (weight, bias)


def _fake_forward(q, k, positions, *norms_and_options):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@define(f"mm_rope(Tensor q, Tensor k, Tensor positions, {_NORMS}) -> (Tensor, Tensor)", _fake_forward)
def _forward(q, k, positions, q_weight, q_bias, k_weight, k_bias, theta, eps, impl):
    chosen = OP.choose(impl, Problem.of(q, q.shape[-1]))
    inv_freq = inverse_frequencies(theta, q.shape[-1], q.device)
    q, k = checks.unit_last_stride(q), checks.unit_last_stride(k)
    return chosen.forward(q, k, positions, _norm(q_weight, q_bias), _norm(k_weight, k_bias), inv_freq, eps)


def _fake_backward(grad_q, grad_k, q, k, positions, q_weight, q_bias, k_weight, k_bias, *options):
    norms = (p.new_empty(p.shape) if p is not None else q.new_empty(0) for p in (q_weight, q_bias, k_weight, k_bias))
    return q.new_empty(q.shape), k.new_empty(k.shape), *norms


@define(
    f"mm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor positions, {_NORMS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad_q, grad_k, q, k, positions, q_weight, q_bias, k_weight, k_bias, theta, eps, impl):
    chosen = OP.choose(impl, Problem.of(q, q.shape[-1]))
    inv_freq = inverse_frequencies(theta, q.shape[-1], q.device)
    tensors = (checks.unit_last_stride(t) for t in (grad_q, grad_k, q, k))
    norms = _norm(q_weight, q_bias), _norm(k_weight, k_bias)
    dq, dk, *dnorms = chosen.backward(*tensors, positions, *norms, inv_freq, eps)
    return dq, dk, *(p for norm in dnorms for p in (norm or (q.new_empty(0), q.new_empty(0))))


class MMRope(torch.autograd.Function):
    """Saves the inputs alone: backward recomputes the statistics and the angles."""

    @staticmethod
    def forward(ctx, q, k, positions, q_weight, q_bias, k_weight, k_bias, theta, eps, impl):
        ctx.save_for_backward(q, k, positions, q_weight, q_bias, k_weight, k_bias)
        ctx.options = theta, eps, impl
        return torch.ops.lumos_kernels.mm_rope.default(
            q, k, positions, q_weight, q_bias, k_weight, k_bias, theta, eps, impl
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        grads = torch.ops.lumos_kernels.mm_rope_backward.default(grad_q, grad_k, *ctx.saved_tensors, *ctx.options)
        dq, dk, *dnorms = (g if need else None for g, need in zip(grads, _need_grad(ctx), strict=True))
        return dq, dk, None, *dnorms, None, None, None


def _need_grad(ctx) -> list[bool]:
    q, k, _, *norms = ctx.needs_input_grad[:7]
    return [q, k, *norms]
