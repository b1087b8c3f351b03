"""The public frame_attention: validation and documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import checks
from lumos_kernels.dispatch import Problem
from lumos_kernels.frame_attention.ops import OP, FrameAttention
from lumos_kernels.layout import RowLimits


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: RowLimits,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a packed stream in which query i sees the keys kv_start[i] <= j < kv_end[i].

    With FrameLayout.limits: causal over text, bidirectional inside a frame, causal between frames, never across
    documents (arXiv 2507.08801, section 3.3; equal to the official mask on tests/golden). Other limits describe
    prefix-cache decoding (Tq != Tk) and sliding windows. No mask is built.

    Args:
        q: [Tq, Hq, D], bf16, fp16, fp32 or fp64, any strides with a unit last one.
        k, v: [Tk, Hkv, D], like q. Hkv divides Hq; query head h reads kv head h * Hkv // Hq.
        limits: RowLimits of Tq queries and Tk keys on q's device.
        scale: factor of the scores, default D^-0.5.
        return_lse: also return the logarithm of each row's sum of exponentials; gradients flow through it too.
        deterministic: the backward pass gives the same bits every time.
        impl: "auto" or an implementation's name (lumos_kernels.backends() lists them). An explicit choice never
            falls back.

    Returns:
        o [Tq, Hq, D] in q's dtype; with return_lse also lse fp32 [Hq, Tq]. A row without keys gives 0 and -inf, and
        passes no gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an explicit `impl` cannot run: the message says why.
    """
    checks.shape("q", q, "Tq, Hq, D")
    queries, q_heads, head_dim = q.shape
    if not q_heads or not head_dim:
        raise ValueError(f"q must have at least one head and one channel; got {checks.describe(q)}")
    checks.shape("k", k, "Tk, Hkv, D", D=head_dim)
    keys, kv_heads, _ = k.shape
    checks.shape("v", v, "Tk, Hkv, D", Tk=keys, Hkv=kv_heads, D=head_dim)
    checks.dtype("q", q, checks.FLOATS)
    checks.same("k", k, "q", q)
    checks.same("v", v, "q", q)
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"the kv heads of k and v must divide the heads of q; got {kv_heads} and {q_heads}")
    for name in ("kv_start", "kv_end", "q_start", "q_end"):
        limit = getattr(limits, name)
        checks.shape(f"limits.{name}", limit, "Tq" if name.startswith("kv") else "Tk", Tq=queries, Tk=keys)
        checks.dtype(f"limits.{name}", limit, (torch.int32,))
        checks.same(f"limits.{name}", limit, "q", q, dtypes=False)
    scale = head_dim**-0.5 if scale is None else float(scale)
    if impl == "flash":  # its autograd keeps what its backward needs; the op would run its forward twice
        o, lse = OP.choose(impl, Problem.of(q, head_dim)).attend(q, k, v, limits, scale, deterministic)
        return (o, lse) if return_lse else o
    limits_ = limits.kv_start, limits.kv_end, limits.q_start, limits.q_end
    o, lse = FrameAttention.apply(q, k, v, *limits_, scale, deterministic, impl)
    return (o, lse) if return_lse else o
