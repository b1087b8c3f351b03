"""tube_masked_loss under torch.library: schemas, fakes and autograd around the contract. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Problem
from ..registration import define, once_differentiable
from .contract import OP, Inputs, Outputs, RowLoss, StatisticGradients, Wanted
from .target_rows import target_rows
from .weight_gradient import can_share, class_sums, statistics_dtype, whole_weight, whole_weight_in_place

_INPUTS = "Tensor hidden, Tensor weight, Tensor labels, Tensor? rows"
_WANTED = "int first, int last, bool need_hidden, bool need_weight, bool shared, str impl"


def row_losses(nll: Tensor, lse: Tensor, token_weight: Tensor | None, z_loss_weight: float) -> Tensor:
    """Return the row losses [T] from the statistics, which are zero on rows that are no targets."""
    # nll is 0 on such rows, and no token weight may matter there, not even an infinite one.
    loss = nll if token_weight is None else torch.where(nll == 0, nll, nll * token_weight)
    return loss + z_loss_weight * lse.square() if z_loss_weight else loss


def _inputs(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, first: int, last: int) -> Inputs:
    """Select the class slice. A slice of another dtype than hidden's is copied."""
    return Inputs(hidden, weight[first:last].to(hidden.dtype), targets, rows)


def _wanted(
    hidden: Tensor, weight: Tensor, first: int, last: int, need_hidden: bool, need_weight: bool, shared: bool
) -> Wanted:
    """Return what a call is to make, with unwritten memory for the gradient of the class slice."""
    return Wanted(need_hidden, class_sums(hidden, weight, first, last, shared) if need_weight else None)


