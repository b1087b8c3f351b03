"""The two facts every implementation of MM-RoPE shares: a channel's axis and its frequency."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Axis (0 = t, 1 = h, 2 = w) of channel d is AXES[d % 16]: t, h and w share the spectrum 2 : 3 : 3, interleaved so
# that each sees low and high frequencies (arXiv 2507.08801, section 3.2).
AXES = (0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2)


@functools.lru_cache(maxsize=64)
def inverse_frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """fp32 [head_dim / 2]: theta^(-2i / head_dim), rounded exactly as the official code does.

    At position 90,000 one unit in the last place of a frequency turns the angle by 5e-3, so every implementation
    takes these very numbers instead of computing its own.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / theta**exponent).to(device)


@functools.lru_cache(maxsize=64)
def pair_axes(head_dim: int, device: torch.device) -> Tensor:
    """int64 [head_dim / 2]: the axis of each rotation pair (i, i + head_dim / 2)."""
    return torch.tensor(AXES * (head_dim // 32), device=device)
