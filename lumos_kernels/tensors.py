"""Facts about tensors that the implementations share: strides, the width of offsets, the current device."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import limits

INT32_MAX = 2**31 - 1


def unit_last_stride(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its last dimension is dense, else a contiguous copy.

    Upstream gradients come with any strides: autograd delivers them through expand, transpose and cat.
    """
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def needs_int64_offsets(*tensors: Tensor) -> bool:
    """Return whether an element of one of the tensors lies 2^31 or more elements from the first one."""
    return limits.current().int64 or any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True)) > INT32_MAX
        for t in tensors
        if t.numel()
    )


def host_may_read(*tensors: Tensor) -> bool:
    """Return whether the host may look at the values: plain tensors on the CPU, outside torch.compile and make_fx.

    A tensor of a subclass, such as FakeTensor, may have no values, and vmap hides those of its tensors. Those on a GPU
    would make the host wait.
    """
    if torch.compiler.is_compiling():  # asked first: Dynamo cannot trace what follows
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:  # make_fx
        return False
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(type(t) is Tensor and t.device.type == "cpu" and not is_wrapped(t) for t in tensors)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one while kernels launch: Triton and CUDA launch on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
