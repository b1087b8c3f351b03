"""Tube-masked cross entropy in plain PyTorch: the specification that every kernel is compared with.

Of T rows only the N target rows matter, of V columns only the class slice: logits = x W^T, lse = logsumexp(logits),
nll = lse - logit of the target, row loss = row_weight * (nll + z_loss * lse^2). fp32 throughout (fp64 for fp64 input).
"""

from __future__ import annotations

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
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Statistics of the target rows and, on request, the gradients of the SUM of their losses.

    hidden [T, C]; weight [K, C], the class slice; targets int64 [N] in [0, K); rows int64 [N]; row_weight fp32 [N].
    Returns nll [N], lse [N], correct bool [N], dhidden [T, C] or None, dweight [K, C] or None.
    """
    w, stats = _compute(weight), []
    for x, target in zip(hidden[rows].split(BLOCK_ROWS), targets.split(BLOCK_ROWS), strict=True):
        logits = _compute(x) @ w.T
        lse = torch.logsumexp(logits, -1)
        nll = lse - logits.gather(1, target[:, None])[:, 0]
        stats.append((nll, lse, logits.argmax(-1) == target))
    nll, lse, correct = (torch.cat(parts) for parts in zip(*stats, strict=True))
    if not (need_hidden or need_weight):
        return nll, lse, correct, None, None
    grad = torch.ones_like(nll) if row_weight is None else row_weight.to(nll.dtype)
    grads = backward(grad, hidden, weight, targets, rows, lse, z_loss, need_hidden, need_weight)
    return nll, lse, correct, *grads


def backward(
    grad_rows: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    lse: Tensor,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum_i grad_rows[i] * (nll_i + z_loss * lse_i^2), with
    d/dlogits = grad_rows * (softmax * (1 + 2 z_loss lse) - one_hot(target)).
    """
    w = _compute(weight)
    dhidden = torch.zeros_like(hidden) if need_hidden else None
    dweight = torch.zeros_like(w) if need_weight else None
    blocks = (t.split(BLOCK_ROWS) for t in (grad_rows, targets, rows, lse))
    for grad, target, row, lse_ in zip(*blocks, strict=True):
        x = _compute(hidden[row])
        dlogits = torch.exp(x @ w.T - lse_[:, None]) * (grad * (1 + 2 * z_loss * lse_))[:, None]
        dlogits.scatter_add_(1, target[:, None], -grad[:, None])
        if dhidden is not None:
            dhidden[row] = (dlogits @ w).to(hidden.dtype)
        if dweight is not None:
            dweight += dlogits.T @ x
    return dhidden, dweight
