"""Decorators: `define` puts a function under torch.library, `once_differentiable` guards the backward of an op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

NAMESPACE = "lumos_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Backward = Callable[..., "tuple[Tensor | None, ...]"]


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


def once_differentiable(op: str) -> Callable[[Backward], Backward]:
    """Return a decorator of an autograd.Function's backward whose gradients must not be differentiated again.

    Under create_graph=True the gradients raise a RuntimeError that names `op` when a second derivative reaches them.
    torch's decorator of this name looks at the incoming gradients alone. Where these are constants, as that of a loss
    is, it drops the second derivatives by the saved inputs.
    """
    message = (
        f"{op} has no second derivatives: its gradients, taken with create_graph=True, cannot be differentiated again. "
        "Compute a loss of gradients with eager PyTorch code."
    )

    def refusing(gradient: Tensor) -> Tensor:
        node: Any = torch._C._functions.DelayedError(message.encode(), 1)
        alias: Tensor = node(
            gradient.detach().requires_grad_()
        )  # the node is recorded only for what requires a gradient
        return alias

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def call(*args: Any) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():  # create_graph=False, and also where torch.compile traces backward
                return backward(*args)
            with torch.no_grad():
                gradients = backward(*args)
            return tuple(None if x is None else refusing(x) for x in gradients)

        return call

    return decorate


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that runs outside autocast, which would run its matrix products in low precision."""

    @functools.wraps(kernel)
    def call(tensor: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(tensor.device.type):
            return kernel(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return kernel(tensor, *args)

    return call
