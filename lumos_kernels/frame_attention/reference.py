"""frame_attention in plain PyTorch: the specification that every kernel is compared with.

Query i attends to the keys kv_start[i] <= j < kv_end[i]. With s = scale * q k^T over these keys,
    lse = log(sum of exp(s)),   p = exp(s - lse),   o = p v.
Scores and statistics are fp32 (fp64 for fp64 input), and o is rounded once. A row without keys, kv_start[i] >=
kv_end[i], gives 0 and lse -inf. The rows may come in any order, and limits outside 0..Tk mean the nearest of both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout import RowLimits
from .contract import Gradients, Inputs, OutputGradients, Outputs

BLOCK_ROWS = 512  # query rows at once; the scores take H * BLOCK_ROWS * Tk elements


def _blocks(limits: RowLimits) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield for each block of query rows: the rows, the range of keys that any of them sees, and which keys each sees.

    The last is bool [1, 1, rows, keys].
    """
    for start in range(0, limits.num_queries, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, limits.num_queries)
        # The lowest and highest key of the block. Rows without keys widen neither, and may be all there are.
        kv_start, kv_end = (x[start:end].clamp(0, limits.num_keys) for x in (limits.kv_start, limits.kv_end))
        sees = kv_start < kv_end
        first, last = int(kv_start.where(sees, limits.num_keys).min()), int(kv_end.where(sees, 0).max())
        yield slice(start, end), slice(first, last), limits.dense_mask(start, end)[None, None, :, first:last]


def _grouped(x_THD: Tensor, kv_heads: int) -> Tensor:
    """Return [T, H, D] as [Hkv, H / Hkv, T, D] in the compute dtype: the heads that share a kv head are neighbours."""
    x_TKGD: Tensor = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32)).unflatten(1, (kv_heads, -1))
    return x_TKGD.permute(1, 2, 0, 3)


def _ungrouped(x_KGTD: Tensor, like: Tensor) -> Tensor:
    """Return the inverse of _grouped, in the dtype of `like`."""
    return x_KGTD.permute(2, 0, 1, 3).flatten(1, 2).to(like.dtype)


def forward(inputs: Inputs) -> Outputs:
    """Attend. contract.py says what comes in and goes out."""
    q, k, v, limits, scale = inputs
    q_, k_, v_ = (_grouped(x, k.shape[1]) for x in (q, k, v))
    out, lse = [q_[:, :, :0]], [q_[:, :, :0, 0]]
    for rows, keys, visible in _blocks(limits):
        scores = (scale * q_[:, :, rows] @ k_[:, :, keys].mT).masked_fill(~visible, -torch.inf)
        lse.append(torch.logsumexp(scores, -1))
        p = torch.where(visible, torch.exp(scores - lse[-1][..., None]), 0.0)
        out.append(p @ v_[:, :, keys])
    return Outputs(_ungrouped(torch.cat(out, 2), q), torch.cat(lse, 2).flatten(0, 1))


def backward(inputs: Inputs, outputs: Outputs, grad: OutputGradients, *, deterministic: bool) -> Gradients:
    """Return the gradients of q, k and v.

    With do and dlse the gradients that arrive,
        dv = p^T do,   dp = do v^T,   delta = rowsum(do * o) - dlse,   ds = p * (dp - delta),
        dq = scale ds k,   dk = scale ds^T q,
    where dk and dv are summed over the query heads that share a kv head.
    """
    q, k, v, limits, scale = inputs
    do_, o_, q_, k_, v_ = (_grouped(x, k.shape[1]) for x in (grad.o, outputs.o, q, k, v))
    lse_ = outputs.lse.unflatten(0, q_.shape[:2])[..., None]
    delta = (do_ * o_).sum(-1, keepdim=True)
    if grad.lse is not None:
        delta = delta - grad.lse.unflatten(0, q_.shape[:2])[..., None]
    dq, dk, dv = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
    for rows, keys, visible in _blocks(limits):
        scores = scale * q_[:, :, rows] @ k_[:, :, keys].mT
        p = torch.where(visible, torch.exp(scores - lse_[:, :, rows]), 0.0)
        ds = p * (do_[:, :, rows] @ v_[:, :, keys].mT - delta[:, :, rows])
        dq[:, :, rows] = scale * ds @ k_[:, :, keys]
        dk[:, :, keys] += (scale * ds.mT @ q_[:, :, rows]).sum(1, keepdim=True)
        dv[:, :, keys] += (p.mT @ do_[:, :, rows]).sum(1, keepdim=True)
    return Gradients(_ungrouped(dq, q), _ungrouped(dk, k), _ungrouped(dv, v))
