"""Named errors for shapes, dtypes and devices at the public edge. Implementations trust what passed here."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INT32_MAX = 2**31 - 1


def describe(tensor: Tensor) -> str:
    """'bfloat16 [128, 8, 64] on cpu', for error messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def shape(name: str, tensor: Tensor, dims: str, **sizes: int) -> None:
    """Raises ValueError unless `tensor` has the shape named by `dims`, e.g. "T, H, D".

    sizes: the sizes already known by name, e.g. T=128; a number stands for itself, another name matches any size.
    """
    names = [dim.strip() for dim in dims.split(",")]
    sizes |= {dim: int(dim) for dim in names if dim.isdigit()}
    fits = tensor.dim() == len(names) and all(
        sizes.get(dim, have) == have for dim, have in zip(names, tensor.shape, strict=True)
    )
    if not fits:
        known = ", ".join(f"{dim} = {sizes[dim]}" for dim in dict.fromkeys(names) if dim in sizes and not dim.isdigit())
        where = f" with {known}" if known else ""
        raise ValueError(f"{name} must be [{dims}]{where}; got {describe(tensor)}")


def dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name} must be one of {names}; got {describe(tensor)}")


def same(name: str, tensor: Tensor, other_name: str, other: Tensor, dtypes: bool = True) -> None:
    """Raises ValueError unless both tensors share a device and, unless told otherwise, a dtype."""
    if tensor.device != other.device or (dtypes and tensor.dtype != other.dtype):
        what = "device and dtype" if dtypes else "device"
        raise ValueError(f"{name} must have the {what} of {other_name} ({describe(other)}); got {describe(tensor)}")


def rope_head_dim(head_dim: int) -> None:
    if head_dim % 32:
        raise ValueError(
            f"head_dim must be a multiple of 32, so that both channels of a rotation pair share an axis; got {head_dim}"
        )


def class_slice(classes: tuple[int, int], weight: Tensor) -> tuple[int, int]:
    """(first, last) of the class slice, rows first .. last - 1 of `weight`; ValueError if they do not exist."""
    first, last = classes
    if not 0 <= first < last <= weight.shape[0]:
        raise ValueError(f"classes must satisfy 0 <= first < last <= {weight.shape[0]} (rows of weight); got {classes}")
    return first, last


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a contiguous copy (awkward gradients)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def needs_int64_offsets(*tensors: Tensor) -> bool:
    """Whether an element of one of the tensors lies 2^31 or more elements from its first one."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True)) > INT32_MAX
        for t in tensors
        if t.numel()
    )


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU current while kernels launch: Triton and CUDA launch on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
