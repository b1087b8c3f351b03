"""Block-causal frame attention in plain PyTorch: the specification that every kernel is compared with.

Query i attends to the keys kv_start[i] <= j < kv_end[i]: softmax(scale * q k^T) v, with fp32 scores and statistics
(fp64 for fp64 input) and one rounding at the end. A row without keys gives 0 and lse -inf.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lumos_kernels.layout import RowLimits

BLOCK_ROWS = 512  # query rows at once: bounds the scores to H * BLOCK_ROWS * Tk


def _blocks(limits: RowLimits) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each block of query rows: the rows, the keys that any of them sees, and bool [1, 1, rows, keys]."""
    for start in range(0, limits.num_queries, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, limits.num_queries)
        first, last = int(limits.kv_start[start:end].min()), int(limits.kv_end[start:end].max())
        yield slice(start, end), slice(first, last), limits.dense_mask(start, end)[None, None, :, first:last]


def _grouped(x_THD: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] -> [Hkv, H / Hkv, T, D] in the compute dtype: the query heads that share a kv head side by side."""
    x_THD = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
    return x_THD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x_KGTD: Tensor, like: Tensor) -> Tensor:
    return x_KGTD.permute(2, 0, 1, 3).flatten(1, 2).to(like.dtype)


def forward(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> o [Tq, Hq, D] in q's dtype, lse [Hq, Tq] (natural logarithm)."""
    q_, k_, v_ = (_grouped(x, k.shape[1]) for x in (q, k, v))
    out, lse = [q_[:, :, :0]], [q_[:, :, :0, 0]]
    for rows, keys, visible in _blocks(limits):
        scores = (scale * q_[:, :, rows] @ k_[:, :, keys].mT).masked_fill(~visible, -torch.inf)
        lse.append(torch.logsumexp(scores, -1))
        p = torch.where(visible, torch.exp(scores - lse[-1][..., None]), 0.0)
        out.append(p @ v_[:, :, keys])
    return _ungrouped(torch.cat(out, 2), q), torch.cat(lse, 2).flatten(0, 1)


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    limits: RowLimits,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. With p the probabilities: dv = p^T do; dp = do v^T; ds = p * (dp - delta), where
    delta = rowsum(do * o) - dlse; dq = scale ds k; dk = scale ds^T q, both summed over the heads that share k, v.
    """
    do_, o_, q_, k_, v_ = (_grouped(x, k.shape[1]) for x in (grad_o, o, q, k, v))
    lse_ = lse.unflatten(0, q_.shape[:2])[..., None]
    delta = (do_ * o_).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unflatten(0, q_.shape[:2])[..., None]
    dq, dk, dv = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
    for rows, keys, visible in _blocks(limits):
        scores = scale * q_[:, :, rows] @ k_[:, :, keys].mT
        p = torch.where(visible, torch.exp(scores - lse_[:, :, rows]), 0.0)
        ds = p * (do_[:, :, rows] @ v_[:, :, keys].mT - delta[:, :, rows])
        dq[:, :, rows] = scale * ds @ k_[:, :, keys]
        dk[:, :, keys] += (scale * ds.mT @ q_[:, :, rows]).sum(1, keepdim=True)
        dv[:, :, keys] += (p.mT @ do_[:, :, rows]).sum(1, keepdim=True)
    return _ungrouped(dq, q), _ungrouped(dk, k), _ungrouped(dv, v)
