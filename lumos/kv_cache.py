"""Keys and values of what has been decided: static buffers that sampling fills frame by frame.

A cache is one row of keys for all documents of a pass. Every lane (one branch of one document) owns a run of it, so
RowLimits describe what each lane's queries see: one range a query.

Legend: N tokens of capacity, K key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lumos.config import LumosConfig

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
_TINY = 1e-12  # smallest scale: a head of zeros stays zeros


class FrameCache(Protocol):
    """What sampling needs of a cache, besides KeyValueCache.update.

    rows: int64 [T], where in the cache the tokens of the next pass go.
    keep: whether the next pass writes history, or a frame that the following pass overwrites.
    used: int, tokens from the beginning of the cache that any query of the next pass may see.
    """

    rows: Tensor
    keep: bool
    used: int

    def update(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]: ...

    @property
    def nbytes(self) -> int: ...


class StaticCache:
    """Keys and values of every layer in the model's dtype, on its device, allocated once.

    Zeros at first, since a kernel may multiply the values of keys nobody sees by a probability of zero.
    """

    def __init__(self, config: LumosConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, config.num_hidden_layers, tokens, config.num_key_value_heads, config.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.rows, self.keep, self.used = torch.empty(0, dtype=torch.int64, device=device), True, tokens

    def update(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the tokens' keys and values at `rows`; returns the whole layer [N, K, D], twice."""
        k_NKD, v_NKD = self.data[0, layer], self.data[1, layer]
        k_NKD.index_copy_(0, self.rows, k_TKD)
        v_NKD.index_copy_(0, self.rows, v_TKD)
        return k_NKD, v_NKD

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class CompactCache:
    """History in a smaller dtype or on another device; one layer at a time is unpacked into a shared workspace.

    storage: torch.bfloat16, torch.float16, or FP8 (e4m3 with one fp32 scale a token and head); or the compute dtype,
        to keep it unchanged on `storage_device`.
    The frame being decided stays in the compute dtype; only what becomes history is packed. With a storage dtype below
    the compute dtype the result is no longer that of the exact sampler.
    """

    def __init__(
        self,
        config: LumosConfig,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: torch.dtype,
        storage_device: torch.device | None = None,
    ) -> None:
        layers, row = config.num_hidden_layers, (config.num_key_value_heads, config.head_dim)
        home = device if storage_device is None else storage_device
        pinned = home.type == "cpu" and device.type == "cuda"  # or the copies would not overlap with the computation
        packed = torch.uint8 if storage == FP8 else storage  # index_copy_ knows no float8
        self.storage, self.dtype = storage, dtype
        self.data = torch.zeros((2, layers, tokens, *row), dtype=packed, device=home, pin_memory=pinned)
        self.scale = None
        if storage == FP8:
            self.scale = torch.zeros((2, layers, tokens, row[0], 1), device=home, pin_memory=pinned)
        self.work = torch.zeros((2, tokens, *row), dtype=dtype, device=device)
        self.rows, self.keep, self.used = torch.empty(0, dtype=torch.int64, device=device), True, tokens

    def update(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Unpacks the layer, writes the tokens' keys and values at `rows`, and packs them too if they are kept."""
        for side, new in enumerate((k_TKD, v_TKD)):
            self.work[side, : self.used].copy_(self._unpacked(side, layer), non_blocking=True)
            self.work[side].index_copy_(0, self.rows, new)
            if self.keep:
                self._pack(side, layer, new)
        return self.work[0], self.work[1]

    @property
    def nbytes(self) -> int:
        """Bytes on all devices, workspace included."""
        return self.data.nbytes + self.work.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def _unpacked(self, side: int, layer: int) -> Tensor:
        data = self.data[side, layer, : self.used].to(self.work.device, non_blocking=True)
        if self.scale is None:
            return data
        scale = self.scale[side, layer, : self.used].to(self.work.device, non_blocking=True)
        return data.view(FP8).to(torch.float32) * scale

    def _pack(self, side: int, layer: int, new: Tensor) -> None:
        rows = self.rows.to(self.data.device)
        if self.scale is None:
            self.data[side, layer].index_copy_(0, rows, new.to(self.data.device, self.storage))
            return
        new = new.float()
        scale = (new.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(_TINY)
        packed = (new / scale).to(FP8).view(torch.uint8)
        self.data[side, layer].index_copy_(0, rows, packed.to(self.data.device))
        self.scale[side, layer].index_copy_(0, rows, scale.to(self.data.device))


def cache_bytes(config: LumosConfig, tokens: int, dtype: torch.dtype, storage: torch.dtype | None = None) -> int:
    """Bytes of the cache for `tokens` tokens: of StaticCache, or of CompactCache where a storage dtype is given.

    2 (keys, values) * layers * tokens * kv heads * head_dim * bytes of an element; packed, one layer in the compute
    dtype comes on top, and 4 bytes a token, head and layer for the scales of FP8.
    """
    row = 2 * config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers
    if storage is None:
        return layers * tokens * row * dtype.itemsize
    scales = 2 * layers * tokens * config.num_key_value_heads * 4 if storage == FP8 else 0
    return layers * tokens * row * storage.itemsize + tokens * row * dtype.itemsize + scales
