"""A decorator that puts a Python function under torch.library: schema, CPU and CUDA kernels, fake."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

NAMESPACE = "lumos_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Kernel], Kernel]:
    """Register the decorated function as the CPU and CUDA kernel of `schema`, and `fake` for tracing.

    Schema, kernel and fake are registered one by one because torch.library.custom_op makes a call three times dearer.
    """

    def register(kernel: Kernel) -> Kernel:
        # The kernel gets the strides that eager would give it, also under inductor.
        _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        name = schema.split("(", 1)[0]
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, _without_autocast(kernel), key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return kernel

    return register


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that runs outside autocast, which would run its matrix products in low precision."""

    @functools.wraps(kernel)
    def call(tensor: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(tensor.device.type):
            return kernel(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return kernel(tensor, *args)

    return call
