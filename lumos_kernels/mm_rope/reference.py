"""mm_rope in plain PyTorch: the specification that every kernel is compared with.

y = LayerNorm(x) over head_dim. Then each pair of channels (i, i + D/2) turns by the angle p_axis(i) * f_i, where p are
the token's three positions and f_i = theta^(-2i/D):
    out_i = y_i cos - y_(i + D/2) sin,   out_(i + D/2) = y_(i + D/2) cos + y_i sin.
Statistics and rotation are in fp32 (fp64 for fp64 input). The result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Gradients, Inputs, Norm, Rotated
from .frequencies import pair_axes


def layer_norm(x_THD: Tensor, norm: Norm, eps: float) -> Tensor:
    """Return the LayerNorm of every head. Row j of the norm serves the heads j * H / mp .. (j + 1) * H / mp - 1."""
    weight, bias = (p.to(x_THD.dtype).repeat_interleave(x_THD.shape[1] // p.shape[0], dim=0) for p in norm)
    centred = x_THD - x_THD.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight + bias


def angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Return fp32 [T, D/2], the rotation angles: the fp32 product of the token's position and the frequency."""
    axes = pair_axes(2 * inv_freq.shape[0], positions.device)
    return positions.float()[axes].T * inv_freq


def rotate(x_THD: Tensor, angle_TF: Tensor) -> Tensor:
    """Return the heads with each pair (i, i + D/2) turned by the token's angle."""
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = (f(angle_TF.to(x_THD.dtype))[:, None] for f in (torch.cos, torch.sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def forward(inputs: Inputs) -> Rotated:
    """Normalise and rotate q and k. contract.py says what comes in and goes out."""
    q, k, positions, q_norm, k_norm, inv_freq, eps = inputs
    angle_TF = angles(positions, inv_freq)

    def one(x: Tensor, norm: Norm | None) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y if norm is None else layer_norm(y, norm, eps)
        return rotate(y, angle_TF).to(x.dtype)

    return Rotated(one(q, q_norm), one(k, k_norm))


def backward(inputs: Inputs, grad: Rotated) -> Gradients:
    """Return the gradients of q, k and, where there is a norm, of its weight and bias.

    The rotation is orthogonal, so its gradient dy is the upstream gradient turned back. With x_hat the normalised x and
    g = dy * weight, the LayerNorm gives
        dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),   dweight = sum of dy * x_hat,   dbias = sum of dy.
    """
    q, k, positions, q_norm, k_norm, inv_freq, eps = inputs
    back_TF = -angles(positions, inv_freq)

    def one(grad_x: Tensor, x: Tensor, norm: Norm | None) -> tuple[Tensor, Norm | None]:
        compute = torch.promote_types(x.dtype, torch.float32)
        dy = rotate(grad_x.to(compute), back_TF)
        if norm is None:
            return dy.to(x.dtype), None
        rows, repeat = norm.weight.shape[0], x.shape[1] // norm.weight.shape[0]
        centred = x.to(compute) - x.to(compute).mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        x_hat = centred * rstd
        g = dy * norm.weight.to(compute).repeat_interleave(repeat, dim=0)
        dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
        dweight, dbias = (s.unflatten(1, (rows, repeat)).sum((0, 2)) for s in (dy * x_hat, dy))
        return dx.to(x.dtype), Norm(dweight.to(norm.weight.dtype), dbias.to(norm.bias.dtype))

    (dq, dq_norm), (dk, dk_norm) = one(grad.q, q, q_norm), one(grad.k, k, k_norm)
    return Gradients(dq, dk, dq_norm, dk_norm)
