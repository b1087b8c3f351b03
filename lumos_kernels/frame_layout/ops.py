"""The reading of a layout off token ids, under torch.library: schema and fake. Imports torch only.

An implementation is a module of this folder with
    read(ids [T], cu_seqlens int32 [B + 1]) -> positions int32 [3, T], content bool [T], frame_index int32 [T],
        kv_start, kv_end, q_start, q_end int32 [T]
for int32 or int64 ids whose values fit in 32 bits, and B >= 1 documents wherever T > 0; layout.FrameLayout says what
they mean. Rows may be malformed: the limits then still are monotone, in bounds and each other's transposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import dispatch, library
from lumos_kernels.dispatch import Problem, runs_anywhere
from lumos_kernels.library_ops import define


def _runs_native(problem: Problem) -> str | None:
    """The compiled CPU library: CPU tensors."""
    return library.refusal() if problem.device == "cpu" else f"runs CPU tensors, not {problem.device}"


OP = dispatch.register(
    "frame_layout", "lumos_kernels.frame_layout", {"native": _runs_native, "reference": runs_anywhere}
)


def _fake_read(ids, cu_seqlens):
    numbers = [ids.new_empty(ids.shape, dtype=torch.int32) for _ in range(5)]
    return ids.new_empty((3, *ids.shape), dtype=torch.int32), torch.empty_like(ids, dtype=torch.bool), *numbers


@define(
    "frame_layout(Tensor ids, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_read,
)
def read(ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return OP.choose("auto", Problem.of(ids)).read(ids.contiguous(), cu_seqlens.contiguous())
