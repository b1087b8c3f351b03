"""Lumos-1 in PyTorch: model, AR-DF masking, training, and real video in and out, on the kernels of lumos_kernels."""

from lumos.config import LumosConfig
from lumos.generate import generate_frames, generate_tokens
from lumos.masking import MaskedBatch, mask_tokens
from lumos.model import Lumos, LumosOutput

__all__ = ["Lumos", "LumosConfig", "LumosOutput", "MaskedBatch", "generate_frames", "generate_tokens", "mask_tokens"]
