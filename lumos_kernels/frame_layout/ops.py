"""frame_layout under torch.library: schema and fake. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Problem
from ..registration import define
from .contract import OP, Inputs, Outputs


def _fake_forward(ids: Tensor, cu_seqlens: Tensor, impl: str) -> Outputs:
    numbers = [ids.new_empty(ids.shape, dtype=torch.int32) for _ in range(5)]
    return Outputs(ids.new_empty((3, *ids.shape), dtype=torch.int32), torch.empty_like(ids, dtype=torch.bool), *numbers)


@define(
    "frame_layout(Tensor ids, Tensor cu_seqlens, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
def _forward(ids: Tensor, cu_seqlens: Tensor, impl: str) -> Outputs:
    if ids.shape[0] and cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens holds no document for {ids.shape[0]} tokens; got [{cu_seqlens.shape[0]}]")
    chosen = OP.choose(impl, Problem.of(ids))
    return chosen.forward(Inputs(ids.contiguous(), cu_seqlens.contiguous()))
