"""tube_masked_loss under torch.library: schemas, fakes and autograd. Imports torch only.

An implementation is a module of this folder with
    forward(hidden, weight, targets, rows, row_weight, z_loss, need_hidden, need_weight)
        -> nll, lse, correct (each [N]), dhidden [T, C] or None, dweight [K, C] or None
    backward(grad_nll, grad_lse, hidden, weight, targets, rows, lse, need_hidden, need_weight) -> dhidden, dweight
where weight is the class slice in hidden's dtype and rows are the N target rows. The gradients that forward returns are
those of the sum of the row losses, row_weight * nll + z_loss * lse^2: a training step needs no second pass over the
logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumos_kernels import dispatch
from lumos_kernels.dispatch import Problem, runs_anywhere
from lumos_kernels.library_ops import define

OP = dispatch.register(
    "tube_masked_loss",
    "lumos_kernels.tube_loss",
    {"triton": dispatch.runs_triton, "native": dispatch.runs_native, "reference": runs_anywhere},
)

SCALED_FLOATS = 4 << 20  # of the weight's gradient at once: 16 MB


def _stat_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _target_rows(labels: Tensor, rows: Tensor | None, first: int, last: int) -> Tensor:
    """int64 [N]; without `rows` their number is read back from the device."""
    return rows.long() if rows is not None else is_target(labels, first, last).nonzero()[:, 0]


def is_target(labels: Tensor, first: int, last: int) -> Tensor:
    return (labels >= first) & (labels < last)


def _spread(values: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """[N] -> [T], zero where a row is no target."""
    return values.new_zeros(tokens).index_copy_(0, rows, values)


def _fake_forward(hidden, weight, labels, rows, token_weight, first, last, z_loss, need_hidden, need_weight, impl):
    stat = hidden.new_empty(hidden.shape[0], dtype=_stat_dtype(hidden))
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    dweight = stat.new_empty((last - first, hidden.shape[1]) if need_weight else 0)
    return stat, torch.empty_like(stat), torch.empty_like(stat, dtype=torch.bool), dhidden, dweight


@define(
    "tube_masked_loss(Tensor hidden, Tensor weight, Tensor labels, Tensor? rows, Tensor? token_weight, int first, "
    "int last, float z_loss, bool need_hidden, bool need_weight, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
def _forward(hidden, weight, labels, rows, token_weight, first, last, z_loss, need_hidden, need_weight, impl):
    chosen = OP.choose(impl, Problem.of(hidden))
    rows = _target_rows(labels, rows, first, last)
    row_weight = None if token_weight is None else token_weight[rows]
    classes = weight[first:last].to(hidden.dtype)
    if rows.numel() == 0:
        empty = hidden.new_empty(0, dtype=_stat_dtype(hidden))
        stats = empty, empty, empty.bool()
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        dweight = empty.new_zeros(classes.shape) if need_weight else None
    else:
        *stats, dhidden, dweight = chosen.forward(
            hidden, classes, labels[rows] - first, rows, row_weight, z_loss, need_hidden, need_weight
        )
    nll, lse, correct = (_spread(stat, rows, hidden.shape[0]) for stat in stats)
    return nll, lse, correct, *_present(hidden, dhidden, dweight)


def _present(hidden: Tensor, dhidden: Tensor | None, dweight: Tensor | None) -> tuple[Tensor, Tensor]:
    """A schema has no optional outputs: an absent gradient is an empty tensor. The others are contiguous, as the fake
    says, whatever the strides of hidden and weight.
    """
    return (
        hidden.new_empty(0) if dhidden is None else dhidden.contiguous(),
        hidden.new_empty(0, dtype=_stat_dtype(hidden)) if dweight is None else dweight.contiguous(),
    )


def _fake_backward(dnll, dlse, hidden, weight, labels, rows, lse, first, last, need_hidden, need_weight, impl):
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    return dhidden, lse.new_empty((last - first, hidden.shape[1]) if need_weight else 0)


@define(
    "tube_masked_loss_backward(Tensor grad_nll, Tensor grad_lse, Tensor hidden, Tensor weight, Tensor labels, "
    "Tensor? rows, Tensor lse, int first, int last, bool need_hidden, bool need_weight, str impl) -> (Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad_nll, grad_lse, hidden, weight, labels, rows, lse, first, last, need_hidden, need_weight, impl):
    chosen = OP.choose(impl, Problem.of(hidden))
    rows = _target_rows(labels, rows, first, last)
    classes = weight[first:last].to(hidden.dtype)
    dhidden, dweight = chosen.backward(
        grad_nll[rows],
        grad_lse[rows],
        hidden,
        classes,
        labels[rows] - first,
        rows,
        lse[rows],
        need_hidden,
        need_weight,
    )
    return _present(hidden, dhidden, dweight)


def _whole_weight(dclasses: Tensor, scale: Tensor | float, weight: Tensor, first: int, last: int) -> Tensor:
    """The gradient of the whole lm_head: `scale` times the class slice's, zero elsewhere.

    On a CPU a product that is rounded needs a copy before the rounding, hence the blocks; a GPU kernel does not.
    """
    dweight = torch.zeros_like(weight)
    block = max(1, SCALED_FLOATS // max(1, weight.shape[1])) if weight.device.type == "cpu" else last - first
    for part, out in zip(dclasses.split(block), dweight[first:last].split(block), strict=True):
        torch.mul(part, scale, out=out)
    return dweight


class SummedLoss(torch.autograd.Function):
    """Sum of the row losses. The gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, token_weight, first, last, z_loss, impl):
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        nll, lse, correct, dhidden, dclasses = torch.ops.lumos_kernels.tube_masked_loss.default(
            hidden, weight, labels, rows, token_weight, first, last, z_loss, *need, impl
        )
        ctx.save_for_backward(dhidden, dclasses, weight)
        ctx.slice = first, last
        ctx.mark_non_differentiable(nll, lse, correct)
        ctx.set_materialize_grads(False)
        return row_losses(nll, lse, token_weight, z_loss).sum(), nll, lse, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, *_):
        if grad_sum is None:
            return (None,) * 9
        dhidden, dclasses, weight = ctx.saved_tensors
        dhidden = (dhidden * grad_sum).to(dhidden.dtype) if ctx.needs_input_grad[0] else None
        dweight = _whole_weight(dclasses, grad_sum, weight, *ctx.slice) if ctx.needs_input_grad[1] else None
        return dhidden, dweight, *(None,) * 7


