"""MM-RoPE in plain PyTorch: the specification that every kernel is compared with.

y = LayerNorm(x) over head_dim, then each pair of channels (i, i + D/2) turns by the angle p_axis(i) * f_i, where
p are the token's three positions and f_i = theta^(-2i/D). Statistics and rotation are in fp32 (fp64 for fp64 input);
the result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels.mm_rope.common import pair_axes

Norm = tuple[Tensor, Tensor] | None  # weight and bias, each [mp, D]


def layer_norm(x_THD: Tensor, norm: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """LayerNorm over head_dim; row j of the weight and bias serves the heads j * H / mp .. (j + 1) * H / mp - 1."""
    weight, bias = (p.to(x_THD.dtype).repeat_interleave(x_THD.shape[1] // p.shape[0], dim=0) for p in norm)
    centred = x_THD - x_THD.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight + bias


def angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """fp32 [T, D/2]: the rotation angles of each token, the fp32 product of its position and the frequency."""
    axes = pair_axes(2 * inv_freq.shape[0], positions.device)
    return positions.float()[axes].T * inv_freq


def rotate(x_THD: Tensor, angle_TF: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) of every head by its token's angle."""
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = (f(angle_TF.to(x_THD.dtype))[:, None] for f in (torch.cos, torch.sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def forward(
    q: Tensor, k: Tensor, positions: Tensor, q_norm: Norm, k_norm: Norm, inv_freq: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hkv, D], positions int32 [3, T], inv_freq fp32 [D/2] -> normalised and rotated q, k."""
    angle_TF = angles(positions, inv_freq)

    def one(x: Tensor, norm: Norm) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y if norm is None else layer_norm(y, norm, eps)
        return rotate(y, angle_TF).to(x.dtype)

    return one(q, q_norm), one(k, k_norm)


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_norm: Norm,
    k_norm: Norm,
    inv_freq: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Norm, Norm]:
    """Gradients of q, k and, where there is a norm, of its weight and bias.

    The rotation is orthogonal, so its gradient is the turn back. With x_hat the normalised x and g = dy * weight,
    LayerNorm's is dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)).
    """
    back_TF = -angles(positions, inv_freq)

    def one(grad: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Norm]:
        compute = torch.promote_types(x.dtype, torch.float32)
        dy = rotate(grad.to(compute), back_TF)
        if norm is None:
            return dy.to(x.dtype), None
        rows, repeat = norm[0].shape[0], x.shape[1] // norm[0].shape[0]
        centred = x.to(compute) - x.to(compute).mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        x_hat = centred * rstd
        g = dy * norm[0].to(compute).repeat_interleave(repeat, dim=0)
        dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
        dweight, dbias = (s.unflatten(1, (rows, repeat)).sum((0, 2)) for s in (dy * x_hat, dy))
        return dx.to(x.dtype), (dweight.to(norm[0].dtype), dbias.to(norm[1].dtype))

    (dq, dq_norm), (dk, dk_norm) = one(grad_q, q, q_norm), one(grad_k, k, k_norm)
    return dq, dk, dq_norm, dk_norm
