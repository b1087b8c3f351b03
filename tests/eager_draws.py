"""The eager error of few numbers is a matter of luck: their sums may happen to be exact. These helpers repeat an eager
computation with its channels in other orders, which change nothing but the rounding of the sums over them. The draw
that lies farthest from fp64 is then the yardstick: testing.farthest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lumos_kernels.testing import assert_close_to_reference

DRAWS = 32
FEW_ROWS = 16  # with so few, the largest eager error of one order of the sums is a matter of luck


def _orders(size: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random order of `size` things, and the order that undoes it."""
    order = torch.randperm(size, generator=generator).to(device)
    return order, order.argsort()


def loss_draws(
    run: Callable[..., Sequence[Tensor]], hidden: Tensor, weight: Tensor, labels: Tensor, classes: tuple[int, int]
) -> Iterator[tuple[Tensor, ...]]:
    """Loss, nll, lse, dhidden and dweight by `run(hidden, weight, labels)` in DRAWS orders of channels and classes."""
    first, last = classes
    is_target = (labels >= first) & (labels < last)
    generator = torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        channels, back = _orders(hidden.shape[1], hidden.device, generator)
        rows = torch.arange(len(weight), device=hidden.device)
        rows[first:last] = first + _orders(last - first, hidden.device, generator)[0]
        targets = torch.where(is_target, rows.argsort()[labels * is_target], labels)
        loss, nll, lse, dhidden, dweight = run(hidden[:, channels], weight[rows][:, channels], targets)
        yield loss, nll, lse, dhidden[:, back], dweight[rows.argsort()][:, back]


def attention_draws(
    run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """o, lse, dq, dk and dv by `run([q, k, v], [grad_o, ...])` in DRAWS orders of the channels of q, k and of v, o."""
    q, k, v = (leaf.detach() for leaf in leaves)
    grad_o, *rest = upstream
    generator = torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        (of_qk, back_qk), (of_v, back_v) = (_orders(q.shape[2], q.device, generator) for _ in range(2))
        permuted = [x.requires_grad_() for x in (q[..., of_qk], k[..., of_qk], v[..., of_v])]
        o, lse, dq, dk, dv = run(permuted, [grad_o[..., of_v], *rest])
        yield o[..., back_v], lse, dq[..., back_qk], dk[..., back_qk], dv[..., back_v]


def channel_draws(*operands: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The operands [..., C] of a product as they are, and with their channels in DRAWS other orders."""
    yield operands
    generator = torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        order, _ = _orders(operands[0].shape[-1], operands[0].device, generator)
        yield tuple(x[..., order] for x in operands)


def assert_attention_close(
    actual: Sequence[Tensor],
    rival: Callable[..., Sequence[Tensor]],
    high: Sequence[Tensor],
    leaves: Sequence[Tensor],
    upstream: Sequence[Tensor],
) -> None:
    """Judge o, lse, dq, dk and dv by `rival(leaves, upstream)`, in several orders of its sums where rows are few."""
    draws = [rival(leaves, upstream)]
    if len(leaves[0]) < FEW_ROWS:
        draws += attention_draws(rival, leaves, upstream)
    for name, a, hi, *lows in zip(("o", "lse", "dq", "dk", "dv"), actual, high, *draws, strict=True):
        assert_close_to_reference(a, lows, hi, name)
