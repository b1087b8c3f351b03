"""FLOPs of the ops' matrix products, a multiply and an add being two, and their formulas for torch's FlopCounterMode.

The count is that of useful work: pairs that the mask hides, rows that are no targets and classes outside the slice
cost nothing. mm_rope and frame_layout have no matrix products.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .layout import RowLimits

_COUNTER = "torch.utils.flop_counter"


def attention_flops(visible_pairs: int, heads: int, head_dim: int, *, forward: bool = True, backward: bool) -> int:
    """Return the FLOPs of 2 products forward and 5 backward, which computes the scores again.

    This is the count of the FlashAttention papers: 4 D a pair forward, 10 D backward.
    """
    return 2 * (2 * forward + 5 * backward) * visible_pairs * heads * head_dim


def loss_flops(rows: int, hidden: int, classes: int, *, products: int) -> int:
    """Return the FLOPs of `products` products of target rows and class slice: logits, and one for each gradient."""
    return 2 * products * rows * hidden * classes


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _visible_pairs(limits: Sequence[Tensor]) -> int:
    """Return the pairs of (query, key) that see each other; without values to read, all pairs."""
    rows = RowLimits(*limits)
    return rows.visible_pairs() if _has_values(rows.kv_start) else rows.num_queries * rows.num_keys


def _count_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    return attention_flops(_visible_pairs(rest[:4]), q.shape[1], q.shape[2], backward=False)


def _count_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any
) -> int:
    return attention_flops(_visible_pairs(rest[:4]), q.shape[1], q.shape[2], forward=False, backward=True)


def _count_loss(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, *rest: Any, **_: Any) -> int:
    first, last, need_hidden, need_weight = rest[2:6]
    if rows is not None:
        count = rows.shape[0]
    elif _has_values(labels):
        count = int(((labels >= first) & (labels < last)).sum())
    else:
        count = labels.shape[0]
    return loss_flops(count, hidden.shape[1], last - first, products=1 + need_hidden + need_weight)


def _count_loss_backward(grad_nll: Tensor, grad_lse: Tensor, *arguments: Any, **_: Any) -> int:
    hidden, weight, labels, rows, _lse, *options = arguments
    return _count_loss(hidden, weight, labels, rows, None, 0.0, *options)


def _count_sample(
    hidden_cond: Tensor, hidden_uncond: Tensor | None, weight: Tensor, row_keys: Tensor | None, *rest: Any, **_: Any
) -> int:
    first, last = rest[2:4]
    rows, hidden = hidden_cond.shape
    return loss_flops(rows, hidden, last - first, products=1 if hidden_uncond is None else 2)


_FORMULAS: dict[str, Callable[..., int]] = {
    "frame_attention": _count_attention,
    "frame_attention_backward": _count_attention_backward,
    "tube_masked_loss": _count_loss,
    "tube_masked_loss_backward": _count_loss_backward,
    "masked_sample": _count_sample,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.lumos_kernels, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


class _OnImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the formulas when torch's counter is imported, and then leaves the search path.

    The counter imports triton where that is installed. So importing it here would make `import lumos_kernels` slower,
    and impossible where the installed triton is broken.
    """

    loader: importlib.abc.Loader

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        with contextlib.suppress(ValueError):  # where another thread was first
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register(module)


def register_with_torch() -> None:
    """Let torch.utils.flop_counter.FlopCounterMode count the ops, whether it is imported before or after."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
