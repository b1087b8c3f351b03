"""One decorator that puts a Python function under torch.library: schema, CPU and CUDA kernels, fake."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "lumos_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the CPU and CUDA kernel of `schema`, and `fake` for tracing.

    Schema, kernel and fake apart (instead of torch.library.custom_op) because that is three times cheaper a call.
    """

    def register(kernel: Callable) -> Callable:
        # The kernel gets the strides that eager would give it, also under inductor.
        _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        name = schema.split("(", 1)[0]
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, _without_autocast(kernel), key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return kernel

    return register


def _without_autocast(kernel: Callable) -> Callable:
    """Runs an op's kernel outside autocast, which would run the kernel's own matrix products in low precision."""

    @functools.wraps(kernel)
    def call(tensor: Tensor, *args):
        if not torch.is_autocast_enabled(tensor.device.type):
            return kernel(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return kernel(tensor, *args)

    return call
