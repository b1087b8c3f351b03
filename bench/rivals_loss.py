"""Rivals of tube_masked_loss from other libraries, each on the target rows and the class slice alone. Signatures read
in liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5.

All of them take hidden [N, C], the class slice [K, C] and targets int64 [N], and return the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import Inputs

IGNORED = -100
ROW_MULTIPLE = 8  # QuACK's TMA matmuls want rows in eights


def selected(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and class index of the target rows, and the class slice of the weight."""
    first, last = inputs.classes
    rows = inputs.rows.long()
    return inputs.hidden[rows], inputs.weight[first:last], inputs.labels[rows] - first


def liger(accumulate: torch.dtype | None) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Liger's fused linear cross entropy; accumulate: dtype of the sum of the weight's gradient, None for its own."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        hidden, weight, targets = selected(inputs)
        return (liger_fused_linear_cross_entropy(hidden, weight, targets, accum_dtype=accumulate).float(),)

    return run


def cut_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    """Apple's cut cross entropy without its gradient filter, which drops what 64,000 nearly uniform codes need."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, targets = selected(inputs)
    return (linear_cross_entropy(hidden, weight, targets, filter_eps=None, impl="cce").float(),)


def quack(inputs: Inputs) -> tuple[Tensor, ...]:
    """QuACK's chunked linear cross entropy; ignored rows fill up to a multiple of 8."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight, targets = selected(inputs)
    missing = -len(targets) % ROW_MULTIPLE
    if missing:
        hidden, targets = F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing), value=IGNORED)
    return (chunked_linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED).float(),)


@functools.cache
def _compiled_slice() -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    return torch.compile(loss, dynamic=False)


def compiled_slice(inputs: Inputs) -> tuple[Tensor, ...]:
    """torch.compile of the plain loss on the target rows and the class slice, logits and all."""
    return (_compiled_slice()(*selected(inputs)),)
