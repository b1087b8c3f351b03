"""Rivals of frame_attention that run on a GPU: FlexAttention, cuDNN, flash-attn. Signatures read in torch 2.11 to 2.13,
flash-attn 2.8, flash-attn-4 4.0.0b36 and nvidia-cudnn-frontend 1.32.0.

Those that take [B, T, H, D] get x[None] and give back o.squeeze(0): both are views, backward too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import formulas
from bench.formulas import Work
from bench.registry import Case, Inputs
from lumos_kernels import RowLimits

# cudnn.flex_attention is experimental, so another minor version may have other signatures.
CUDNN_FRONTEND, CUTLASS_DSL_FROM = (1, 32), (4, 8)
CUDNN_FLEX_ARCHITECTURES = ((9, 0), (10, 0), (10, 3))


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
        q, k, v = (x[None] for x in (inputs.q, inputs.k, inputs.v))
        return (_flash_attn_func(version)(q, k, v, causal=True).squeeze(0),)

    return run


def flash_per_frame(version: int) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """flash-attn once a frame, without a mask: the frame's queries against the keys up to its end, a rectangle. Text
    goes through causally: flash-attn aligns a causal mask to the last key, as a run of text after frames needs it.
    """

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        attention = _flash_attn_func(version)
        rows = [call.rows.stop - call.rows.start for call in inputs.calls]  # the calls cover the rows in order
        parts = [
            attention(q, inputs.k[None, call.keys], inputs.v[None, call.keys], causal=call.mask is not None)
            for q, call in zip(inputs.q[None].split(rows, dim=1), inputs.calls, strict=True)
        ]
        return (torch.cat(parts, dim=1).squeeze(0),)

    return run


def row_intervals(limits: RowLimits) -> Tensor:
    """Return int32 [1, 1 or 3, Tq], the endpoints F of cudnn.flex_attention's mask for all heads.

    A query sees the keys [0, F0) and [F1, F2). Where every query starts at key 0, as in one document, F0 is the end of
    its range; otherwise the first interval is empty and the second is the range. Reads the limits: a host sync.
    """
    if not limits.kv_start.any():
        return limits.kv_end[None, None].contiguous()
    return torch.stack([torch.zeros_like(limits.kv_start), limits.kv_start, limits.kv_end])[None]


def cudnn_flex_prepare(inputs: Inputs) -> Inputs:
    """Return the inputs with cudnn.flex_attention's plan of the mask, made once, as a training loop would keep it."""
    from cudnn.flex_attention import create_mask_plan

    q, k, v = (x.detach()[None] for x in (inputs.q, inputs.k, inputs.v))  # the plan takes their shapes and dtype
    plan = create_mask_plan(row_intervals(inputs.limits), q, k, v, build_backward=bool(inputs.leaves))
    return Inputs({**inputs.args, "mask_plan": plan}, inputs.leaves, inputs.upstream)


def cudnn_flex(inputs: Inputs) -> tuple[Tensor, ...]:
    """cudnn.flex_attention with its mask plan. Its backward is the default one, which sums in no fixed order."""
    from cudnn.flex_attention import flex_attn_func

    q, k, v = (x[None] for x in (inputs.q, inputs.k, inputs.v))
    return (flex_attn_func(q, k, v, mask_plan=inputs.mask_plan).squeeze(0),)


def cudnn_flex_refusal() -> str | None:
    """Return why cudnn.flex_attention cannot run on this machine; None where it can.

    It is written in CuTe DSL and calls no cuDNN library, so the version of torch's cuDNN does not matter.
    """
    frontend, dsl = (_release(name) for name in ("nvidia-cudnn-frontend", "nvidia-cutlass-dsl"))
    if frontend != CUDNN_FRONTEND:
        return f"nvidia-cudnn-frontend is {_text(frontend)}, the calls are those of {_text(CUDNN_FRONTEND)}"
    if dsl is None or dsl < CUTLASS_DSL_FROM:
        return f"nvidia-cutlass-dsl is {_text(dsl)}, it needs {_text(CUTLASS_DSL_FROM)} or later"
    wanted = "it runs on SM90, SM100 and SM103"
    if not torch.cuda.is_available():
        return f"there is no GPU, {wanted}"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) in CUDNN_FLEX_ARCHITECTURES else f"the GPU is SM{major}{minor}, {wanted}"


def _release(package: str) -> tuple[int, ...] | None:
    """Return the major and minor version of an installed package; None where its metadata is absent."""
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:2])
    except metadata.PackageNotFoundError:
        return None


def _text(release: tuple[int, ...] | None) -> str:
    return "not installed" if release is None else ".".join(map(str, release))
