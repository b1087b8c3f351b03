"""The public frame_attention: validation and documentation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..errors import FLOATS, describe, require_dtype, require_number, require_same, require_shape
from ..layout import RowLimits
from .contract import Inputs
from .ops import attend


@overload
def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: RowLimits,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: RowLimits,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    deterministic: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: RowLimits,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the attention of a packed stream in which query i sees the keys kv_start[i] <= j < kv_end[i].

    FrameLayout.limits are causal over text, bidirectional inside a frame, causal between frames, and never cross
    documents (arXiv 2507.08801, section 3.3; equal to the official mask on tests/golden). Other limits describe
    prefix-cache decoding (Tq != Tk) and sliding windows. The rows may come in any order; it is fast where kv_start and
    kv_end never fall. No mask is built.

    Args:
        q: [Tq, Hq, D], bf16, fp16, fp32 or fp64, any strides with a unit last one. "native" and "triton" (D <= 128) pad
            D with zeros to a multiple of 32, which is exact and costs a copy of q, k and v.
        k, v: [Tk, Hkv, D], like q. Hkv divides Hq; query head h reads kv head h * Hkv // Hq.
        limits: RowLimits of Tq queries and Tk keys on q's device. Values outside 0..Tk mean the nearest of both.
        scale: factor of the scores, default D^-0.5.
        return_lse: also return the logarithm of each row's sum of exponentials. Gradients flow through it too.
        deterministic: the backward pass gives the same bits every time.
        impl: "auto", "reference" (plain PyTorch), "native" (C++ on CPUs), "triton" (GPUs) or "flash" (an installed
            flash-attn, GPUs). An explicit choice never falls back: it raises where it cannot run.

    Returns:
        o [Tq, Hq, D] in q's dtype; with return_lse (o, lse), lse fp32 [Hq, Tq] (fp64 for fp64 inputs). A row without
        keys, kv_start >= kv_end, gives 0 and -inf, and passes no gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an explicit `impl` cannot run. The message says why.
    """
    require_shape("q", q, "Tq, Hq, D")
    queries, q_heads, head_dim = q.shape
    if not q_heads or not head_dim:
        raise ValueError(f"q must have at least one head and one channel; got {describe(q)}")
    require_shape("k", k, "Tk, Hkv, D", D=head_dim)
    keys, kv_heads, _ = k.shape
    require_shape("v", v, "Tk, Hkv, D", Tk=keys, Hkv=kv_heads, D=head_dim)
    require_dtype("q", q, FLOATS)
    require_same("k", k, "q", q)
    require_same("v", v, "q", q)
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"the kv heads of k and v must divide the heads of q; got {kv_heads} and {q_heads}")
    if not isinstance(limits, RowLimits):
        raise ValueError(f"limits must be RowLimits, e.g. FrameLayout.limits; got {describe(limits)}")
    for name in ("kv_start", "kv_end", "q_start", "q_end"):
        limit = getattr(limits, name)
        require_shape(f"limits.{name}", limit, "Tq" if name.startswith("kv") else "Tk", Tq=queries, Tk=keys)
        require_dtype(f"limits.{name}", limit, (torch.int32,))
        require_same(f"limits.{name}", limit, "q", q, dtypes=False)
    if scale is not None:
        require_number("scale", scale, "None or a finite number")
    scale = head_dim**-0.5 if scale is None else float(scale)
    o, lse = attend(Inputs(q, k, v, limits, scale), deterministic, impl)
    return (o, lse) if return_lse else o
