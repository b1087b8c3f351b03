"""Counts the bytes of tensors made inside a block of code and still alive: what a forward pass keeps for backward."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """bytes: of the storages that operators inside have made and that still live; peak: the most at any time.

    Inputs do not count, views count once with their storage, and what an operator frees before it returns never shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.made: dict[int, tuple[str, int, tuple[int, ...]]] = {}
        self._inputs: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.made:
                self._note(tensor, "input", 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.made:
                self._note(tensor, str(func), tensor.untyped_storage().nbytes())
        return result

    def _note(self, tensor: Tensor, name: str, size: int) -> None:
        storage = tensor.untyped_storage()
        self.made[storage._cdata] = name, size, tuple(tensor.shape)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.bytes -= self.made.pop(key)[1]


def saved_bytes(forward) -> tuple[int, list[tuple[str, int, tuple[int, ...]]]]:
    """Bytes alive after `forward`, which returns what is kept of its results; and the tensors, largest first."""
    with LiveBytes() as live:
        kept = forward()
        tensors = sorted((x for x in live.made.values() if x[1]), key=lambda x: -x[1])
        total = live.bytes
    del kept
    return total, tensors


__all__ = ["LiveBytes", "saved_bytes", "torch"]
