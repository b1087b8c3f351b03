"""frame_layout: reading positions and limits off token ids, behind FrameLayout.from_tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import formulas
from bench.formulas import Work
from bench.registry import CEILING, Case, Contestant, Inputs, OpBench
from bench.shapes import M1B, SMOKE, TINY, VIDEO_256P, VIDEO_384P, VIDEO_384P_LONG
from lumos_kernels.frame_layout.api import frame_layout
from lumos_kernels.frame_layout.frames import SPACE_STRIDE, TIME_STRIDE, frame_length, frame_skeleton
from lumos_kernels.token_ids import FRAME_HEADER, FRAME_START, GRID_UNIT, NUMBER_BASE


def build(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """The ids of one document, all of its codes masked. dtype plays no part: ids are int64."""
    video = case.video
    frame = frame_skeleton(video.rows, video.cols)
    text = torch.zeros(video.text, dtype=torch.int64)
    tail = torch.zeros(video.tokens - video.text - video.frames * len(frame), dtype=torch.int64)
    ids = torch.cat([text, *[frame] * video.frames, tail])
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    return Inputs({"ids": ids.to(device), "cu_seqlens": cu_seqlens.to(device)})


def ours(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    return frame_layout(inputs.ids, inputs.cu_seqlens, impl=impl)


def per_frame(inputs: Inputs) -> tuple[Tensor, ...]:
    """Frame by frame of one document with host integers: short to write, and waits for a GPU."""
    tokens = len(inputs.ids)
    text = torch.arange(tokens, dtype=torch.int32, device=inputs.ids.device)
    positions, kv_end, q_start = text.repeat(3, 1), text + 1, text.clone()
    frame_index = torch.full_like(text, -1)
    first = None
    for number, start in enumerate((inputs.ids == FRAME_START).nonzero()[:, 0].tolist()):
        rows, cols = (GRID_UNIT * (n - NUMBER_BASE) for n in inputs.ids[start + 1 : start + FRAME_HEADER].tolist())
        begin, end = start + FRAME_HEADER, start + frame_length(rows, cols)
        first = begin if first is None else first
        grid = positions[:, begin : end - 1].view(3, rows, cols + 1)
        grid[0] = first + TIME_STRIDE * number
        grid[1] = first + SPACE_STRIDE * torch.arange(rows, device=grid.device)[:, None]
        grid[2] = first + SPACE_STRIDE * torch.arange(cols + 1, device=grid.device)
        frame_index[begin : end - 1] = number
        kv_end[start:end] = end
        q_start[start:end] = start
    kv_start, q_end = torch.zeros_like(text), torch.full_like(text, tokens)
    return positions, frame_index >= 0, frame_index, kv_start, kv_end, q_start, q_end


def _with_out(inputs: Inputs) -> Inputs:
    return Inputs({"ids": inputs.ids, "out": torch.empty_like(inputs.ids)})


def copy(inputs: Inputs) -> tuple[Tensor, ...]:
    """The ids copied into memory that is there already."""
    return (inputs.out.copy_(inputs.ids),)


BENCH = OpBench(
    name="frame_layout",
    build=build,
    ours=ours,
    rivals=(
        Contestant("frame by frame", per_frame),
        Contestant("copy", copy, CEILING, prepare=_with_out, work=lambda case: Work(2 * 8 * case.video.tokens, "B")),
    ),
    yardstick="frame by frame",
    work=lambda case: formulas.layout_bytes(case.video.tokens),
    cases=[
        Case("frame_layout", model, video, torch.float32, backward=False)
        for model, video in [(TINY, SMOKE), (M1B, VIDEO_256P), (M1B, VIDEO_384P), (M1B, VIDEO_384P_LONG)]
    ],
)
