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
Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


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


def once_differentiable(op: str) -> Callable[[Backward], Callable[..., Gradients]]:
    """Return a decorator of an autograd.Function's backward whose gradients must not be differentiated again.

    The decorated function is called as backward(ctx, saved, *gradients) with saved = ctx.saved_tensors. Under
    create_graph=True its results raise a RuntimeError that names `op` when a second derivative reaches them.

    torch's decorator of this name looks at the incoming gradients alone. Where these are constants, as that of a loss
    is, it drops the second derivatives by the saved inputs.
    """
    message = (
        f"{op} has no second derivatives: its gradients, taken with create_graph=True, cannot be differentiated again. "
        "Compute a loss of gradients with eager PyTorch code."
    )

    def refusing(gradients: Gradients, causes: list[Tensor]) -> Gradients:
        # The node hangs on the tensors that the gradients depend on: autograd.grad runs only what leads to its inputs.
        present = [x.detach().requires_grad_() for x in gradients if x is not None]
        node: Any = torch._C._functions.DelayedError(message.encode(), len(present) + len(causes))
        marked = iter(node(*present, *causes)) if present and causes else iter(present)
        return tuple(None if x is None else next(marked) for x in gradients)

    def decorate(backward: Backward) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def call(ctx: Any, *incoming: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors  # once: checkpointing refuses to unpack them twice
            if not torch.is_grad_enabled():  # create_graph=False, and also where torch.compile traces backward
                return backward(ctx, saved, *incoming)
            with torch.no_grad():
                gradients = backward(ctx, saved, *incoming)
            return refusing(gradients, [x for x in (*saved, *incoming) if x is not None and x.requires_grad])

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
