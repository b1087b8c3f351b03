"""frame_attention: against SDPA with the dense mask, one SDPA call a frame (the best a user can do today), and
flex_attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention

from bench import formulas, rivals_attention
from bench.formulas import Work
from bench.registry import CEILING, Case, Contestant, Inputs, OpBench, grid
from bench.shapes import (
    IMAGE_384P,
    M1B,
    M1B_GROUP,
    M1B_QUARTER,
    M3B,
    M3B_GROUP,
    M3B_QUARTER,
    SMOKE,
    SWEEP_256P,
    TINY,
    VIDEO_256P,
    VIDEO_256P_3,
    VIDEO_384P,
    VIDEO_SMALL,
)
from lumos_kernels import RowLimits, frame_attention

MASKED = -9.22e18  # what the official mask holds where nothing may be seen
FLASH_ATTN = ((2, "", "flash_attn.flash_attn_interface"), (4, "-4", "flash_attn.cute"))  # version, suffix, module
MATMUL_SIZE, GPU_MATMUL_SIZE = 2048, 8192


def build(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """q, k, v as after the q/k LayerNorm: unit variance."""
    generator = torch.Generator(device).manual_seed(0)
    model, tokens = case.model, case.video.tokens

    def draw(heads: int) -> Tensor:
        values = torch.randn(tokens, heads, model.head_dim, generator=generator, device=device)
        return values.to(case.dtype).to(dtype)

    q, k, v = draw(model.heads), draw(model.kv_heads), draw(model.kv_heads)
    args = {"q": q, "k": k, "v": v, "limits": case.video.layout.limits.to(device)}
    if not case.backward:
        return Inputs(args)
    return Inputs(args, tuple(leaf.requires_grad_() for leaf in (q, k, v)), (draw(model.heads),))


def ours(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    return (frame_attention(inputs.q, inputs.k, inputs.v, inputs.limits, impl=impl),)


def _with_mask(inputs: Inputs) -> Inputs:
    return Inputs({**inputs.args, "mask": inputs.limits.dense_mask()}, inputs.leaves, inputs.upstream)


def dense_mask(inputs: Inputs) -> tuple[Tensor, ...]:
    """SDPA with a bool mask [T, T] that was built before.

    On a GPU keys and values are repeated: to group heads under a mask, torch would keep all scores in memory.
    """
    group = inputs.q.shape[1] // inputs.k.shape[1] if inputs.q.is_cuda else 1
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (k, v))
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, enable_gqa=group == 1)[0].transpose(0, 1),)


def _with_official_mask(inputs: Inputs) -> Inputs:
    mask = torch.zeros(inputs.limits.num_queries, inputs.limits.num_keys, device=inputs.q.device)
    mask.masked_fill_(~inputs.limits.dense_mask(), MASKED)
    return Inputs({**inputs.args, "mask": mask}, inputs.leaves, inputs.upstream)


def official_style(inputs: Inputs) -> tuple[Tensor, ...]:
    """What every layer of the official model does: its fp32 mask cast, k and v repeated, SDPA."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask.to(q.dtype))
    return (o[0].transpose(0, 1),)


@dataclass(frozen=True)
class FrameCall:
    """Query rows that one SDPA call serves, and the keys they see. mask: None, "causal", or bool [rows, keys]."""

    rows: slice
    keys: slice
    mask: Tensor | str | None


def frame_calls(limits: RowLimits) -> list[FrameCall]:
    """The calls that cover the stream: one a frame, whose rows share their keys, and one causal call a run of text.

    Every row must see a key.
    """
    pairs = torch.stack([limits.kv_start, limits.kv_end], 1).cpu()
    shared, counts = torch.unique_consecutive(pairs, dim=0, return_counts=True)
    runs: list[list] = []  # first row, end row, first key, end key, is text
    row = 0
    for (first, end), count in zip(shared.tolist(), counts.tolist(), strict=True):
        if count == 1 and runs and runs[-1][4] and runs[-1][2:4] == [first, end - 1]:
            runs[-1][1], runs[-1][3] = row + 1, end
        else:
            runs.append([row, row + count, first, end, count == 1])
        row += count
    return [_call(limits, *run) for run in runs]


