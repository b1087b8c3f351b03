"""mm_rope under torch.library: schemas, fakes and autograd around the contract. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Problem
from ..registration import define, once_differentiable
from ..tensors import unit_last_stride
from .contract import OP, Inputs, Norm, Rotated
from .frequencies import inverse_frequencies

_INPUTS = (
    "Tensor q, Tensor k, Tensor positions, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, "
    "float theta, float eps"
)


def _inputs(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    theta: float,
    eps: float,
) -> Inputs:
    inv_freq = inverse_frequencies(theta, q.shape[-1], q.device)
    q_norm = None if q_weight is None or q_bias is None else Norm(q_weight, q_bias)
    k_norm = None if k_weight is None or k_bias is None else Norm(k_weight, k_bias)
    return Inputs(unit_last_stride(q), unit_last_stride(k), positions, q_norm, k_norm, inv_freq, eps)


def _fake_forward(q: Tensor, k: Tensor, *_: Any) -> Rotated:
    return Rotated(q.new_empty(q.shape), k.new_empty(k.shape))


@define(f"mm_rope({_INPUTS}, str impl) -> (Tensor, Tensor)", _fake_forward)
def _forward(q: Tensor, *rest: Any) -> Rotated:
    *inputs, impl = rest
    return OP.choose(impl, Problem.of(q, q.shape[-1])).forward(_inputs(q, *inputs))


def _fake_backward(grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, _: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    parameters = (q.new_empty(0) if p is None else p.new_empty(p.shape) for p in rest[:4])
    return q.new_empty(q.shape), k.new_empty(k.shape), *parameters


@define(
    f"mm_rope_backward(Tensor grad_q, Tensor grad_k, {_INPUTS}, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad_q: Tensor, grad_k: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, impl = rest
    grad = Rotated(unit_last_stride(grad_q), unit_last_stride(grad_k))
    dq, dk, *dnorms = OP.choose(impl, Problem.of(q, q.shape[-1])).backward(_inputs(q, *inputs), grad)
    # A schema has no optional outputs: the gradient of an absent norm is a pair of empty tensors.
    return dq, dk, *(p for norm in dnorms for p in (norm or (q.new_empty(0), q.new_empty(0))))


class MMRope(torch.autograd.Function):
    """mm_rope with its gradients. Saves the inputs alone."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:7])
        ctx.options = arguments[7:]
        q, k = torch.ops.lumos_kernels.mm_rope.default(*arguments)
        return q, k

    @staticmethod
    @once_differentiable(OP.name)
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.lumos_kernels.mm_rope_backward.default(grad_q, grad_k, *saved, *ctx.options)
        q, k, _, *norms = ctx.needs_input_grad[:7]
        dq, dk, *dnorms = (grad if need else None for grad, need in zip(grads, (q, k, *norms), strict=True))
        return dq, dk, None, *dnorms, None, None, None


# The op with its gradients, typed: q, k, positions, q_weight, q_bias, k_weight, k_bias, theta, eps, impl -> q, k.
rotate: Callable[..., tuple[Tensor, Tensor]] = MMRope.apply
