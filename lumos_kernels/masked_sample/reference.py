"""Sampling of masked slots in plain PyTorch: the specification that every kernel is compared with.

l = l_uncond + guidance * (l_cond - l_uncond) over the class slice, divided by the temperature; the draw is Gumbel-max,
argmax(l + G) with the Gumbel variates of philox.py, which is a draw from softmax(l); confidence is its probability. The
first of equal scores wins. fp32 throughout (fp64 for fp64 input): the sum l + G is rounded once, and so are G and l.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels.masked_sample.philox import gumbels

BLOCK_ROWS = 64  # rows at once: bounds the logits and random numbers to BLOCK_ROWS * K


def forward(
    hidden_cond: Tensor,
    hidden_uncond: Tensor | None,
    weight: Tensor,
    row_keys: Tensor | None,
    guidance: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """hidden [N, C] of both branches; weight [K, C], the class slice; row_keys int64 [N, 2], or None for the argmax.

    Returns the drawn class in [0, K), int64 [N], and its probability, fp32 [N].
    """
    compute = torch.promote_types(hidden_cond.dtype, torch.float32)
    w = weight.to(compute)
    classes = hidden_cond.new_empty(hidden_cond.shape[0], dtype=torch.int64)
    confidence = hidden_cond.new_empty(hidden_cond.shape[0], dtype=torch.float32)
    for start in range(0, hidden_cond.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        logits = hidden_cond[rows].to(compute) @ w.T
        if hidden_uncond is not None:
            uncond = hidden_uncond[rows].to(compute) @ w.T
            logits = uncond + guidance * (logits - uncond)
        logits = logits / temperature
        classes[rows], confidence[rows] = draw(logits, None if row_keys is None else row_keys[rows])
    return classes, confidence


def draw(logits: Tensor, row_keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """A class for each row of logits [N, K], and its probability: the end of forward, whatever made the logits."""
    scores = logits if row_keys is None else logits + gumbels(row_keys, logits.shape[1])
    classes = scores.argmax(-1)
    chosen = logits.gather(1, classes[:, None])[:, 0]
    return classes, torch.exp(chosen - torch.logsumexp(logits, -1)).float()
