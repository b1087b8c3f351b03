"""frame_attention in C++ (csrc/cpu/frame_attention_*), tiles and online softmax. The contract is in ops.py."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from lumos_kernels import _host, library
from lumos_kernels.layout import RowLimits

logger = logging.getLogger("lumos_kernels")


def forward(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.lumos_native.frame_attention_forward.default(q, k, v, *_contiguous(limits), scale, _isa(q))


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    limits: RowLimits,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Always deterministic: every sum has one order, whatever the number of threads."""
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    return torch.ops.lumos_native.frame_attention_backward.default(
        grad_o, grad_lse, q, k, v, o, lse, *_contiguous(limits), scale, _isa(q)
    )


def _contiguous(limits: RowLimits) -> tuple[Tensor, ...]:
    views = limits.kv_start, limits.kv_end, limits.q_start, limits.q_end
    return tuple(view.contiguous() for view in views)


def _isa(q: Tensor) -> int:
    """The instruction set for q's dtype and head size. AMX has to pass a check first, unless it is forced: its code was
    proven on a model of the tiles, and a wrong result is worse than a slow one.
    """
    name = library.isa()
    if name == "amx" and not library.isa_is_forced() and q.dtype == torch.bfloat16 and not agree(name, q.shape[2]):
        name = "avx512_bf16"
    return _host.ISA_VALUES[name]


@functools.cache
def agree(isa: str, head_dim: int, model: str = "amx_model") -> bool:
    """Whether two instruction sets compute the same, forward and backward, up to the order of sums: whole tiles and
    parts, boundaries of frames inside them, scores too large for a fixed reference.
    """
    pairs = zip(_trial(isa, head_dim), _trial(model, head_dim), strict=True)
    result = all(torch.allclose(a.float(), b.float(), rtol=0, atol=0.01 * float(b.abs().max())) for a, b in pairs)
    if not result:
        logger.warning("frame_attention does not use %s: at head size %d it is not what %s gives", isa, head_dim, model)
    return result


@torch.no_grad()
def _trial(isa: str, head_dim: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(head_dim)
    tokens, frame, heads = 290, 70, 2  # a whole key tile and a part of one
    q, grad_o = (torch.randn(tokens, heads, head_dim, generator=random) for _ in range(2))
    k, v = (torch.randn(tokens, 1, head_dim, generator=random) for _ in range(2))
    q[:, 1] *= 8  # beyond the fixed reference
    q, k, v, grad_o = (x.bfloat16() for x in (q, k, v, grad_o))
    rows = torch.arange(tokens)
    ends = torch.where(rows < frame, rows + 1, (rows // frame + 1) * frame).clamp_max(tokens)
    limits = _contiguous(RowLimits.from_kv(torch.zeros_like(ends), ends, tokens))
    ops, value, scale = torch.ops.lumos_native, _host.ISA_VALUES[isa], head_dim**-0.5
    o, lse = ops.frame_attention_forward(q, k, v, *limits, scale, value)
    return [o, lse, *ops.frame_attention_backward(grad_o, None, q, k, v, o, lse, *limits, scale, value)]
