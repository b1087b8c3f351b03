"""The public mm_rope: validation and documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import checks
from lumos_kernels.mm_rope.ops import MMRope


def mm_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    theta: float = 10000.0,
    q_norm: tuple[Tensor, Tensor] | None = None,
    k_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm of q and k over head_dim, then the 3-axis rotation of Lumos-1, in one pass.

    Args:
        q: [T, Hq, D], bf16, fp16, fp32 or fp64, any strides with a unit last one (a slice of a fused projection).
        k: [T, Hkv, D], like q. D is a multiple of 32.
        positions: int32 [3, T], the t, h, w positions of each token, e.g. FrameLayout.positions.
        theta: base of the frequencies, theta^(-2i/D) for the pair of channels (i, i + D/2).
        q_norm, k_norm: None, or (weight, bias), each [mp, D]: row j serves heads j*H/mp .. (j+1)*H/mp - 1.
        eps: added to the variance.
        impl: "auto", "reference", "native" or "triton". An explicit choice never falls back.

    Returns:
        q and k, rotated, contiguous, in their own dtype. The angles and everything between are fp32 (fp64 for fp64
        inputs), rounded once; the official code rounds cos and sin to the activation dtype first.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an explicit `impl` cannot run: the message says why.

    Source: arXiv 2507.08801 section 3.2; equal to the official cos/sin bit for bit in fp32 (tests/golden).
    """
    checks.shape("q", q, "T, Hq, D")
    tokens, q_heads, head_dim = q.shape
    checks.shape("k", k, "T, Hkv, D", T=tokens, D=head_dim)
    checks.dtype("q", q, checks.FLOATS)
    checks.same("k", k, "q", q)
    checks.rope_head_dim(head_dim)
    checks.shape("positions", positions, "3, T", T=tokens)
    checks.dtype("positions", positions, (torch.int32,))
    checks.same("positions", positions, "q", q, dtypes=False)
    if not theta > 0 or not eps >= 0:
        raise ValueError(f"theta must be > 0 and eps >= 0; got {theta} and {eps}")
    for name, norm, heads in (("q_norm", q_norm, q_heads), ("k_norm", k_norm, k.shape[1])):
        if norm is not None:
            _check_norm(name, norm, heads, head_dim, q)
    return MMRope.apply(q, k, positions, *(q_norm or (None, None)), *(k_norm or (None, None)), theta, eps, impl)


def _check_norm(name: str, norm: tuple[Tensor, Tensor], heads: int, head_dim: int, q: Tensor) -> None:
    weight, bias = norm
    checks.shape(f"{name} weight", weight, "mp, D", D=head_dim)
    checks.shape(f"{name} bias", bias, "mp, D", mp=weight.shape[0], D=head_dim)
    if weight.shape[0] == 0 or heads % weight.shape[0]:
        raise ValueError(f"{name} has {weight.shape[0]} rows, which must divide the {heads} heads it serves")
    for part, tensor in (("weight", weight), ("bias", bias)):
        checks.dtype(f"{name} {part}", tensor, checks.FLOATS)
        checks.same(f"{name} {part}", tensor, "q", q, dtypes=False)
