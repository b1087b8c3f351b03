"""masked_sample under torch.library: schema and fake; no gradient. Imports torch only.

An implementation is a module of this folder with
    forward(hidden_cond, hidden_uncond or None, weight, row_keys or None, guidance, temperature) -> classes, confidence
where weight is the class slice in hidden's dtype, row_keys int64 [N, 2] are (seed, counter) and None asks for the
argmax.
"""

from __future__ import annotations

import torch

from lumos_kernels import dispatch
from lumos_kernels.dispatch import Problem, runs_anywhere
from lumos_kernels.library_ops import define

OP = dispatch.register(
    "masked_sample",
    "lumos_kernels.masked_sample",
    {"triton": dispatch.runs_triton, "native": dispatch.runs_native, "reference": runs_anywhere},
)


def _fake(hidden_cond, *rest):
    rows = hidden_cond.shape[0]
    return hidden_cond.new_empty(rows, dtype=torch.int64), hidden_cond.new_empty(rows, dtype=torch.float32)


@define(
    "masked_sample(Tensor hidden_cond, Tensor? hidden_uncond, Tensor weight, Tensor? row_keys, int first, int last, "
    "float guidance, float temperature, str impl) -> (Tensor, Tensor)",
    _fake,
)
def _forward(hidden_cond, hidden_uncond, weight, row_keys, first, last, guidance, temperature, impl):
    chosen = OP.choose(impl, Problem.of(hidden_cond))
    classes = weight[first:last].to(hidden_cond.dtype)
    ids, confidence = chosen.forward(hidden_cond, hidden_uncond, classes, row_keys, guidance, temperature)
    return ids + first, confidence
