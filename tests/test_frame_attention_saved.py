"""The backward op of frame_attention takes o and lse of any strides: hooks on saved tensors may change them."""

from __future__ import annotations

import pytest
import torch
from row_orders import leaves_of, spread

from lumos_kernels import frame_attention, library

IMPLS = ("reference",) if library.refusal() else ("native", "reference")


@pytest.mark.parametrize("head_dim", [24, 32])
@pytest.mark.parametrize("impl", IMPLS)
def test_saved_tensors_may_come_back_with_other_strides(impl, head_dim):
    limits = spread()
    leaves = [x.requires_grad_() for x in leaves_of(limits, (4, 2), head_dim, torch.float32)]

    def gradients():
        o, lse = frame_attention(*leaves, limits, return_lse=True, impl=impl)
        return torch.autograd.grad((o.sin().sum(), lse.where(lse.isfinite(), 0.0).sum()), leaves)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.mT.contiguous() if x.dim() > 1 else x, _turned):
        turned = gradients()
    for name, a, b in zip(("dq", "dk", "dv"), turned, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, n=name: f"{n}: {text}")


def _turned(x):
    return x.mT if x.dim() > 1 else x
