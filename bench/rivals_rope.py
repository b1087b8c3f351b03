"""Rivals of mm_rope that run on a GPU: a chain of Liger's kernels, and torch.compile of our eager code. Signatures read
in liger-kernel 0.8.5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.registry import Inputs


def liger_prepare(tables: Callable[[Inputs], tuple[Tensor, Tensor]]) -> Callable[[Inputs], Inputs]:
    """cos and sin made once, outside the timing, and an upstream gradient that may be overwritten: Liger's rotation
    works in place, backward too.

    tables: inputs -> cos, sin [T, D]. Liger takes the first channels of a half from the t table, then from h, then
    from w; Lumos interleaves the axes. With every table holding each channel's own axis, its sections do not matter.
    """

    def prepare(inputs: Inputs) -> Inputs:
        cos, sin = (table.expand(3, 1, *table.shape).contiguous() for table in tables(inputs))
        pairs = inputs.q.shape[-1] // 2
        sections = [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]
        kept = {**inputs.args, "cos": cos, "sin": sin, "sections": sections}
        return Inputs(kept, inputs.leaves, tuple(grad.clone() for grad in inputs.upstream))

    return prepare


def liger(inputs: Inputs) -> tuple[Tensor, ...]:
    """LayerNorm of q, LayerNorm of k, then the multimodal rotation: three kernels of Liger."""
    from liger_kernel.transformers.functional import liger_layer_norm, liger_qwen2vl_mrope

    normed = [
        liger_layer_norm(x, weight[0], bias[0], inputs.eps).transpose(0, 1)[None]
        for x, (weight, bias) in ((inputs.q, inputs.q_norm), (inputs.k, inputs.k_norm))
    ]
    q, k = liger_qwen2vl_mrope(*normed, inputs.cos, inputs.sin, inputs.sections)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


@functools.cache
def _compiled(eager: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(eager, dynamic=False)


def compiled(eager: Callable[..., tuple[Tensor, Tensor]], arguments: Callable[[Inputs], object]) -> Callable:
    """torch.compile of `eager`, called with what `arguments` makes of the inputs."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        return _compiled(eager)(arguments(inputs))

    return run