def _spread(values: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """Return [N] as [T], zero on rows that are no targets."""
    return values.new_zeros(tokens).index_copy_(0, rows, values)


def _present(hidden: Tensor, dhidden: Tensor | None, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both gradients as a schema can have them: contiguous, and empty where they are absent."""
    return (
        hidden.new_empty(0) if dhidden is None else dhidden.contiguous(),
        hidden.new_empty(0, dtype=statistics_dtype(hidden)) if sums is None else sums,
    )


def _nothing(hidden: Tensor, wanted: Wanted) -> Outputs:
    """Return the outputs where no row is a target: no statistics, and gradients of zero."""
    if wanted.weight is not None:
        wanted.weight.zero_()
    none = hidden.new_empty(0, dtype=statistics_dtype(hidden))
    return Outputs(none, none, none.bool(), torch.zeros_like(hidden) if wanted.hidden else None)


def _fake_gradients(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wanted = _wanted(hidden, weight, *rest[-6:-1])
    return _present(hidden, hidden.new_empty(hidden.shape) if wanted.hidden else None, wanted.weight)


def _fake_forward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    nll, lse = (hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden)) for _ in range(2))
    return nll, lse, torch.empty_like(nll, dtype=torch.bool), *_fake_gradients(hidden, weight, *rest)


@define(
    f"tube_masked_loss({_INPUTS}, Tensor? token_weight, float z_loss_weight, {_WANTED})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
def _forward(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    token_weight, z_loss_weight, first, last, *need, impl = rest
    chosen = OP.choose(impl, Problem.of(hidden))
    rows, targets = target_rows(labels, rows, first, last)
    wanted = _wanted(hidden, weight, first, last, *need)
    if rows.numel() == 0:
        outputs = _nothing(hidden, wanted)
    else:
        loss = RowLoss(None if token_weight is None else token_weight[rows], z_loss_weight)
        outputs = chosen.forward(_inputs(hidden, weight, rows, targets, first, last), loss, wanted)
    *statistics, dhidden = outputs
    return *(_spread(x, rows, hidden.shape[0]) for x in statistics), *_present(hidden, dhidden, wanted.weight)


def _fake_backward(_: Tensor, __: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(hidden, weight, *rest)


@define(
    f"tube_masked_loss_backward(Tensor grad_nll, Tensor grad_lse, {_INPUTS}, Tensor lse, {_WANTED})"
    " -> (Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad_nll: Tensor, grad_lse: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    labels, rows, lse, first, last, *need, impl = rest
    chosen = OP.choose(impl, Problem.of(hidden))
    rows, targets = target_rows(labels, rows, first, last)
    wanted = _wanted(hidden, weight, first, last, *need)
    if rows.numel() == 0:
        dhidden = _nothing(hidden, wanted).dhidden
    else:
        inputs = _inputs(hidden, weight, rows, targets, first, last)
        grad = StatisticGradients(grad_nll[rows], grad_lse[rows])
        dhidden = chosen.backward(inputs, lse[rows], grad, wanted)
    return _present(hidden, dhidden, wanted.weight)


class SummedLoss(torch.autograd.Function):
    """Sum of the row losses. Forward makes the gradients and backward scales them.

    In eager mode backward hands out the very memory that forward filled, and a second backward pass makes the gradients
    again. Compiled code plans its own memory, so there backward keeps the gradients and copies them.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        hidden, weight, labels, rows, token_weight, z_loss_weight, first, last, impl = arguments
        ctx.need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        ctx.in_place = not torch.compiler.is_compiling() and can_share(hidden, weight)
        ctx.options = z_loss_weight, first, last, *ctx.need, ctx.in_place, impl
        nll, lse, correct, *gradients = torch.ops.lumos_kernels.tube_masked_loss.default(
            hidden, weight, labels, rows, token_weight, *ctx.options
        )
        ctx.save_for_backward(hidden, weight, labels, rows, token_weight, *(() if ctx.in_place else gradients))
        ctx.gradients = gradients if ctx.in_place else None
        ctx.mark_non_differentiable(nll, lse, correct)
        ctx.set_materialize_grads(False)
        return row_losses(nll, lse, token_weight, z_loss_weight).sum(), nll, lse, correct

    @staticmethod
    @once_differentiable(OP.name)
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_sum is None:
            return (None,) * 9
        hidden, weight, labels, rows, token_weight, *gradients = saved
        _, first, last, *_ = ctx.options
        if ctx.in_place:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                gradients = torch.ops.lumos_kernels.tube_masked_loss.default(
                    hidden, weight, labels, rows, token_weight, *ctx.options
                )[3:]
            dhidden = gradients[0].mul_(grad_sum) if ctx.need[0] else None
            dweight = whole_weight_in_place(gradients[1], grad_sum, weight, first, last) if ctx.need[1] else None
        else:
            dhidden = (gradients[0] * grad_sum).to(hidden.dtype) if ctx.need[0] else None
            dweight = whole_weight(gradients[1], grad_sum, weight, first, last) if ctx.need[1] else None
        return dhidden, dweight, *(None,) * 7


class RowStatistics(torch.autograd.Function):
    """nll and lse of every row, differentiable. Backward makes the logits again, since upstream gradients come late."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        hidden, weight, labels, rows, first, last, impl = arguments
        nll, lse, correct, *_ = torch.ops.lumos_kernels.tube_masked_loss.default(
            hidden, weight, labels, rows, None, 0.0, first, last, False, False, False, impl
        )
        ctx.save_for_backward(hidden, weight, labels, rows, lse)
        ctx.options = first, last, impl
        ctx.mark_non_differentiable(correct)
        return nll, lse, correct

    @staticmethod
    @once_differentiable(OP.name)
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_nll: Tensor, grad_lse: Tensor, _: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, rows, lse = saved
        first, last, impl = ctx.options
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        in_place = not torch.compiler.is_compiling() and can_share(hidden, weight)
        dhidden, sums = torch.ops.lumos_kernels.tube_masked_loss_backward.default(
            grad_nll, grad_lse, hidden, weight, labels, rows, lse, first, last, *need, in_place, impl
        )
        whole = whole_weight_in_place if in_place else whole_weight
        dweight = whole(sums, 1.0, weight, first, last) if need[1] else None
        return dhidden if need[0] else None, dweight, *(None,) * 5


# Both with their gradients, typed.
# hidden, weight, labels, rows, token_weight, z_loss_weight, first, last, impl -> sum of row losses, nll, lse, correct
summed_loss: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = SummedLoss.apply
# hidden, weight, labels, rows, first, last, impl -> nll, lse, correct
row_statistics: Callable[..., tuple[Tensor, Tensor, Tensor]] = RowStatistics.apply
