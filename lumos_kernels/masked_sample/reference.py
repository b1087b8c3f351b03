"""masked_sample in plain PyTorch: the specification that every kernel is compared with.

With logits l = l_uncond + guidance_scale * (l_cond - l_uncond) over the class slice, divided by the temperature,
    class = argmax(l + G),   confidence = softmax(l)[class],
where G are the Gumbel variates of philox.py. This is a draw from softmax(l). The first of equal scores wins. Everything
is fp32 (fp64 for fp64 input): the logits are rounded once, and so are G and the sum l + G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Inputs, Outputs
from .philox import gumbels

BLOCK_ROWS = 64  # rows at once; logits and random numbers take BLOCK_ROWS * K elements each


def forward(inputs: Inputs) -> Outputs:
    """Draw a class for each row. contract.py says what comes in and goes out."""
    cond, uncond, weight, row_keys, guidance_scale, temperature = inputs
    compute = torch.promote_types(cond.dtype, torch.float32)
    w = weight.to(compute)
    classes = cond.new_empty(cond.shape[0], dtype=torch.int64)
    confidence = cond.new_empty(cond.shape[0], dtype=torch.float32)
    for start in range(0, cond.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        logits = cond[rows].to(compute) @ w.T
        if uncond is not None:
            uncond_logits = uncond[rows].to(compute) @ w.T
            logits = uncond_logits + guidance_scale * (logits - uncond_logits)
        logits = logits / temperature
        classes[rows], confidence[rows] = draw(logits, None if row_keys is None else row_keys[rows])
    return Outputs(classes, confidence)


def draw(logits: Tensor, row_keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a class for each row of logits [N, K], and its probability: what forward does with any logits."""
    scores = logits if row_keys is None else logits + gumbels(row_keys, logits.shape[1])
    classes = scores.argmax(-1)
    chosen = logits.gather(1, classes[:, None])[:, 0]
    return classes, torch.exp(chosen - torch.logsumexp(logits, -1)).float()
