"""The public mm_rope: validation and documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FLOATS, describe, is_number, require_dtype, require_rope_head_dim, require_same, require_shape
from .ops import rotate


def mm_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    theta: float = 10000.0,
    q_norm: tuple[Tensor, Tensor] | None = None,
    k_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return q and k after the LayerNorm over head_dim and the 3-axis rotation of Lumos-1, in one pass.

    Args:
        q: [T, Hq, D], bf16, fp16, fp32 or fp64, any strides with a unit last one, e.g. a slice of a fused projection.
        k: [T, Hkv, D], like q. D is a multiple of 32.
        positions: int32 [3, T], the t, h, w positions of each token, e.g. FrameLayout.positions.
        theta: base of the frequencies. The pair of channels (i, i + D/2) has the frequency theta^(-2i/D).
        q_norm, k_norm: None for no norm, or (weight, bias), each [mp, D]. Row j serves the heads j*H/mp ..
            (j+1)*H/mp - 1.
        eps: added to the variance.
        impl: "auto", "reference" (plain PyTorch), "native" (C++ on CPUs) or "triton" (GPUs). An explicit choice never
            falls back: it raises where it cannot run.

    Returns:
        (q, k), rotated, contiguous, in their own dtype. The angles and everything between are fp32 (fp64 for fp64
        inputs) and rounded once. The official code rounds cos and sin to the activation dtype first.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an explicit `impl` cannot run. The message says why.

    Source: arXiv 2507.08801 section 3.2; equal to the official cos and sin bit for bit in fp32 (tests/golden).
    """
    require_shape("q", q, "T, Hq, D")
    tokens, q_heads, head_dim = q.shape
    require_shape("k", k, "T, Hkv, D", T=tokens, D=head_dim)
    require_dtype("q", q, FLOATS)
    require_same("k", k, "q", q)
    require_rope_head_dim(head_dim)
    require_shape("positions", positions, "3, T", T=tokens)
    require_dtype("positions", positions, (torch.int32,))
    require_same("positions", positions, "q", q, dtypes=False)
    numbers = is_number(theta) and is_number(eps)
    if not numbers or not theta > 0 or not eps >= 0:
        raise ValueError(f"theta must be > 0 and eps >= 0; got {theta} and {eps}")
    for name, norm, heads in (("q_norm", q_norm, q_heads), ("k_norm", k_norm, k.shape[1])):
        if norm is not None:
            _check_norm(name, norm, heads, head_dim, q)
    norms = *(q_norm or (None, None)), *(k_norm or (None, None))
    return rotate(q, k, positions, *norms, theta, eps, impl)


def _check_norm(name: str, norm: tuple[Tensor, Tensor], heads: int, head_dim: int, q: Tensor) -> None:
    if not isinstance(norm, (tuple, list)) or len(norm) != 2:
        raise ValueError(f"{name} must be None or (weight, bias), two tensors [mp, D]; got {describe(norm)}")
    weight, bias = norm
    require_shape(f"{name} weight", weight, "mp, D", D=head_dim)
    require_shape(f"{name} bias", bias, "mp, D", mp=weight.shape[0], D=head_dim)
    if weight.shape[0] == 0 or heads % weight.shape[0]:
        raise ValueError(f"{name} has {weight.shape[0]} rows, which must divide the {heads} heads it serves")
    for part, tensor in (("weight", weight), ("bias", bias)):
        require_dtype(f"{name} {part}", tensor, FLOATS)
        require_same(f"{name} {part}", tensor, "q", q, dtypes=False)
