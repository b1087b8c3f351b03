"""The contract of an implementation of tube_masked_loss, and which implementations there are.

Legend: T tokens, N target rows, C hidden size, K classes, x [N, C] the target rows of the hidden states, W [K, C] the
class slice of lm_head. With logits = x W^T,
    lse = logsumexp(logits),   nll = lse - logit of the target,   row loss = token_weight * nll + z_loss_weight * lse^2.

Forward computes the statistics nll, lse and correct, and those gradients of the SUM of the row losses that the caller
wants. The reductions "sum" and "mean" only scale these gradients, so their training step needs no second pass over the
logits. Backward serves the reduction "none", where autograd delivers a gradient for each row: it recomputes the logits.

A target outside 0 .. K - 1 marks a row to skip: nll = lse = 0, correct is False, and its gradients are 0. Such targets
come from wrong `rows` on a GPU, which nobody checks, so no implementation may read or write at their index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from .. import dispatch


class Inputs(NamedTuple):
    """What an implementation gets: tensors on one device whose shapes and dtypes passed the checks."""

    hidden: Tensor  # [T, C]
    weight: Tensor  # [K, C], the class slice, in hidden's dtype
    targets: Tensor  # int64 [N], in [0, K); the rows of others are skipped
    rows: Tensor  # int64 [N], in [0, T), N >= 1: the target rows of hidden


class RowLoss(NamedTuple):
    """The factors of the row loss whose sum forward differentiates."""

    token_weight: Tensor | None  # [N], fp32 or wider; None for ones
    z_loss_weight: float


class Wanted(NamedTuple):
    """The gradients that an implementation makes."""

    hidden: bool
    weight: Tensor | None  # unwritten [K, C], fp32 or wider: where the gradient of the class slice goes


class Outputs(NamedTuple):
    """The results of forward."""

    nll: Tensor  # [N], fp32 (fp64 for fp64 inputs), as lse
    lse: Tensor  # [N]; saved for backward
    correct: Tensor  # bool [N]: the target is the first of the highest logits
    dhidden: Tensor | None  # [T, C] in hidden's dtype, zero on other rows; None where not wanted


class StatisticGradients(NamedTuple):
    """The gradients that arrive at the statistics."""

    nll: Tensor  # [N]
    lse: Tensor  # [N]


class Implementation(Protocol):
    """A module of this folder."""

    def forward(self, inputs: Inputs, loss: RowLoss, wanted: Wanted) -> Outputs: ...

    def backward(self, inputs: Inputs, lse: Tensor, grad: StatisticGradients, wanted: Wanted) -> Tensor | None:
        """Return the gradient of hidden where it is wanted, and write that of the class slice."""
        ...


OP: dispatch.Op[Implementation] = dispatch.register("tube_masked_loss", __package__, dispatch.USUAL)

if TYPE_CHECKING:  # mypy holds every implementation to the Protocol
    from . import native, reference, triton

    _triton: Implementation = triton
    _native: Implementation = native
    _reference: Implementation = reference
