"""The public frame_layout: validation and documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from ..tensors import host_may_read
from . import ops  # noqa: F401  # defines torch.ops.lumos_kernels.frame_layout
from .contract import Outputs
from .frames import check_bounds, check_documents


def frame_layout(input_ids: Tensor, cu_seqlens: Tensor, *, check: bool | None = None, impl: str = "auto") -> Outputs:
    """Read off token ids where a packed stream's frames lie, without a host sync. FrameLayout is built from this.

    Args:
        input_ids: int32 or int64 [T], the packed stream, masked (id 9003) or not. Values fit in 32 bits.
        cu_seqlens: int32 or int64 [B + 1], on the same device: document b is the tokens cu_seqlens[b] <= i <
            cu_seqlens[b + 1]. It rises from 0 to T.
        check: None checks a cu_seqlens on the CPU, outside torch.compile. True also validates the documents first,
            which reads the tensors (a host sync on GPUs). False checks nothing. Unchecked values below an earlier one
            are read as that one, values outside 0..T as the nearest of both, the first one as 0 and the last one as T.
        impl: "auto", "native" or "reference". An explicit choice never falls back.

    Returns:
        contract.Outputs: positions int32 [3, T], content bool [T], frame_index int32 [T], and the row limits kv_start,
        kv_end, q_start, q_end, int32 [T]. FrameLayout says what they mean.

    Raises:
        ValueError: a shape, dtype or device does not fit, a checked cu_seqlens does not rise from 0 to T, or an
            explicit `impl` cannot run. With check=True also: a header without a size, a truncated frame, content that
            does not match its size; the message names document and frame.

    Source: arXiv 2507.08801 section 3.2 and 3.3; equal to the official positions and mask on tests/golden.
    """
    if input_ids.dim() != 1 or input_ids.dtype not in errors.INTEGERS:
        raise ValueError(f"input_ids must be int32 or int64 [T]; got {errors.describe(input_ids)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in errors.INTEGERS:
        raise ValueError(f"cu_seqlens must be int32 or int64 [B + 1]; got {errors.describe(cu_seqlens)}")
    errors.require_same("cu_seqlens", cu_seqlens, "input_ids", input_ids, dtypes=False)
    tokens = input_ids.shape[0]
    if check or (check is None and host_may_read(cu_seqlens)):
        check_bounds(cu_seqlens, tokens)
    if check:
        check_documents(input_ids, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        cu_seqlens = cu_seqlens.clamp(0, tokens).to(torch.int32)
    return Outputs(*torch.ops.lumos_kernels.frame_layout.default(input_ids, cu_seqlens, impl))
