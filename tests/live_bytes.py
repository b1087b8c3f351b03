"""Counts the bytes of tensors made inside a block of code: those still alive, and the most at any time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """bytes: of the storages that operators inside have made and that still live: what a forward pass keeps, say.

    Inputs do not count, views count once with their storage, and what an operator frees before it returns never shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
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
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.bytes -= self.made.pop(key)[1]


class PeakBytes(TorchDispatchMode):
    """peak: the most bytes that storages seen by operators inside took at any time, those of `tensors` included.

    Sizes are read anew at each operator, because FSDP2 frees and refills the storages of gathered parameters.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._look(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._look(tree_leaves((args, kwargs, result)))
        return result

    def _look(self, tensors: Iterable[object]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        alive = {key: ref() for key, ref in self._storages.items() if ref() is not None}
        self._storages = {key: self._storages[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
