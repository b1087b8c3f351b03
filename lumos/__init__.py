"""Lumos-1 in PyTorch: model, AR-DF masking, training, and real video in and out, on the kernels of lumos_kernels."""

from lumos.config import LumosConfig
from lumos.masking import MaskedBatch, mask_tokens
from lumos.model import Lumos, LumosOutput

__all__ = ["Lumos", "LumosConfig", "LumosOutput", "MaskedBatch", "mask_tokens"]
