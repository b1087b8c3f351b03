"""frame_layout in C++ (csrc/frame_layout): one pass over the ids."""

from __future__ import annotations

import torch

from .contract import Inputs, Outputs


def forward(inputs: Inputs) -> Outputs:
    """Read the layout. contract.py says what comes in and goes out."""
    return Outputs(*torch.ops.lumos_native.frame_layout.default(*inputs))
