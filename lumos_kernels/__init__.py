"""Fused kernels for Lumos-1: MM-RoPE rotation, block-causal frame attention, tube-masked loss, masked sampling.

The names below are the public ones. `import lumos_kernels.<op>.<module> as x` reaches the modules of an op, although
the op's function has the name of its package: lumos_kernels/packages.py says by which mechanism.
"""

from .dispatch import backends
from .flops import register_with_torch
from .frame_attention import frame_attention
from .layout import Frame, FrameLayout, RowLimits, Text
from .masked_sample import masked_sample
from .mm_rope import mm_rope
from .tube_masked_loss import TubeLossStats, tube_masked_loss
from .version import __version__

__all__ = [
    "Frame",
    "FrameLayout",
    "RowLimits",
    "Text",
    "TubeLossStats",
    "__version__",
    "backends",
    "frame_attention",
    "masked_sample",
    "mm_rope",
    "tube_masked_loss",
]

register_with_torch()
