"""Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors: the random numbers every backend must reproduce.

Row i under key (seed, counter) draws, for column c, word c % 4 of philox(counter = (c // 4, counter lo, counter hi, 0),
key = (seed lo, seed hi)). A word x becomes the uniform u = fp32(x) * 2^-32 + 2^-33, the exponential variate
E = -log1p(-u) and the Gumbel variate -log(E). The Gumbel variate is computed in fp64 and rounded to fp32 once: fp32
logarithms depend on the library and even on an element's place in its tensor, and so would a draw between near ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of the product of two unsigned 32-bit numbers held in int64, which wraps."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four words from four counter words and two key words: int64 tensors in [0, 2^32), broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _mulhilo(MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(row_keys: Tensor, columns: int) -> Tensor:
    """Return fp32 [N, columns] in [2^-33, 1]. row_keys: int64 [N, 2], (seed, counter) of each row."""
    seed, counter = row_keys[:, 0, None], row_keys[:, 1, None]
    groups = torch.arange(-(-columns // 4), device=row_keys.device)[None]
    zero = torch.zeros_like(groups)
    words = philox4x32((groups, counter & _LOW, (counter >> 32) & _LOW, zero), (seed & _LOW, (seed >> 32) & _LOW))
    x = torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)[:, :columns]
    return x.float() * 2.0**-32 + 2.0**-33


def exponentials(row_keys: Tensor, columns: int) -> Tensor:
    """Return fp32 [N, columns], standard exponential variates, with the logarithm of fp32."""
    return -torch.log1p(-uniforms(row_keys, columns))


def gumbels(row_keys: Tensor, columns: int) -> Tensor:
    """Return fp32 [N, columns], standard Gumbel variates, rounded once; -inf where u rounds to 1."""
    return uniforms(row_keys, columns).double().neg_().log1p_().neg_().log_().neg_().float()
