"""Lumos-1 in PyTorch: model, AR-DF masking, training, and real video in and out, on the kernels of lumos_kernels."""

from lumos.config import LumosConfig
from lumos.generate import generate_frames, generate_tokens
from lumos.masking import MaskedBatch, mask_tokens
from lumos.model import Lumos, LumosOutput
from lumos.patch import apply_lumos_kernels

__all__ = [
    "Lumos",
    "LumosConfig",
    "LumosOutput",
    "MaskedBatch",
    "apply_lumos_kernels",
    "generate_frames",
    "generate_tokens",
    "mask_tokens",
]
