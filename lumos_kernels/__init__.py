"""Fused kernels for Lumos-1: MM-RoPE rotation, block-causal frame attention, tube-masked loss, masked sampling."""

from lumos_kernels.dispatch import backends
from lumos_kernels.layout import Frame, FrameLayout, RowLimits, Text
from lumos_kernels.mm_rope import mm_rope
from lumos_kernels.version import __version__

__all__ = ["Frame", "FrameLayout", "RowLimits", "Text", "__version__", "backends", "mm_rope"]
