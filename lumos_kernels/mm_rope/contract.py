"""The contract of an implementation of mm_rope, and which implementations there are.

mm_rope normalises every head of q and k (LayerNorm over head_dim) and rotates its pairs of channels by three positions.
Backward recomputes the statistics and the angles, so nothing is saved beside the inputs.

Legend: T tokens, Hq and Hkv heads of q and of k, D head_dim, mp rows of a norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from .. import dispatch


class Norm(NamedTuple):
    """Parameters of the LayerNorm over head_dim, or their gradients.

    Row j serves the heads j * H / mp .. (j + 1) * H / mp - 1. Any floating dtype, any strides.
    """

    weight: Tensor  # [mp, D]
    bias: Tensor  # [mp, D]


class Inputs(NamedTuple):
    """What an implementation gets: tensors on one device whose shapes and dtypes passed the checks."""

    q: Tensor  # [T, Hq, D], unit last stride
    k: Tensor  # [T, Hkv, D], unit last stride
    positions: Tensor  # int32 [3, T]: t, h, w; any strides
    q_norm: Norm | None
    k_norm: Norm | None
    inv_freq: Tensor  # fp32 [D / 2], contiguous: the frequency of each pair
    eps: float  # added to the variance


class Rotated(NamedTuple):
    """The rotated q and k, or the gradients that arrive at them."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]


class Gradients(NamedTuple):
    """Gradients of the inputs, in their dtypes. A norm that was not given has None."""

    q: Tensor
    k: Tensor
    q_norm: Norm | None
    k_norm: Norm | None


class Implementation(Protocol):
    """A module of this folder. Every tensor that it returns is new and contiguous."""

    def forward(self, inputs: Inputs) -> Rotated: ...

    def backward(self, inputs: Inputs, grad: Rotated) -> Gradients:
        """Return the gradients, given those of the outputs, which have a unit last stride."""
        ...


OP: dispatch.Op[Implementation] = dispatch.register("mm_rope", __package__, dispatch.USUAL)

if TYPE_CHECKING:  # mypy holds every implementation to the Protocol
    from . import native, reference, triton

    _triton: Implementation = triton
    _native: Implementation = native
    _reference: Implementation = reference
