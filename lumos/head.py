"""lm_head as the ops use it: the loss and the draw read its weight, and whatever wraps the layer still counts.

The ops take the weight instead of logits. Reading `lm_head.weight` from outside would pass by everything that acts when
the layer is called: FSDP gathers the weight there, offloading loads it, weight_norm computes it, an adapter adds its
part. So the layer itself lends its weight, inside forward, to the function that wants it. A layer that cannot lend (a
quantised one, another kind of adapter) is called for its logits.

LoRA needs no merged weight, which bf16 would round: with h the hidden states,
    h W^T + s (A h) B^T = [h, s A h] [W, B]^T
is one product with r columns more, and dropout in front of A stays where it is.

Legend of the shape suffixes: as in lumos.model. A weight has the rows of the ids `first` and on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumos_kernels.token_ids import NEW_LINE
from lumos_kernels.tube_masked_loss import TubeLossStats
from lumos_kernels.tube_masked_loss.target_rows import IGNORED, target_rows

logger = logging.getLogger("lumos")

R = TypeVar("R")
Use = Callable[[Tensor, Tensor], R]  # hidden [..., C] and weight [V, C]
# Wrappers that hand all arguments of a call on to the module inside: FSDP1, torch.compile, activation checkpointing.
PASSING = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
COLUMNS = 16  # the columns of adapters are filled up to a multiple, so that rows of the weight stay aligned
IDENTITY_ROWS = 256


class LMHead(nn.Linear):
    """The output projection: logits [..., V] of hidden states [..., C], or what a function makes of its weight.

    use: is called with the hidden states and the weight [V, C] in place of the product. It runs inside forward, where
        hooks have made the weight ready.
    """

    def forward(self, hidden: Tensor, use: Use[Any] | None = None) -> Any:
        return lend(self.weight, hidden, use)


def lend(weight: Tensor, hidden: Tensor, use: Use[R]) -> R:
    """Return use(hidden, weight), or without use the logits. ValueError for a weight that is not whole on this rank."""
    if use is None:
        return F.linear(hidden, weight)
    if hasattr(weight, "placements"):
        raise ValueError(
            "lm_head.weight must be whole in its forward, as FSDP makes it; got a DTensor with placements "
            f"{weight.placements} (tensor parallelism of lm_head is not supported)"
        )
    return use(hidden, weight)


def class_loss(
    op: Callable[..., tuple[Tensor, TubeLossStats]],
    head: nn.Module,
    hidden: Tensor,
    labels_T: Tensor,
    *,
    classes: tuple[int, int],
    **options: Any,
) -> tuple[Tensor, TubeLossStats]:
    """Return the loss of hidden states [..., C], T in all, with its statistics.

    op: tube_masked_loss. options: its own, except return_stats.

    A head that cannot lend its weight is called for the logits of the target rows, over the whole vocabulary. That is
    plain PyTorch: ValueError where impl names another implementation than "reference".
    """
    lender = _lender(head)
    if (lender is None or lender.adapters) and not torch.compiler.is_compiling():
        target_rows(labels_T, options.get("rows"), *classes)  # refuses what the op would, of labels not shifted
    if lender is None:
        impl, _ = options.pop("impl", "auto"), options.pop("rows", None)
        if impl not in ("auto", "reference"):
            raise ValueError(
                f"impl of tube_masked_loss must be auto or reference for an lm_head whose weight cannot be read, "
                f"{_name(head)}; got {impl!r}"
            )
        _tell(_name(head))
        return _loss_of_logits(head, hidden.flatten(0, -2), labels_T, classes, **options)

    def use(hidden: Tensor, weight: Tensor, first: int) -> tuple[Tensor, TubeLossStats]:
        labels = labels_T
        if first:
            ignored = (labels_T == IGNORED) | (labels_T == NEW_LINE)
            labels = torch.where(ignored, IGNORED, labels_T - first)
        shifted = classes[0] - first, classes[1] - first
        return op(hidden.flatten(0, -2), weight, labels, classes=shifted, return_stats=True, **options)

    return lender(hidden, classes, use)


def class_logits(head: nn.Module, hidden: Tensor, classes: tuple[int, int]) -> Tensor:
    """Return the logits [..., hi - lo] of the ids lo .. hi - 1 from hidden states [..., C]."""
    lo, hi = classes
    lender = _lender(head)
    if lender is None:
        return head(hidden)[..., lo:hi]
    return lender(hidden, classes, lambda hidden, weight, first: F.linear(hidden, weight[lo - first : hi - first]))


@torch.no_grad()
def sampling_weight(model: nn.Module) -> tuple[Tensor, int, torch.dtype]:
    """Return a weight [V', C] that gives the logits of config.classes, the id of its first row, and the hidden dtype.

    model: a Lumos whose dropout is off. The weight of a plain lm_head is its own. Adapters and quantised layers are
    merged: lm_head is called with the rows of the identity. The dtype is that of the embedded tokens, which adapters
    and quantised layers do not tell by their weight.

    Raises ValueError for an lm_head that is not linear as far as its type tells, and for one with a bias.
    """
    head, (lo, hi), width = model.lm_head, model.config.classes, model.config.hidden_size
    device = next(model.parameters()).device
    row_1C = model.model.embed_tokens(torch.zeros(1, dtype=torch.int64, device=device))
    lender = _lender(head)
    stays = not _has_hooks(head) and "_hf_hook" not in head.__dict__  # hooks may take the weight away after forward
    if lender is not None and not lender.adapters and stays:
        return *lender(row_1C, (lo, hi), lambda _, weight, first: (weight, first)), row_1C.dtype
    linear = isinstance(head, nn.Linear) or {"base_layer", "original_module"} & head._modules.keys()
    if not linear:
        raise ValueError(f"lm_head must be a linear layer, or one with peft's adapters, to sample; got {_name(head)}")
    if head(torch.zeros_like(row_1C))[..., lo:hi].any():
        raise ValueError(f"lm_head must have no bias to sample; got {_name(head)} with one")
    weight = row_1C.new_empty(hi - lo, width)
    for rows in torch.arange(width, device=device).split(IDENTITY_ROWS):
        weight[:, rows] = head(F.one_hot(rows, width).to(row_1C.dtype))[:, lo:hi].T.to(weight.dtype)
    return weight, lo, row_1C.dtype


class _Lender:
    """Calls a function with hidden states, a weight and the id of the weight's first row.

    call: lets the layer call a Use. adapters: (A, B, dropout, scaling) of the LoRA adapters beside it.
    """

    def __init__(self, call: Callable[[Tensor, Use[Any]], Any], adapters: list[tuple[Any, ...]]) -> None:
        self.call, self.adapters = call, adapters

    def __call__(self, hidden: Tensor, classes: tuple[int, int], use: Callable[[Tensor, Tensor, int], R]) -> R:
        if not self.adapters:
            return self.call(hidden, lambda hidden, weight: use(hidden, weight, 0))
        lo, hi = classes

        def extended(hidden: Tensor, weight: Tensor) -> R:
            inputs, columns = [hidden], [weight[lo:hi]]
            for down, up, dropout, scaling in self.adapters:
                x = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(down.weight.dtype)
                inputs.append((down(dropout(x)) * scaling).to(hidden.dtype))
                columns.append(up.weight[lo:hi].to(weight.dtype))
            padding = -sum(x.shape[-1] for x in inputs[1:]) % COLUMNS
            wide, rows = torch.cat(inputs, -1), torch.cat(columns, 1)
            return use(F.pad(wide, (0, padding)), F.pad(rows, (0, padding)), lo)

        return self.call(hidden, extended)


def _lender(head: nn.Module) -> _Lender | None:
    """The way to the weight of a head, None where only a call of the head gives what it computes."""
    adapters: list[tuple[Any, ...]] | None = []
    if "base_layer" in head._modules:
        adapters = _lora_adapters(head)
        if adapters is None:
            return None
        head = head.base_layer
    inner = head
    while (inside := _passed_to(inner)) is not None:
        inner = inside
    if lends(inner):
        return _Lender(head, adapters)
    plain = inner is head and type(inner) is nn.Linear and "forward" not in inner.__dict__
    if plain and inner.bias is None and not _has_hooks(inner) and type(inner.weight) is nn.Parameter:
        return _Lender(lambda hidden, use: lend(inner.weight, hidden, use), adapters)
    return None


def head_layers(head: nn.Module) -> list[nn.Module]:
    """Return the layers inside wrappers and peft's adapters: one, or several where peft keeps trained copies."""
    children = head._modules
    found = [children[name] for name in ("base_layer", "original_module", "module", *PASSING) if name in children]
    found += children.get("modules_to_save", {}).values()
    return [layer for inner in found for layer in head_layers(inner)] or [head]


def lends(layer: nn.Module) -> bool:
    """Return whether forward of a layer takes `use`: that of an LMHead does, and of a patched official layer."""
    replaced, patched = layer.__dict__.get("forward"), "_lumos_forward" in layer.__dict__
    if replaced is not None and "_hf_hook" not in layer.__dict__:  # accelerate's hooks pass their arguments on
        return patched and isinstance(replaced, partial)
    return (patched or type(layer).forward is LMHead.forward) and not is_packed(layer)


def is_packed(layer: nn.Module) -> bool:
    """Return whether the weight is a tensor subclass, such as torchao's quantised ones, which ops cannot read."""
    weight = getattr(layer, "weight", None)
    return hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "placements")  # FSDP gathers a DTensor


