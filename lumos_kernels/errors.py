"""Named errors for shapes, dtypes and devices at the public edge. Implementations trust what passed here.

Every function raises a ValueError that names the argument, says what it was and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


class NotFiniteError(ValueError):
    """A computation met NaN or infinity where it has no result. row: the first row concerned."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without its module: 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def describe(tensor: object) -> str:
    """Return 'bfloat16 [128, 8, 64] on cpu', or the type of what is no tensor, for error messages."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"


def require_shape(name: str, tensor: Tensor, dims: str, **sizes: int) -> None:
    """Raise ValueError unless `tensor` has the shape that `dims` names, e.g. "T, H, D".

    sizes: the sizes that are known by name, e.g. T=128. A number in `dims` stands for itself; a name that is not in
        sizes matches any size.
    """
    names = dims.split(", ")
    shape = tensor.shape if isinstance(tensor, Tensor) else None
    if shape is not None and len(names) == len(shape):
        for dim, have in zip(names, shape, strict=True):
            if have != (int(dim) if dim.isdigit() else sizes.get(dim, have)):
                break
        else:
            return
    known = ", ".join(f"{dim} = {sizes[dim]}" for dim in dict.fromkeys(names) if dim in sizes)
    where = f" with {known}" if known else ""
    kind = "" if isinstance(tensor, Tensor) else "a tensor "
    raise ValueError(f"{name} must be {kind}[{dims}]{where}; got {describe(tensor)}")


def require_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless the tensor's dtype is one of those allowed."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(dtype_name, allowed))}; got {describe(tensor)}")


def require_same(name: str, tensor: Tensor, other_name: str, other: Tensor, dtypes: bool = True) -> None:
    """Raise ValueError unless both tensors share a device and, unless dtypes is False, a dtype."""
    if tensor.device != other.device or (dtypes and tensor.dtype != other.dtype):
        what = "device and dtype" if dtypes else "device"
        raise ValueError(f"{name} must have the {what} of {other_name} ({describe(other)}); got {describe(tensor)}")


def require_rope_head_dim(head_dim: int) -> None:
    """Raise ValueError unless both channels of every rotation pair share an axis of Lumos-1's map."""
    if head_dim % 32:
        raise ValueError(
            f"head_dim must be a multiple of 32, so that both channels of a rotation pair share an axis; got {head_dim}"
        )


def is_number(value: object) -> bool:
    """Return whether `value` converts to a float, as numbers, those of numpy and tensors of one element do."""
    return torch.compiler.is_compiling() or hasattr(value, "__float__")  # dynamo cannot ask a symbolic number


def require_number(name: str, value: float, allowed: str, above: float = -math.inf) -> None:
    """Raise ValueError unless `value` is a finite number > above. allowed: those numbers in words."""
    if not is_number(value) or not above < value < math.inf:
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def require_classes(classes: tuple[int, int], weight: Tensor) -> None:
    """Raise ValueError unless classes = (first, last) names rows first .. last - 1 of `weight`, at least one."""
    pair = isinstance(classes, Sequence) and len(classes) == 2 and all(hasattr(end, "__index__") for end in classes)
    if not pair or not 0 <= classes[0] < classes[1] <= weight.shape[0]:
        raise ValueError(f"classes must satisfy 0 <= first < last <= {weight.shape[0]} (rows of weight); got {classes}")
