"""tube_masked_loss in plain PyTorch: the specification that every kernel is compared with.

Of T rows only the N target rows matter, of V columns only the class slice. With logits = x W^T over that slice,
    lse = logsumexp(logits),   nll = lse - logit of the target,   row loss = token_weight * nll + z_loss_weight * lse^2.
Everything is fp32 (fp64 for fp64 input). A row whose target is no class is skipped: its statistics are 0, it is not
correct, and its gradients are 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import Inputs, Outputs, RowLoss, StatisticGradients, Wanted

BLOCK_ROWS = 512  # target rows at once; the logits take BLOCK_ROWS * K elements


def forward(inputs: Inputs, loss: RowLoss, wanted: Wanted) -> Outputs:
    """Return the statistics and, where wanted, the gradients of the sum of the row losses."""
    gradients = _Gradients(inputs, wanted)
    token_weight = gradients.weight.new_ones(inputs.rows.shape) if loss.token_weight is None else loss.token_weight
    statistics = []
    for rows, targets, factor in _blocks(inputs.rows, inputs.targets, token_weight):
        logits = gradients.logits(rows)
        is_class = _is_class(targets, logits)
        lse = torch.logsumexp(logits, -1).where(is_class, 0)
        nll = (lse - logits.gather(1, targets.where(is_class, 0)[:, None])[:, 0]).where(is_class, 0)
        statistics.append((nll, lse, logits.argmax(-1) == targets))
        gradients.add(rows, logits, lse, targets, factor, 2 * loss.z_loss_weight * lse)
    nll, lse, correct = (torch.cat(parts) for parts in zip(*statistics, strict=True))
    return Outputs(nll, lse, correct, gradients.hidden)


def backward(inputs: Inputs, lse: Tensor, grad: StatisticGradients, wanted: Wanted) -> Tensor | None:
    """Return and write the gradients of sum over i of grad.nll[i] * nll_i + grad.lse[i] * lse_i."""
    gradients = _Gradients(inputs, wanted)
    for rows, targets, row_lse, dnll, dlse in _blocks(inputs.rows, inputs.targets, lse, *grad):
        gradients.add(rows, gradients.logits(rows), row_lse, targets, dnll, dlse)
    return gradients.hidden


def _blocks(*per_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(BLOCK_ROWS) for t in per_row), strict=True)


def _compute(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_class(targets: Tensor, logits: Tensor) -> Tensor:
    return (targets >= 0) & (targets < logits.shape[1])


class _Gradients:
    """Collects the gradients of the hidden states and of the class slice over blocks of rows."""

    def __init__(self, inputs: Inputs, wanted: Wanted) -> None:
        self.x, self.weight = inputs.hidden, _compute(inputs.weight)
        self.hidden = torch.zeros_like(inputs.hidden) if wanted.hidden else None
        self.classes = None if wanted.weight is None else wanted.weight.zero_()

    def logits(self, rows: Tensor) -> Tensor:
        return _compute(self.x[rows]) @ self.weight.T

    def add(self, rows: Tensor, logits: Tensor, lse: Tensor, targets: Tensor, dnll: Tensor, dlse: Tensor) -> None:
        """Add the gradients of dnll * nll + dlse * lse.

        The gradient of the logits takes their place: softmax * (dnll + dlse) - one_hot(target) * dnll.
        """
        if self.hidden is None and self.classes is None:
            return
        is_class = _is_class(targets, logits)
        dlogits = logits.sub_(lse[:, None]).exp_().mul_((dnll + dlse)[:, None])
        dlogits.scatter_add_(1, targets.where(is_class, 0)[:, None], -dnll[:, None].to(dlogits.dtype))
        dlogits.masked_fill_(~is_class[:, None], 0)
        if self.hidden is not None:
            self.hidden[rows] = (dlogits @ self.weight).to(self.hidden.dtype)
        if self.classes is not None:
            self.classes.addmm_(dlogits.T, _compute(self.x[rows]))