def _call(limits: RowLimits, row: int, end_row: int, first: int, end: int, text: bool) -> FrameCall:
    mask: Tensor | str | None = None
    if text and end_row - row > 1:
        square = end_row - row == end - first
        mask = "causal" if square else limits.dense_mask(row, end_row)[:, first:end]
    return FrameCall(slice(row, end_row), slice(first, end), mask)


def _with_calls(inputs: Inputs) -> Inputs:
    return Inputs({**inputs.args, "calls": frame_calls(inputs.limits)}, inputs.leaves, inputs.upstream)


def per_frame(inputs: Inputs) -> tuple[Tensor, ...]:
    """A loop of SDPA calls without a mask: text causally, then each frame's queries against the keys up to its end."""
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, call.rows],
            k[:, :, call.keys],
            v[:, :, call.keys],
            attn_mask=call.mask if isinstance(call.mask, Tensor) else None,
            is_causal=call.mask == "causal" if isinstance(call.mask, str) else False,
            enable_gqa=True,
        )
        for call in inputs.calls
    ]
    return (torch.cat(parts, dim=2)[0].transpose(0, 1),)


@functools.cache
def _compiled_flex():
    """Compiled for each shape, 20 seconds on a CPU: with dynamic ones torch 2.13 writes C++ that does not compile."""
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def _with_block_mask(inputs: Inputs) -> Inputs:
    limits = inputs.limits

    def visible(batch, head, query, key):
        return (key >= limits.kv_start[query]) & (key < limits.kv_end[query])

    sizes = limits.num_queries, limits.num_keys
    mask = flex_attention.create_block_mask(visible, None, None, *sizes, device=inputs.q.device.type)
    return Inputs({**inputs.args, "block_mask": mask}, inputs.leaves, inputs.upstream)


def flex(inputs: Inputs) -> tuple[Tensor, ...]:
    """torch.compile of flex_attention with a block mask that was built before."""
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    o = _compiled_flex()(q, k, v, block_mask=inputs.block_mask, enable_gqa=True)
    return (o[0].transpose(0, 1),)


def _has_flex(case: Case, device: str) -> bool:
    """torch's CPU code for it has no backward and starts at a block of 128 tokens. GPUs get a graph for each shape."""
    return device == "cpu" and not case.backward and case.video.tokens >= 128


def _with_matrices(inputs: Inputs) -> Inputs:
    size = GPU_MATMUL_SIZE if inputs.q.is_cuda else MATMUL_SIZE
    return Inputs(dict(zip("ab", torch.randn(2, size, size).to(inputs.q).detach(), strict=True)))


def matmul(inputs: Inputs) -> tuple[Tensor, ...]:
    """A square matmul, large enough for the device: what the machine's library reaches."""
    return (inputs.a @ inputs.b,)


def work(case: Case) -> Work:
    pairs = case.video.layout.limits.visible_pairs()
    return formulas.attention_flops(pairs, case.model.heads, case.model.head_dim, case.backward)


def _matmul(size: int, device: str) -> Contestant:
    return Contestant(
        "matmul",
        matmul,
        CEILING,
        prepare=_with_matrices,
        work=lambda case: Work(2 * size**3, "FLOP"),
        available=lambda case, where: where == device,
    )


def _on_gpu(case: Case, device: str) -> bool:
    return device == "cuda"


def _in_half_precision_on_gpu(case: Case, device: str) -> bool:
    return device == "cuda" and case.dtype != torch.float32


def _mask_bytes(case: Case) -> int:
    """SDPA on a mask may hold it in fp32, and the scores of one head besides."""
    return 10 * case.video.tokens**2


