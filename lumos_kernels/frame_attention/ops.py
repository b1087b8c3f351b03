"""frame_attention under torch.library: schemas, fakes and autograd around the contract. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Problem
from ..layout import RowLimits
from ..registration import define, once_differentiable
from ..tensors import unit_last_stride
from .contract import (
    HEAD_DIM_STEP,
    OP,
    SELF_DIFFERENTIATING,
    Gradients,
    Implementation,
    Inputs,
    OutputGradients,
    Outputs,
    SelfDifferentiating,
)

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor kv_start, Tensor kv_end, Tensor q_start, Tensor q_end, float scale"


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, kv_end: Tensor, q_start: Tensor, q_end: Tensor, scale: float
) -> Inputs:
    limits = RowLimits(kv_start, kv_end, q_start, q_end)
    return Inputs(unit_last_stride(q), unit_last_stride(k), unit_last_stride(v), limits, scale)


def _missing_channels(chosen: Implementation, head_dim: int) -> int:
    """Return the zero channels that an implementation needs behind a head's own (contract.HEAD_DIM_STEP)."""
    if head_dim % 32 == 0:  # what every implementation takes: no call of usual models goes on
        return 0
    name = cast(Any, chosen).__name__.rpartition(".")[2]
    return -head_dim % HEAD_DIM_STEP.get(name, 1)


def _padded(inputs: Inputs, channels: int) -> Inputs:
    q, k, v = (F.pad(x, (0, channels)) for x in inputs[:3])
    return inputs._replace(q=q, k=k, v=v)


def _fake_forward(q: Tensor, *_: Any) -> Outputs:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return Outputs(q.new_empty(q.shape), lse)


@define(f"frame_attention({_INPUTS}, str impl) -> (Tensor, Tensor)", _fake_forward)
def _forward(q: Tensor, *rest: Any) -> Outputs:
    *inputs, impl = rest
    chosen = OP.choose(impl, Problem.of(q, q.shape[-1]))
    given = _inputs(q, *inputs)
    missing = _missing_channels(chosen, q.shape[-1])
    o, lse = chosen.forward(_padded(given, missing) if missing else given)
    return Outputs(o[..., : q.shape[-1]].contiguous() if missing else o.contiguous(), lse.contiguous())


def _fake_backward(grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return Gradients(q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))


@define(
    f"frame_attention_backward(Tensor grad_o, Tensor? grad_lse, {_INPUTS}, Tensor o, Tensor lse, bool deterministic, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, *rest: Any) -> Gradients:
    *inputs, o, lse, deterministic, impl = rest
    chosen = OP.choose(impl, Problem.of(q, q.shape[-1]))
    given, grad_o = _inputs(q, *inputs), unit_last_stride(grad_o)
    o, lse = unit_last_stride(o), lse.contiguous()  # hooks on saved tensors may give back other strides
    missing = _missing_channels(chosen, q.shape[-1])
    if missing:
        given, o, grad_o = _padded(given, missing), F.pad(o, (0, missing)), F.pad(grad_o, (0, missing))
    gradients = chosen.backward(given, Outputs(o, lse), OutputGradients(grad_o, grad_lse), deterministic=deterministic)
    if missing:
        gradients = Gradients(*(x[..., : q.shape[-1]] for x in gradients))
    return Gradients(*(x.contiguous() for x in gradients))


class FrameAttention(torch.autograd.Function):
    """frame_attention with its gradients. Saves q, k, v, o and lse; backward recomputes the probabilities."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, deterministic, impl = arguments
        o, lse = torch.ops.lumos_kernels.frame_attention.default(*inputs, impl)
        *tensors, scale = inputs
        ctx.save_for_backward(*tensors, o, lse)
        ctx.options = scale, deterministic, impl
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable(OP.name)
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_o: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_o is None and grad_lse is None:
            return (None,) * 10
        *tensors, o, lse = saved
        scale, deterministic, impl = ctx.options
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o
        gradients = torch.ops.lumos_kernels.frame_attention_backward.default(
            grad_o, grad_lse, *tensors, scale, o, lse, deterministic, impl
        )
        needed = (x if need else None for x, need in zip(gradients, ctx.needs_input_grad[:3], strict=True))
        return *needed, *(None,) * 7


# The op with its gradients, typed: q, k, v, four limits, scale, deterministic, impl -> o, lse.
_attend: Callable[..., tuple[Tensor, Tensor]] = FrameAttention.apply


def attend(inputs: Inputs, deterministic: bool, impl: str) -> Outputs:
    """Return differentiable outputs: through the op, or through the implementation's own autograd."""
    q, k, v, limits, scale = inputs
    if impl in SELF_DIFFERENTIATING:
        chosen = cast(SelfDifferentiating, OP.choose(impl, Problem.of(q, q.shape[-1])))
        return chosen.differentiable_forward(inputs, deterministic=deterministic)
    rows = limits.kv_start, limits.kv_end, limits.q_start, limits.q_end
    return Outputs(*_attend(q, k, v, *rows, scale, deterministic, impl))
