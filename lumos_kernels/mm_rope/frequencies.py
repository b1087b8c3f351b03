"""The two facts that every implementation of mm_rope shares: the axis and the frequency of a rotation pair."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Channel d turns by the position on axis AXES[d % 16], where 0 is t, 1 is h and 2 is w. The axes share the spectrum
# 2 : 3 : 3, interleaved so that each of them sees low and high frequencies (arXiv 2507.08801, section 3.2).
AXES = (0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2)


@functools.lru_cache(maxsize=64)
def inverse_frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """Return fp32 [head_dim / 2], theta^(-2i / head_dim), rounded exactly as the official code rounds it.

    At position 90,000 one unit in the last place of a frequency turns the angle by 5e-3. So every implementation takes
    these very numbers instead of computing its own.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / theta**exponent).to(device)


@functools.lru_cache(maxsize=64)
def pair_axes(head_dim: int, device: torch.device) -> Tensor:
    """Return int64 [head_dim / 2], the axis of each rotation pair (i, i + head_dim / 2)."""
    return torch.tensor(AXES * (head_dim // 32), device=device)
