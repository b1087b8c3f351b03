"""tube_masked_loss under torch.library: schemas, fakes and autograd. Imports torch only.

An implementation is a module of this folder with
    forward(hidden, weight, targets, rows, row_weight, z_loss, need_hidden, dweight)
        -> nll, lse, correct (each [N]), dhidden [T, C] or None
    backward(grad_nll, grad_lse, hidden, weight, targets, rows, lse, need_hidden, dweight) -> dhidden
where weight is the class slice in hidden's dtype, rows are the N >= 1 target rows, and dweight is None or the unwritten
[K, C], fp32 or wider, that takes the gradient of the class slice. The gradients that forward makes are those of the sum
of the row losses, row_weight * nll + z_loss * lse^2: a training step needs no second pass over the logits.

The gradient of a whole lm_head is the largest tensor of the loss (530 MB in bf16 at 2,048 channels), and the fp32 sums
of its class slice are as large again. In eager mode the two share one memory: see _class_sums.
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


def _fake_forward(
    hidden, weight, labels, rows, token_weight, first, last, z_loss, need_hidden, need_weight, room, impl
):
    stat = hidden.new_empty(hidden.shape[0], dtype=_stat_dtype(hidden))
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    dclasses = _class_sums(hidden, weight, first, last, room) if need_weight else stat.new_empty(0)
    return stat, torch.empty_like(stat), torch.empty_like(stat, dtype=torch.bool), dhidden, dclasses


@define(
    "tube_masked_loss(Tensor hidden, Tensor weight, Tensor labels, Tensor? rows, Tensor? token_weight, int first, "
    "int last, float z_loss, bool need_hidden, bool need_weight, bool room, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
def _forward(hidden, weight, labels, rows, token_weight, first, last, z_loss, need_hidden, need_weight, room, impl):
    chosen = OP.choose(impl, Problem.of(hidden))
    rows = _target_rows(labels, rows, first, last)
    row_weight = None if token_weight is None else token_weight[rows]
    dclasses = _class_sums(hidden, weight, first, last, room) if need_weight else None
    if rows.numel() == 0:
        empty = hidden.new_empty(0, dtype=_stat_dtype(hidden))
        stats = empty, empty, empty.bool()
        dhidden, dclasses = _no_gradient(hidden, need_hidden, dclasses)
    else:
        classes = weight[first:last].to(hidden.dtype)
        *stats, dhidden = chosen.forward(
            hidden, classes, labels[rows] - first, rows, row_weight, z_loss, need_hidden, dclasses
        )
    nll, lse, correct = (_spread(stat, rows, hidden.shape[0]) for stat in stats)
    return nll, lse, correct, *_present(hidden, dhidden, dclasses)


def _no_gradient(hidden: Tensor, need_hidden: bool, dclasses: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of no target rows."""
    return torch.zeros_like(hidden) if need_hidden else None, None if dclasses is None else dclasses.zero_()


def _present(hidden: Tensor, dhidden: Tensor | None, dclasses: Tensor | None) -> tuple[Tensor, Tensor]:
    """A schema has no optional outputs: an absent gradient is an empty tensor. That of hidden is contiguous, as the
    fake says, whatever the strides of hidden.
    """
    return (
        hidden.new_empty(0) if dhidden is None else dhidden.contiguous(),
        hidden.new_empty(0, dtype=_stat_dtype(hidden)) if dclasses is None else dclasses,
    )


def _fake_backward(dnll, dlse, hidden, weight, labels, rows, lse, first, last, need_hidden, need_weight, room, impl):
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    return dhidden, _class_sums(hidden, weight, first, last, room) if need_weight else lse.new_empty(0)


@define(
    "tube_masked_loss_backward(Tensor grad_nll, Tensor grad_lse, Tensor hidden, Tensor weight, Tensor labels, "
    "Tensor? rows, Tensor lse, int first, int last, bool need_hidden, bool need_weight, bool room, str impl) "
    "-> (Tensor, Tensor)",
    _fake_backward,
)
def _backward(grad_nll, grad_lse, hidden, weight, labels, rows, lse, first, last, need_hidden, need_weight, room, impl):
    chosen = OP.choose(impl, Problem.of(hidden))
    rows = _target_rows(labels, rows, first, last)
    dclasses = _class_sums(hidden, weight, first, last, room) if need_weight else None
    if rows.numel() == 0:
        return _present(hidden, *_no_gradient(hidden, need_hidden, dclasses))
    dhidden = chosen.backward(
        grad_nll[rows],
        grad_lse[rows],
        hidden,
        weight[first:last].to(hidden.dtype),
        labels[rows] - first,
        rows,
        lse[rows],
        need_hidden,
        dclasses,
    )
    return _present(hidden, dhidden, dclasses)


def _class_sums(hidden: Tensor, weight: Tensor, first: int, last: int, room: bool) -> Tensor:
    """Unwritten [K, C] in the statistics' dtype, for the gradient of the class slice.

    With room, its storage holds the gradient of the whole weight as well, in weight's dtype, and these sums end at the
    byte where the class slice ends in it: rounded row by row from the last one on, a row never lands on sums that are
    still to be read (_whole_weight_in_place).
    """
    shape, dtype = (last - first, weight.shape[1]), _stat_dtype(hidden)
    if not room or not _can_share(hidden, weight):
        return hidden.new_empty(shape, dtype=dtype)
    taken, end = shape[0] * shape[1] * dtype.itemsize, last * shape[1] * weight.itemsize
    lead = taken - end if taken > end else -(end - taken) % dtype.itemsize  # before the whole gradient; mostly 0
    storage = hidden.new_empty(lead + weight.numel() * weight.itemsize, dtype=torch.uint8)
    return storage[lead + end - taken : lead + end].view(dtype).view(shape)