def _passed_to(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper hands a call on to, with all arguments; None for a module that is no such wrapper."""
    children = module._modules
    if "original_module" in children and "modules_to_save" in children:  # peft's modules_to_save
        active = module.active_adapters
        return module.original_module if module.disable_adapters or not active else module.modules_to_save[active[0]]
    return next((children[name] for name in PASSING if name in children), None)


def _lora_adapters(layer: nn.Module) -> list[tuple[Any, ...]] | None:
    """(A, B, dropout, scaling) of the active adapters of a peft layer, None where they are no plain LoRA.

    Hooks on the layer or its adapters (FSDP's of a group of their own, peft's of a mixed batch) need a call too.
    """
    if _has_hooks(layer) or "forward" in layer.__dict__ or (layer.disable_adapters and layer.merged):
        return None
    if layer.disable_adapters or layer.merged:
        return []
    if "lora_A" not in layer._modules or "lora_B" not in layer._modules:
        return None
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        parts = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        variant = name in getattr(layer, "lora_variant", ())
        if variant or any(type(part) is not nn.Linear for part in parts[:2]) or any(map(_has_hooks, parts)):
            return None
        if parts[1].bias is not None:
            return None
        found.append((*parts, layer.scaling[name]))
    return found


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks)


def _loss_of_logits(
    head: nn.Module,
    hidden_TC: Tensor,
    labels_T: Tensor,
    classes: tuple[int, int],
    reduction: str = "mean",
    z_loss_weight: float = 0.0,
    token_weight: Tensor | None = None,
) -> tuple[Tensor, TubeLossStats]:
    """The same loss from logits of the target rows. One call of the head, whatever the rank's number of rows."""
    lo, hi = classes
    target_T = (labels_T >= lo) & (labels_T < hi)
    rows = target_T.nonzero()[:, 0]
    logits = head(hidden_TC[rows])
    if logits.dim() != 2 or logits.shape[1] < hi:
        raise ValueError(f"lm_head must give logits [N, V] with V >= {hi}, got {[*logits.shape]} from {_name(head)}")
    logits = logits[:, lo:hi].to(torch.promote_types(logits.dtype, torch.float32))
    at_target, lse = logits.gather(1, labels_T[rows, None] - lo)[:, 0], logits.logsumexp(-1)
    nll_T, lse_T = (lse.new_zeros(len(labels_T)).index_put((rows,), x) for x in (lse - at_target, lse))
    correct_T = torch.zeros_like(target_T).index_put((rows,), at_target >= logits.amax(-1))
    loss = nll_T if token_weight is None else torch.where(target_T, nll_T * token_weight, 0)
    loss = loss + z_loss_weight * lse_T.square() if z_loss_weight else loss
    if reduction != "none":
        nll_T, lse_T = nll_T.detach(), lse_T.detach()
        loss = loss.sum() / max(len(rows), 1) if reduction == "mean" else loss.sum()
    return loss, TubeLossStats(nll_T, lse_T, correct_T)


@cache
def _tell(kind: str) -> None:
    logger.warning(
        "lm_head is a %s, whose weight cannot be read: the loss goes by logits of its target rows over the whole "
        "vocabulary, which costs time and memory",
        kind,
    )


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
