"""Rivals of frame_attention that run on a GPU: FlexAttention, cuDNN, flash-attn. Signatures read in torch 2.11 to 2.13,
flash-attn 2.8 and flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import formulas
from bench.formulas import Work
from bench.registry import Case, Inputs


def heads_first(x_THD: Tensor) -> Tensor:
    """[T, H, D] -> [1, H, T, D], a view."""
    return x_THD.transpose(0, 1)[None]


def flex_prepare(compiled: bool = True, backend: str | None = None) -> Callable[[Inputs], Inputs]:
    """A block mask made once and FlexAttention compiled for the shape, as a training loop would keep them.

    backend: a kernel to ask for, "FLASH" (FlashAttention-4); None leaves the choice to torch.
    """

    def prepare(inputs: Inputs) -> Inputs:
        attention, mask = _flex(inputs, compiled)
        options: dict[str, Any] = {"block_mask": mask, "enable_gqa": True}
        if backend:
            options["kernel_options"] = {"BACKEND": backend}
        kept = {**inputs.args, "flex_attention": attention, "options": options}
        return Inputs(kept, inputs.leaves, inputs.upstream)

    return prepare


_LAST: dict[tuple, tuple] = {}  # the last shape's function and mask: a case prepares them once to check, once to time


def _flex(inputs: Inputs, compiled: bool) -> tuple[Callable[..., Tensor], Any]:
    limits, q = inputs.limits, inputs.q
    key = (*q.shape, inputs.k.shape, q.dtype, q.device, limits.visible_pairs(), bool(inputs.leaves), compiled)
    if key not in _LAST:

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= limits.kv_start[query]) & (key < limits.kv_end[query])

        sizes = limits.num_queries, limits.num_keys
        mask = create_block_mask(visible, None, None, *sizes, device=q.device, _compile=compiled)
        attention = flex_attention
        if compiled:
            torch._dynamo.reset()  # one graph a shape, whatever was compiled before: never the limit of recompilations
            attention = torch.compile(flex_attention, dynamic=False)
        _LAST.clear()
        _LAST[key] = attention, mask
    return _LAST[key]


def flex(inputs: Inputs) -> tuple[Tensor, ...]:
    """Compiled FlexAttention with its block mask."""
    q, k, v = (heads_first(x) for x in (inputs.q, inputs.k, inputs.v))
    return (inputs.flex_attention(q, k, v, **inputs.options)[0].transpose(0, 1),)


def causal_work(case: Case) -> Work:
    """What plain causal attention of as many tokens computes: the equal of ours by the rate, not by the time."""
    pairs = case.video.tokens * (case.video.tokens + 1) // 2
    return formulas.attention_flops(pairs, case.model.heads, case.model.head_dim, case.backward)


def cudnn_causal(inputs: Inputs) -> tuple[Tensor, ...]:
    """cuDNN's causal attention over the same tokens: another mask of nearly as many pairs, so compare rates."""
    q, k, v = (heads_first(x) for x in (inputs.q, inputs.k, inputs.v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return (o[0].transpose(0, 1),)


def _flash_attn_func(version: int) -> Callable[..., Tensor]:
    if version == 4:
        from flash_attn.cute import flash_attn_func

        return lambda *tensors, causal: flash_attn_func(*tensors, causal=causal)[0]  # returns (o, lse)
    from flash_attn import flash_attn_func

    return lambda *tensors, causal: flash_attn_func(*tensors, causal=causal)


def flash_causal(version: int) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """flash-attn's causal attention over the same tokens: compare rates."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        return (_flash_attn_func(version)(inputs.q[None], inputs.k[None], inputs.v[None], causal=True)[0],)

    return run


def flash_per_frame(version: int) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """flash-attn once a frame: its queries against the keys up to its end. Text goes through causally: flash-attn
    aligns a causal mask to the last key, as a run of text after frames needs it.
    """

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        attention = _flash_attn_func(version)
        parts = [
            attention(
                inputs.q[None, call.rows],
                inputs.k[None, call.keys],
                inputs.v[None, call.keys],
                causal=call.mask is not None,
            )
            for call in inputs.calls
        ]
        return (torch.cat(parts, dim=1)[0],)

    return run
