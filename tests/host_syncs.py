"""Detects what makes a host wait for its GPU, where there is none, and counts what a call would allocate there.

NoHostSync serves alone, over real CPU tensors. Under `pretended_gpu()` the device is "meta": tensors have shapes and
dtypes but no values, so that nothing can be read behind NoHostSync's back, launches of Triton kernels are recorded
instead of run, and allocations are counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result, or its shape, the host has to read.
READING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "bincount", "_unique",
    "_unique2", "unique_dim", "unique_consecutive", "histc", "_linalg_check_errors",
)  # fmt: skip


class HostSync(AssertionError):
    """Something made the host wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Raises HostSync at the first operator that would make the host wait for a GPU if the tensors were there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READING:
            raise HostSync(f"aten::{name} reads a tensor")
        if name == "repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], Tensor):
            raise HostSync("aten::repeat_interleave without output_size counts on the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and self._counts(name, *args):
            raise HostSync(f"aten::{name} with a boolean index counts its elements")
        if name == "_to_copy" and not kwargs.get("non_blocking"):
            self._refuse_copy(args[0].device, kwargs.get("device") or args[0].device)
        if name == "copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
            self._refuse_copy(args[1].device, args[0].device)
        return self._run(func, args, kwargs)

    def _run(self, func, args, kwargs):
        return func(*args, **kwargs)

    @staticmethod
    def _counts(name: str, x: Tensor, indices, values: Tensor | None = None, *_) -> bool:
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # A single value put at a mask is a masked_fill_, which counts nothing.
        return bool(masks) and not (name != "index" and values.numel() == 1 and len(indices) == 1)

    @staticmethod
    def _refuse_copy(source: torch.device, target: torch.device) -> None:
        if torch.device(source).type != torch.device(target).type:
            raise HostSync(f"a blocking copy from {source} to {target}")


@dataclass
class PretendedGpu(NoHostSync):
    """What a call did: kernel launches by name, and bytes allocated. Views and freed tensors count once and no more."""

    launches: list[str] = field(default_factory=list)
    bytes: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._storages: dict[int, int] = {}

    def _run(self, func, args, kwargs):
        if func in (torch.ops.aten.addmm.dtype_out, torch.ops.aten.mm.dtype_out):
            result = _product_into(func, args, kwargs)  # torch has no fake of the former
        else:
            if func in (torch.ops.aten.addmm.out, torch.ops.aten.mm.out):  # whose fakes take any dtypes, unlike CUDA's
                dtypes = {x.dtype for x in (*args, kwargs["out"]) if isinstance(x, Tensor)}
                assert len(dtypes) == 1, "a product into another dtype needs out_dtype="
            result = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._storages.setdefault(tensor.untyped_storage()._cdata, 0)  # inputs are not of the call
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.bytes -= self._storages.pop(key, 0)


def _product_into(func, args, kwargs) -> Tensor:
    """What torch's CUDA code demands of a product into an fp32 `out`."""
    *total, a, b, dtype = args
    out = kwargs["out"]
    shape = a.shape[0], b.shape[1]
    assert a.dim() == b.dim() == 2
    assert a.shape[1] == b.shape[0]
    assert a.dtype == b.dtype
    assert dtype == out.dtype == torch.float32
    assert tuple(out.shape) == shape
    assert all(x is out for x in total), "another total than `out` would be copied"
    assert out.is_contiguous(), "strides that the library does not take would cost a copy"
    return out


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Record of what happens inside to tensors on "meta", which dispatch takes for an sm_90."""
    from triton.runtime.jit import JITFunction

    from lumos_kernels import dispatch, tensors

    record = PretendedGpu()

    def launch(self, *args, grid, warmup, **kwargs):
        assert all(isinstance(size, int) for size in grid)
        for value in tree_leaves(args):
            assert not isinstance(value, Tensor) or value.device.type == "meta", "a kernel got a tensor of the host"
        record.launches.append(self.fn.__name__)

    def problem(tensor: Tensor, head_dim: int | None = None) -> dispatch.Problem:
        assert tensor.device.type == "meta"
        return dispatch.Problem("cuda", tensor.dtype, head_dim, "sm_90")

    def no_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    with (
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(tensors, "device_guard", no_guard),
        mock.patch.object(dispatch.Problem, "of", problem),
        record,
    ):
        yield record
