"""The public tube_masked_loss: validation, reductions and documentation."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..errors import FLOATS, INTEGERS, require_classes, require_dtype, require_number, require_same, require_shape
from ..token_ids import VISUAL_CLASSES
from .ops import row_losses, row_statistics, summed_loss
from .target_rows import is_target

REDUCTIONS = ("mean", "sum", "none")


class TubeLossStats(NamedTuple):
    """Statistics of the rows, zero and False on rows that are no targets.

    They are detached, except that with reduction "none" gradients flow through nll and lse. So any function of the two
    is a loss.
    """

    nll: Tensor  # fp32 [T], cross entropy
    lse: Tensor  # fp32 [T], logsumexp over the class slice
    correct: Tensor  # bool [T], whether the target has the highest logit


@overload
def tube_masked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    classes: tuple[int, int] = VISUAL_CLASSES,
    reduction: str = "mean",
    z_loss_weight: float = 0.0,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    return_stats: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def tube_masked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    classes: tuple[int, int] = VISUAL_CLASSES,
    reduction: str = "mean",
    z_loss_weight: float = 0.0,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    return_stats: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, TubeLossStats]: ...


def tube_masked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    classes: tuple[int, int] = VISUAL_CLASSES,
    reduction: str = "mean",
    z_loss_weight: float = 0.0,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, TubeLossStats]:
    """Return the cross entropy of the target rows over the class slice, without logits for anything else.

    Row i is a target if first <= labels[i] < last, with (first, last) = classes. In Lumos-1 the targets are the masked
    slots whose label is a visual code. The loss of a row is token_weight[i] * nll_i + z_loss_weight * lse_i^2, where
    nll and lse are taken over the columns first .. last - 1.

    Args:
        hidden: [T, C], bf16, fp16, fp32 or fp64.
        weight: [V, C], the whole lm_head, any floating dtype. Its slice is cast to hidden's dtype.
        labels: int64 [T], ids of the whole vocabulary. Rows whose label lies outside the classes are ignored: those of
            -100, and in Lumos-1 the masked new lines (id 8803). Without `rows`, labels of which none lies in the
            classes and some are neither -100 nor 8803 are an error, e.g. labels that count from the first class.
        classes: (first, last), the columns of the class slice. The default is the visual codes of Lumos-1.
        reduction: "mean" over the target rows (0 if there are none), "sum", or "none" ([T], 0 on rows that are no
            targets).
        z_loss_weight: factor of the squared logsumexp.
        token_weight: [T], a constant factor of each row's cross entropy, not of its z-loss. No gradient flows to it.
            The mean divides by the number of target rows and not by the sum of the weights, as the official code does.
        rows: int32 or int64 [N], exactly the target rows, each once and in any order, when the caller knows them: saves
            the host sync of counting them. Empty `rows` say that no label lies in the classes; the loss is then 0.
            CPU tensors are checked. A GPU cannot check them without a host sync: there, rows that are no targets count
            in the mean alone, and wrong rows give a wrong number, but never touch memory outside the tensors.
        return_stats: also return TubeLossStats. stats.lse is 0 on rows that are no targets, hardly ever elsewhere, so
            stats.lse.count_nonzero() counts the rows in the loss, on a GPU without a host sync.
        impl: "auto", "reference" (plain PyTorch), "native" (C++ on CPUs) or "triton" (GPUs). An explicit choice never
            falls back: it raises where it cannot run.

    Returns:
        The loss, fp32 (fp64 for fp64 input); with return_stats (loss, TubeLossStats). The gradient of `weight` is
        dense, [V, C] in weight's dtype, and zero outside the class slice.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, an explicit `impl` cannot run, `rows` on the CPU are
            not exactly the target rows, or labels have no target and are not all -100 or 8803.
        RuntimeError: a gradient taken with create_graph=True is differentiated again. There are no second derivatives.

    Source: arXiv 2507.08801 section 3.4; the official loss on tests/golden, except that the official code drops exact
    zeros from its mean.
    """
    _check(hidden, weight, labels, classes, reduction, token_weight, rows)
    require_number("z_loss_weight", z_loss_weight, "a finite number")
    first, last = classes
    if not torch.is_grad_enabled():  # an autograd.Function would be told to make gradients all the same
        hidden, weight = hidden.detach(), weight.detach()
    if token_weight is not None:
        token_weight = token_weight.detach().to(torch.promote_types(hidden.dtype, torch.float32))
    if reduction == "none":
        nll, lse, correct = row_statistics(hidden, weight, labels, rows, first, last, impl)
        loss = row_losses(nll, lse, token_weight, z_loss_weight)
    else:
        loss, nll, lse, correct = summed_loss(
            hidden, weight, labels, rows, token_weight, float(z_loss_weight), first, last, impl
        )
    if reduction == "mean":
        loss = loss / (is_target(labels, first, last).sum().clamp_min(1) if rows is None else max(rows.shape[0], 1))
    return (loss, TubeLossStats(nll, lse, correct)) if return_stats else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: tuple[int, int],
    reduction: str,
    token_weight: Tensor | None,
    rows: Tensor | None,
) -> None:
    require_shape("hidden", hidden, "T, C")
    tokens, width = hidden.shape
    require_shape("weight", weight, "V, C", C=width)
    require_shape("labels", labels, "T", T=tokens)
    require_dtype("hidden", hidden, FLOATS)
    require_dtype("weight", weight, FLOATS)
    require_dtype("labels", labels, (torch.int64,))
    require_classes(classes, weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    if token_weight is not None:
        require_shape("token_weight", token_weight, "T", T=tokens)
        require_dtype("token_weight", token_weight, FLOATS)
    if rows is not None:
        require_shape("rows", rows, "N")
        require_dtype("rows", rows, INTEGERS)
    for name, tensor in (("weight", weight), ("labels", labels), ("token_weight", token_weight), ("rows", rows)):
        if tensor is not None:
            require_same(name, tensor, "hidden", hidden, dtypes=False)
