"""The contract of an implementation of frame_attention, and which implementations there are.

Query i attends to the keys kv_start[i] <= j < kv_end[i]: o = softmax(scale * q k^T) v, and lse is the logarithm of each
row's sum of exponentials. A row without keys gives 0 and -inf, and passes no gradient.

Legend: Tq queries, Tk keys, Hq query heads, Hkv key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import Problem
from ..errors import dtype_name
from ..layout import RowLimits


class Inputs(NamedTuple):
    """What an implementation gets: tensors on one device whose shapes and dtypes passed the checks.

    D is a multiple of HEAD_DIM_STEP for the implementations that are named there.
    """

    q: Tensor  # [Tq, Hq, D], unit last stride
    k: Tensor  # [Tk, Hkv, D], unit last stride; Hkv divides Hq, query head h reads kv head h * Hkv // Hq
    v: Tensor  # like k
    limits: RowLimits  # of Tq queries and Tk keys, int32, any strides, any values in any order
    scale: float  # factor of the scores


class Outputs(NamedTuple):
    """What forward gives, and what is saved for backward beside the inputs."""

    o: Tensor  # [Tq, Hq, D] in q's dtype
    lse: Tensor  # fp32 [Hq, Tq] (fp64 for fp64 inputs), natural logarithm


class OutputGradients(NamedTuple):
    """The gradients that arrive at the outputs."""

    o: Tensor  # [Tq, Hq, D], unit last stride
    lse: Tensor | None  # [Hq, Tq], any strides; None where lse took no part in the loss


class Gradients(NamedTuple):
    """The gradients of q, k and v, in their dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor


class Implementation(Protocol):
    """A module of this folder. Tensors that it returns are new."""

    def forward(self, inputs: Inputs) -> Outputs: ...

    def backward(self, inputs: Inputs, outputs: Outputs, grad: OutputGradients, *, deterministic: bool) -> Gradients:
        """Return the gradients, with the same bits every time if deterministic."""
        ...


class SelfDifferentiating(Implementation, Protocol):
    """An implementation whose library brings its own autograd, which keeps what the library's backward needs."""

    def differentiable_forward(self, inputs: Inputs, *, deterministic: bool) -> Outputs:
        """Return outputs through which gradients flow. The inputs are as the caller gave them, with any strides."""
        ...


def _runs_native(problem: Problem) -> str | None:
    return dispatch.runs_native(problem)


def _runs_triton(problem: Problem) -> str | None:
    if problem.head_dim is not None and problem.head_dim > 128:
        return f"computes head sizes up to 128, not {problem.head_dim}"
    return dispatch.runs_triton(problem)


def _runs_flash(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"runs CUDA tensors, not {problem.device}"
    refusal = dispatch.refuses_architecture(problem)
    if refusal is not None:
        return refusal
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bfloat16 and float16, not {dtype_name(problem.dtype)}"
    if problem.head_dim is not None and (problem.head_dim > 256 or problem.head_dim % 8):
        return f"computes head sizes that are multiples of 8 up to 256, not {problem.head_dim}"
    from . import flash

    return flash.refusal()


OP: dispatch.Op[Implementation] = dispatch.register(
    "frame_attention",
    __package__,
    {"triton": _runs_triton, "native": _runs_native, "flash": _runs_flash, "reference": dispatch.runs_anywhere},
    on_request={"flash": 'passes no gradient through lse, so it runs only when asked for: impl="flash"'},
)

# Implementations whose kernels compute head sizes that are multiples of a number. ops.py pads the others with zeros,
# which is exact: a zero channel adds nothing to a score, and its o and its gradients are zero.
HEAD_DIM_STEP: Mapping[str, int] = {"triton": 32, "native": 32}

# Implementations that are SelfDifferentiating. Under autograd of our own they would run their forward twice.
SELF_DIFFERENTIATING = frozenset({"flash"})

# The kind of backward that is one pass: it adds the parts of dq by atomics, in an order that differs from run to run.
FUSED = "fused"

if TYPE_CHECKING:  # mypy holds every implementation to the Protocol
    from . import flash, native, reference, triton

    _triton: Implementation = triton
    _native: Implementation = native
    _reference: Implementation = reference
    _flash: SelfDifferentiating = flash
