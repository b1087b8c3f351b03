"""Limits whose rows come in no order, or point outside of the keys, and attention by plain dense softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import RowLimits

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
NAMES = ("o", "lse", "dq", "dk", "dv")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffled_windows(tokens: int = 420, window: int = 90, seed: int = 0) -> RowLimits:
    """A sliding window, its rows in a random order."""
    end = torch.randperm(tokens, generator=_generator(seed)) + 1
    return RowLimits.from_kv((end - window).clamp_min(0), end, tokens)


def shuffled_documents(seed: int = 0) -> RowLimits:
    """Blocks of 70 rows, each of which sees 70 keys of its own, in a random order of the blocks."""
    block = torch.randperm(6, generator=_generator(seed)).repeat_interleave(70)
    return RowLimits.from_kv(block * 70, (block + 1) * 70, 420)


def falling(tokens: int = 300) -> RowLimits:
    """Text backwards: each row sees one key less than the row before. The first row sees all keys."""
    end = torch.arange(tokens, 0, -1)
    return RowLimits.from_kv(torch.zeros_like(end), end, tokens)


def anything(queries: int = 300, keys: int = 420, seed: int = 0) -> RowLimits:
    """Random ranges, long and short, and a quarter of the rows without keys, some of them with start > end."""
    generator = _generator(seed)
    ends = torch.randint(0, keys + 1, (2, queries), generator=generator)
    start, end = ends.amin(0), ends.amax(0)
    short = torch.rand(queries, generator=generator) < 0.4
    end = torch.where(short, torch.minimum(start + 3, end), end)
    none = torch.rand(queries, generator=generator) < 0.25
    start, end = torch.where(none, end, start), torch.where(none, start, end)
    return RowLimits.from_kv(start, end, keys, check=False)


def spread() -> RowLimits:
    """One row of a tile sees the first keys, the next one the last keys. Nobody sees those between."""
    row = torch.arange(200)
    return RowLimits.from_kv((row % 2) * 1000, (row % 2) * 1000 + 40, 1040)


def few(seed: int = 0) -> RowLimits:
    return anything(5, 7, seed)


def outside() -> RowLimits:
    """Made by hand: values around the keys, far from them, and the extremes of int32. All bounds are wrong, too."""
    values = torch.tensor([INT_MIN, -(10**6), -1, 0, 1, 60, 149, 150, 151, 10**6, INT_MAX], dtype=torch.int32)
    start, end = torch.cartesian_prod(values, values).T
    bounds = values.repeat(14)[:150]
    return RowLimits(start.contiguous(), end.contiguous(), bounds, bounds.flip(0).contiguous())


ORDERS = {
    "shuffled windows": shuffled_windows,
    "shuffled documents": shuffled_documents,
    "falling": falling,
    "anything": anything,
    "spread": spread,
    "few": few,
}


def leaves_of(limits: RowLimits, heads=(4, 2), head_dim: int = 32, dtype=torch.float32) -> list[Tensor]:
    sizes = (limits.num_queries, heads[0]), (limits.num_keys, heads[1]), (limits.num_keys, heads[1])
    return [torch.randn(*size, head_dim).to(dtype) for size in sizes]


def dense(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """o and lse in the inputs' precision by a softmax over the dense mask of every row that sees a key."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = limits.dense_mask()
    sees = mask.any(1)
    scores = torch.einsum("ihd,jhd->hij", q, k)[:, sees] * scale
    scores = scores.masked_fill(~mask[sees], -torch.inf)
    o = torch.zeros_like(q).index_put((sees,), torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    return o, lse.index_put((torch.arange(len(lse))[:, None], sees.nonzero()[:, 0]), scores.logsumexp(-1))


def with_gradients(
    function, leaves: list[Tensor], limits: RowLimits, upstream: list[Tensor], **options
) -> list[Tensor]:
    """o, lse, dq, dk, dv under a gradient of o, or of o and lse."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    o, lse = function(*leaves, limits, **options)
    gradients = torch.autograd.grad((o, lse)[: len(upstream)], leaves, upstream)
    return [o.detach(), lse.detach(), *gradients]