# The causal ones compute another mask of nearly as many pairs, so they are no rivals in time but ceilings by rate.
GPU_RIVALS = (
    Contestant(
        "flex_attention",
        rivals_attention.flex,
        prepare=rivals_attention.flex_prepare(),
        available=_on_gpu,
        jit=True,
    ),
    Contestant(
        "flex_attention FLASH",
        rivals_attention.flex,
        prepare=rivals_attention.flex_prepare(backend="FLASH"),
        available=_in_half_precision_on_gpu,
        requires=("flash_attn.cute",),
        jit=True,
    ),
    Contestant(
        "cudnn.flex_attention",
        rivals_attention.cudnn_flex,
        prepare=rivals_attention.cudnn_flex_prepare,
        available=_in_half_precision_on_gpu,
        requires=("cudnn", "cutlass", "tvm_ffi"),
        refusal=rivals_attention.cudnn_flex_refusal,
        jit=True,
    ),
    *(
        Contestant(
            f"flash-attn{suffix} per frame",
            rivals_attention.flash_per_frame(version),
            prepare=_with_calls,
            available=_in_half_precision_on_gpu,
            requires=(module,),
            jit=version == 4,
        )
        for version, suffix, module in FLASH_ATTN
    ),
    Contestant(
        "cuDNN causal",
        rivals_attention.cudnn_causal,
        CEILING,
        work=rivals_attention.causal_work,
        available=_in_half_precision_on_gpu,
    ),
    *(
        Contestant(
            f"flash-attn{suffix} causal",
            rivals_attention.flash_causal(version),
            CEILING,
            work=rivals_attention.causal_work,
            available=_in_half_precision_on_gpu,
            requires=(module,),
            jit=version == 4,
        )
        for version, suffix, module in FLASH_ATTN
    ),
)

BENCH = OpBench(
    name="frame_attention",
    build=build,
    ours=ours,
    rivals=(
        Contestant("SDPA per frame", per_frame, prepare=_with_calls),
        Contestant("flex_attention", flex, prepare=_with_block_mask, available=_has_flex, jit=True),
        Contestant("SDPA dense mask", dense_mask, prepare=_with_mask, memory=_mask_bytes),
        Contestant("official style", official_style, prepare=_with_official_mask, memory=_mask_bytes),
        *GPU_RIVALS,
        _matmul(MATMUL_SIZE, "cpu"),
        _matmul(GPU_MATMUL_SIZE, "cuda"),
    ),
    yardstick="SDPA per frame",
    work=work,
    cases=(
        *grid("frame_attention", [(TINY, SMOKE)], [torch.bfloat16, torch.float32]),
        *grid("frame_attention", [(M1B_QUARTER, VIDEO_SMALL)], [torch.bfloat16]),
        *grid("frame_attention", [(M3B_GROUP, VIDEO_256P_3)], [torch.bfloat16], passes=[True]),
        *grid("frame_attention", [(M3B_GROUP, VIDEO_256P_3)], [torch.bfloat16], slow=True, passes=[False]),
        *grid("frame_attention", [(M3B_QUARTER, VIDEO_256P_3)], [torch.bfloat16], slow=True),
        *grid("frame_attention", [(M1B_QUARTER, VIDEO_SMALL)], [torch.float32], passes=[True]),
        *grid("frame_attention", [(M1B_QUARTER, VIDEO_SMALL)], [torch.float32], slow=True, passes=[False]),
        *(Case("frame_attention", M1B_GROUP, video, torch.bfloat16, backward=False) for video in SWEEP_256P),
        *grid("frame_attention", [(M1B, IMAGE_384P), (M3B, IMAGE_384P)], [torch.bfloat16], slow=True),
        *grid("frame_attention", [(M1B, VIDEO_256P), (M3B, VIDEO_256P)], [torch.bfloat16], slow=True),
        *grid("frame_attention", [(M1B, VIDEO_384P), (M3B, VIDEO_384P)], [torch.bfloat16], slow=True),
    ),
)
