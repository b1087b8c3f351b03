"""Tube-masked cross entropy in plain PyTorch: the specification that every kernel is compared with.

Of T rows only the N target rows matter, of V columns only the class slice: logits = x W^T, lse = logsumexp(logits),
nll = lse - logit of the target, row loss = row_weight * nll + z_loss * lse^2. fp32 throughout (fp64 for fp64 input).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 512  # target rows at once: bounds the logits to BLOCK_ROWS * K


def _compute(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    row_weight: Tensor | None,
    z_loss: float,
    need_hidden: bool,
    dweight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Statistics of the target rows and, on request, the gradients of the SUM of their losses.

    hidden [T, C]; weight [K, C], the class slice; targets int64 [N] in [0, K); rows int64 [N]; row_weight fp32 [N].
    Returns nll [N], lse [N], correct bool [N], dhidden [T, C] or None, and writes dweight [K, C] where given.
    """
    grads = _Gradients(hidden, weight, need_hidden, dweight)
    row_weight = grads.weight.new_ones(rows.shape) if row_weight is None else row_weight
    stats = []
    for row, target, factor in _blocks(rows, targets, row_weight):
        logits = _compute(hidden[row]) @ grads.weight.T
        lse = torch.logsumexp(logits, -1)
        nll = lse - logits.gather(1, target[:, None])[:, 0]
        stats.append((nll, lse, logits.argmax(-1) == target))
        grads.add(row, logits, lse, target, factor, 2 * z_loss * lse)
    nll, lse, correct = (torch.cat(parts) for parts in zip(*stats, strict=True))
    return nll, lse, correct, grads.hidden


def backward(
    grad_nll: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    lse: Tensor,
    need_hidden: bool,
    dweight: Tensor | None,
) -> Tensor | None:
    """Gradients of sum_i grad_nll[i] * nll_i + grad_lse[i] * lse_i; both [N], other shapes as in forward."""
    grads = _Gradients(hidden, weight, need_hidden, dweight)
    for row, target, dnll, dlse, lse_ in _blocks(rows, targets, grad_nll, grad_lse, lse):
        grads.add(row, _compute(hidden[row]) @ grads.weight.T, lse_, target, dnll, dlse)
    return grads.hidden


def _blocks(*per_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(BLOCK_ROWS) for t in per_row), strict=True)


class _Gradients:
    """Collects the gradients of the hidden states and of the class slice over blocks of rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, need_hidden: bool, dweight: Tensor | None) -> None:
        self.x, self.weight = hidden, _compute(weight)
        self.hidden = torch.zeros_like(hidden) if need_hidden else None
        self.classes = None if dweight is None else dweight.zero_()

    def add(self, rows: Tensor, logits: Tensor, lse: Tensor, target: Tensor, dnll: Tensor, dlse: Tensor) -> None:
        """Adds the gradients of dnll * nll + dlse * lse. That of the logits takes their place:
        softmax * (dnll + dlse) - one_hot(target) * dnll.
        """
        if self.hidden is None and self.classes is None:
            return
        dlogits = logits.sub_(lse[:, None]).exp_().mul_((dnll + dlse)[:, None])
        dlogits.scatter_add_(1, target[:, None], -dnll[:, None].to(dlogits.dtype))
        if self.hidden is not None:
            self.hidden[rows] = (dlogits @ self.weight).to(self.hidden.dtype)
        if self.classes is not None:
            self.classes.addmm_(dlogits.T, _compute(self.x[rows]))
