"""frame_attention in C++ (csrc/frame_attention): tiles and online softmax."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from .. import library
from ..layout import RowLimits
from .contract import Gradients, Inputs, OutputGradients, Outputs

logger = logging.getLogger("lumos_kernels")


def forward(inputs: Inputs) -> Outputs:
    """Attend. contract.py says what comes in and goes out."""
    q, k, v, limits, scale = inputs
    o, lse = torch.ops.lumos_native.frame_attention_forward.default(q, k, v, *_rows(limits), scale, _isa(q))
    return Outputs(o, lse)


def backward(inputs: Inputs, outputs: Outputs, grad: OutputGradients, *, deterministic: bool) -> Gradients:
    """Return the gradients. They are always deterministic: every sum has one order, whatever the number of threads."""
    q, k, v, limits, scale = inputs
    grad_lse = None if grad.lse is None else grad.lse.contiguous()
    dq, dk, dv = torch.ops.lumos_native.frame_attention_backward.default(
        grad.o, grad_lse, q, k, v, *outputs, *_rows(limits), scale, _isa(q)
    )
    return Gradients(dq, dk, dv)


def _rows(limits: RowLimits) -> tuple[Tensor, Tensor]:
    """Return kv_start and kv_end. The C++ needs no bounds of the queries of a key: it finds those of its tiles."""
    return limits.kv_start.contiguous(), limits.kv_end.contiguous()


def _isa(q: Tensor) -> int:
    """Return the instruction set for q's dtype and head size.

    AMX has to pass a check first, unless LUMOS_CPU_ISA forces it. Its code was proven on a model of the tiles, and a
    wrong result is worse than a slow one.
    """
    name = library.isa()
    if name == "amx" and not library.isa_is_forced() and q.dtype == torch.bfloat16 and not agree(name, q.shape[2]):
        name = "avx512_bf16"
    return library.isa_value(name)


@functools.cache
def agree(isa: str, head_dim: int, model: str = "amx_model") -> bool:
    """Return whether two instruction sets compute the same, forward and backward, up to the order of sums.

    The trial has whole tiles and parts of tiles, boundaries of frames inside them, and scores so large that the online
    softmax must follow the running maximum.
    """
    pairs = zip(_trial(isa, head_dim), _trial(model, head_dim), strict=True)
    result = all(torch.allclose(a.float(), b.float(), rtol=0, atol=0.01 * float(b.abs().max())) for a, b in pairs)
    if not result:
        logger.warning("frame_attention does not use %s: at head size %d it is not what %s gives", isa, head_dim, model)
    return result


@torch.no_grad()
def _trial(isa: str, head_dim: int) -> list[Tensor]:
    """Return o, lse, dq, dk and dv of the trial in one instruction set."""
    random = torch.Generator().manual_seed(head_dim)
    tokens, frame, heads = 290, 70, 2  # one whole key tile and a part of another
    q, grad_o = (torch.randn(tokens, heads, head_dim, generator=random) for _ in range(2))
    k, v = (torch.randn(tokens, 1, head_dim, generator=random) for _ in range(2))
    q[:, 1] *= 8  # beyond the scores for which the reference of the softmax is fixed
    q, k, v, grad_o = (x.bfloat16() for x in (q, k, v, grad_o))
    rows = torch.arange(tokens)
    ends = torch.where(rows < frame, rows + 1, (rows // frame + 1) * frame).clamp_max(tokens)
    limits = _rows(RowLimits.from_kv(torch.zeros_like(ends), ends, tokens))
    ops, value, scale = torch.ops.lumos_native, library.isa_value(isa), head_dim**-0.5
    o, lse = ops.frame_attention_forward(q, k, v, *limits, scale, value)
    return [o, lse, *ops.frame_attention_backward(grad_o, None, q, k, v, o, lse, *limits, scale, value)]
