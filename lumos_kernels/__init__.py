"""Fused kernels for Lumos-1: MM-RoPE rotation, block-causal frame attention, tube-masked loss, masked sampling."""

from lumos_kernels.dispatch import backends
from lumos_kernels.frame_attention import frame_attention
from lumos_kernels.layout import Frame, FrameLayout, RowLimits, Text
from lumos_kernels.masked_sample import masked_sample
from lumos_kernels.mm_rope import mm_rope
from lumos_kernels.tube_loss import TubeLossStats, tube_masked_loss
from lumos_kernels.version import __version__

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