def _can_share(hidden: Tensor, weight: Tensor) -> bool:
    return weight.itemsize <= _stat_dtype(hidden).itemsize and weight.numel() > 0


def _whole_weight(dclasses: Tensor, scale: Tensor | float, weight: Tensor, first: int, last: int) -> Tensor:
    """The gradient of the whole lm_head: `scale` times the class slice's, zero elsewhere."""
    dweight = torch.zeros_like(weight)
    for part, out in zip(_parts(dclasses), _parts(dweight[first:last]), strict=True):
        torch.mul(part, scale, out=out)
    return dweight


def _whole_weight_in_place(dclasses: Tensor, scale: Tensor | float, weight: Tensor, first: int, last: int) -> Tensor:
    """_whole_weight in the memory of dclasses, which _class_sums gave room for it."""
    end = (dclasses.storage_offset() + dclasses.numel()) * dclasses.itemsize
    start = end - last * weight.shape[1] * weight.itemsize
    whole = dclasses.view(torch.uint8).as_strided((weight.numel() * weight.itemsize,), (1,), start)
    dweight = whole.view(weight.dtype).view(weight.shape)
    for part, out in zip(reversed(_parts(dclasses)), reversed(_parts(dweight[first:last])), strict=True):
        out.copy_(part * scale)
    dweight[:first].zero_()
    dweight[last:].zero_()
    return dweight


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in blocks: a product that is rounded needs a copy before the rounding."""
    return rows.split(max(1, SCALED_FLOATS // max(1, rows.shape[1])))


class SummedLoss(torch.autograd.Function):
    """Sum of the row losses. The gradients are made in forward and scaled in backward.

    In eager mode backward hands out the very memory that forward filled; a second backward pass makes the gradients
    again. Compiled code, which plans its own memory, keeps them and copies.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, token_weight, first, last, z_loss, impl):
        ctx.need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        ctx.in_place = not torch.compiler.is_compiling() and _can_share(hidden, weight)
        ctx.options = first, last, z_loss, *ctx.need, ctx.in_place, impl
        nll, lse, correct, *gradients = torch.ops.lumos_kernels.tube_masked_loss.default(
            hidden, weight, labels, rows, token_weight, *ctx.options
        )
        ctx.save_for_backward(hidden, weight, labels, rows, token_weight, *(() if ctx.in_place else gradients))
        ctx.gradients = gradients if ctx.in_place else None
        ctx.mark_non_differentiable(nll, lse, correct)
        ctx.set_materialize_grads(False)
        return row_losses(nll, lse, token_weight, z_loss).sum(), nll, lse, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, *_):
        if grad_sum is None:
            return (None,) * 9
        hidden, weight, labels, rows, token_weight, *gradients = ctx.saved_tensors
        first, last, *_ = ctx.options
        if ctx.in_place:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                *_, dhidden, dclasses = torch.ops.lumos_kernels.tube_masked_loss.default(
                    hidden, weight, labels, rows, token_weight, *ctx.options
                )
                gradients = dhidden, dclasses
            dhidden = gradients[0].mul_(grad_sum) if ctx.need[0] else None
            dweight = _whole_weight_in_place(gradients[1], grad_sum, weight, first, last) if ctx.need[1] else None
        else:
            dhidden = (gradients[0] * grad_sum).to(hidden.dtype) if ctx.need[0] else None
            dweight = _whole_weight(gradients[1], grad_sum, weight, first, last) if ctx.need[1] else None
        return dhidden, dweight, *(None,) * 7


class RowStatistics(torch.autograd.Function):
    """nll and lse of every row, differentiable: backward needs their true gradients, so it recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, first, last, impl):
        nll, lse, correct, *_ = torch.ops.lumos_kernels.tube_masked_loss.default(
            hidden, weight, labels, rows, None, first, last, 0.0, False, False, False, impl
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
        in_place = not torch.compiler.is_compiling() and _can_share(hidden, weight)
        dhidden, dclasses = torch.ops.lumos_kernels.tube_masked_loss_backward.default(
            grad_nll, grad_lse, hidden, weight, labels, rows, lse, first, last, *need, in_place, impl
        )
        whole = _whole_weight_in_place if in_place else _whole_weight
        dweight = whole(dclasses, 1.0, weight, first, last) if need[1] else None
        return dhidden if need[0] else None, dweight, *(None,) * 5


def row_losses(nll: Tensor, lse: Tensor, token_weight: Tensor | None, z_loss: float) -> Tensor:
    """Row losses [T] from the statistics, which are zero where a row is no target."""
    # nll is 0 where a row is no target, and whatever its weight is must not matter, even if it is infinite.
    loss = nll if token_weight is None else torch.where(nll == 0, nll, nll * token_weight)
    return loss + z_loss * lse.square() if z_loss else loss
