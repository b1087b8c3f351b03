"""The contract of an implementation of masked_sample, and which implementations there are.

With logits l = l_uncond + guidance_scale * (l_cond - l_uncond) over the class slice, divided by the temperature, a row
draws the class that has the largest l + G, G the Gumbel variates of philox.py. The confidence is the probability of the
drawn class under softmax(l). There is no gradient.

Legend: N rows, C hidden size, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from .. import dispatch


class Inputs(NamedTuple):
    """What an implementation gets: tensors on one device whose shapes and dtypes passed the checks."""

    hidden_cond: Tensor  # [N, C]
    hidden_uncond: Tensor | None  # [N, C] in hidden_cond's dtype; None without guidance
    weight: Tensor  # [K, C], the class slice, in hidden_cond's dtype
    row_keys: Tensor | None  # int64 [N, 2], (seed, counter); None asks for the argmax of l
    guidance_scale: float
    temperature: float


class Outputs(NamedTuple):
    """What an implementation gives."""

    classes: Tensor  # int64 [N], in [0, K)
    confidence: Tensor  # fp32 [N]


class Implementation(Protocol):
    """A module of this folder."""

    def forward(self, inputs: Inputs) -> Outputs: ...


OP: dispatch.Op[Implementation] = dispatch.register("masked_sample", __package__, dispatch.USUAL)

if TYPE_CHECKING:  # mypy holds every implementation to the Protocol
    from . import native, reference, triton

    _triton: Implementation = triton
    _native: Implementation = native
    _reference: Implementation = reference