class RowStatistics(torch.autograd.Function):
    """nll and lse of every row, differentiable: backward needs their true gradients, so it recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, first, last, impl):
        nll, lse, correct, *_ = torch.ops.lumos_kernels.tube_masked_loss.default(
            hidden, weight, labels, rows, None, first, last, 0.0, False, False, impl
        )
        ctx.save_for_backward(hidden, weight, labels, rows, lse)
        ctx.options = first, last, impl
        ctx.mark_non_differentiable(correct)
        return nll, lse, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, grad_lse, _):
        hidden, weight, labels, rows, lse = ctx.saved_tensors
        first, last, impl = ctx.options
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dhidden, dclasses = torch.ops.lumos_kernels.tube_masked_loss_backward.default(
            grad_nll, grad_lse, hidden, weight, labels, rows, lse, first, last, *need, impl
        )
        dweight = _whole_weight(dclasses, 1.0, weight, first, last) if need[1] else None
        return dhidden if need[0] else None, dweight, *(None,) * 5


def row_losses(nll: Tensor, lse: Tensor, token_weight: Tensor | None, z_loss: float) -> Tensor:
    """Row losses [T] from the statistics, which are zero where a row is no target."""
    # nll is 0 where a row is no target, and whatever its weight is must not matter, even if it is infinite.
    loss = nll if token_weight is None else torch.where(nll == 0, nll, nll * token_weight)
    return loss + z_loss * lse.square() if z_loss else loss
