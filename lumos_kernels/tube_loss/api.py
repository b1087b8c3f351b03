"""The public tube_masked_loss: validation, reductions and documentation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lumos_kernels import checks
from lumos_kernels.tube_loss.ops import RowStatistics, SummedLoss, is_target, row_losses

VISUAL_CLASSES = (65536, 129536)


class TubeLossStats(NamedTuple):
    """Per-row statistics, zero and False on rows that are no targets.

    Detached, except that with reduction "none" gradients flow through nll and lse: any function of the two is a loss.
    """

    nll: Tensor  # fp32 [T], cross entropy
    lse: Tensor  # fp32 [T], logsumexp over the class slice
    correct: Tensor  # bool [T], whether the target has the highest logit


def tube_masked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: tuple[int, int] = VISUAL_CLASSES,
    reduction: str = "mean",
    z_loss: float = 0.0,
    impl: str = "auto",
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TubeLossStats]:
    """Cross entropy of the masked slots over the visual classes, without logits for anything else.

    Row i is a target if first <= labels[i] < last, with (first, last) = classes; its loss is
    token_weight[i] * nll_i + z_loss * lse_i^2, where nll and lse are taken over the columns first .. last - 1.

    Args:
        hidden: [T, C], bf16, fp16, fp32 or fp64.
        weight: [V, C], the whole lm_head, any floating dtype: its slice is computed in hidden's.
        labels: int64 [T]; -100 and every other id outside the classes is ignored (masked new lines are).
        classes: (first, last), the columns of the class slice; the visual codes of Lumos-1 by default.
        reduction: "mean" over the target rows (0 if there are none), "sum", or "none" (fp32 [T], 0 on other rows).
        z_loss: factor of the squared logsumexp.
        impl: "auto" or an implementation's name. An explicit choice never falls back.
        token_weight: [T], a constant factor of each row's cross entropy (not of its z-loss): no gradient flows to
            it, and the mean still divides by the number of target rows, as upstream does.
        rows: int32 or int64 [N], exactly the target rows, when the caller knows them: saves a host sync.
        return_stats: also return TubeLossStats.

    Returns:
        The loss, fp32 (fp64 for fp64 input). The gradient of `weight` is zero outside the class slice.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or an explicit `impl` cannot run.

    Source: arXiv 2507.08801 section 3.4; the official loss on tests/golden, except that upstream drops exact zeros
    from its mean.
    """
    checks.shape("hidden", hidden, "T, C")
    tokens, width = hidden.shape
    checks.shape("weight", weight, "V, C", C=width)
    checks.shape("labels", labels, "T", T=tokens)
    checks.dtype("hidden", hidden, checks.FLOATS)
    checks.dtype("weight", weight, checks.FLOATS)
    checks.dtype("labels", labels, (torch.int64,))
    first, last = checks.class_slice(classes, weight)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    if token_weight is not None:
        checks.shape("token_weight", token_weight, "T", T=tokens)
        checks.dtype("token_weight", token_weight, checks.FLOATS)
    if rows is not None:
        checks.shape("rows", rows, "N")
        checks.dtype("rows", rows, (torch.int32, torch.int64))
    for name, tensor in (("weight", weight), ("labels", labels), ("token_weight", token_weight), ("rows", rows)):
        if tensor is not None:
            checks.same(name, tensor, "hidden", hidden, dtypes=False)
    if token_weight is not None:
        token_weight = token_weight.detach().to(torch.promote_types(hidden.dtype, torch.float32))

    if reduction == "none":
        nll, lse, correct = RowStatistics.apply(hidden, weight, labels, rows, first, last, impl)
        loss = row_losses(nll, lse, token_weight, z_loss)
    else:
        loss, nll, lse, correct = SummedLoss.apply(
            hidden, weight, labels, rows, token_weight, first, last, float(z_loss), impl
        )
    if reduction == "mean":
        loss = loss / (is_target(labels, first, last).sum().clamp_min(1) if rows is None else max(rows.shape[0], 1))
    return (loss, TubeLossStats(nll, lse, correct)) if return_stats else loss
