"""frame_layout in plain PyTorch, on any device and without a host sync: the specification of the other implementations.

Every token learns the start of the latest frame by a running maximum, and reads that frame's size from its header. A
token lies inside the frame if that frame starts in its own document and has not ended. Content counts its position from
the document's first content token; every other token has its own index as all three positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import queries_before
from ..token_ids import FRAME_HEADER, FRAME_START
from .contract import Inputs, Outputs
from .frames import SPACE_STRIDE, TIME_STRIDE, header_numbers


def forward(inputs: Inputs) -> Outputs:
    """Read the layout. On malformed documents its limits are still in bounds, so that no kernel reads outside."""
    ids, cu_seqlens = inputs
    total = ids.shape[0]
    if total == 0:
        none = torch.empty_like(ids, dtype=torch.int32)
        return Outputs(none.new_empty(3, 0), none.bool(), *(none.clone() for _ in range(5)))
    ids = ids.to(torch.int32)
    index = torch.arange(total, dtype=torch.int32, device=ids.device)
    starts = ids == FRAME_START
    start = torch.where(starts, index, -1).cummax(0).values  # start of the latest frame, which may be this token
    numbers = torch.nn.functional.pad(header_numbers(ids), (0, FRAME_HEADER - 1))
    rows, cols = (numbers.index_select(0, start + 1 + axis) for axis in (0, 1))
    line = cols + 1
    codes = rows * line
    frames = starts.cumsum(0, dtype=torch.int32)  # number of frame starts so far, this token included
    doc_start, doc_end, frames_before, first_content = _document_facts(cu_seqlens, index, frames)

    offset = index - (start + FRAME_HEADER)
    inside = (start >= doc_start) & (offset <= codes)  # header, content and end of the frame
    content = inside & (offset >= 0) & (offset < codes)
    frame = frames - (frames_before + 1)

    frame_end = torch.minimum(index - offset + (codes + 1), doc_end)
    # A malformed frame that starts before the last one ended would make the limit fall; cummax keeps it monotone.
    kv_end = torch.where(inside, frame_end, index + 1).cummax(0).values

    # Content counts from the document's first content token; everything else from its own index.
    text = index - doc_start
    row = torch.div(offset, line, rounding_mode="floor")
    time = torch.where(content, first_content + TIME_STRIDE * frame, text)
    height = torch.where(content, first_content + SPACE_STRIDE * row, text)
    width = torch.where(content, first_content + SPACE_STRIDE * (offset - row * line), text)
    return Outputs(
        torch.stack([time, height, width]),
        content,
        torch.where(content, frame, -1),
        doc_start,
        kv_end,
        queries_before(kv_end, total),  # both limits never fall, so these counts bound the queries of each key
        queries_before(doc_start, total),
    )


def _document_facts(cu_seqlens: Tensor, index: Tensor, frames: Tensor) -> list[Tensor]:
    """Return four facts of each token's document, int32 [T] each.

    They are the document's start, its end, the number of frames of the stream before it, and its first content token,
    counted inside the document.
    """
    # Bounds that do not rise from 0 to T would index outside.
    bounds = cu_seqlens.clamp(0, len(index)).cummax(0).values
    bounds[0], bounds[-1] = 0, len(index)
    begin, end = bounds[:-1], bounds[1:]
    frames_before = torch.nn.functional.pad(frames, (1, 0))[begin]
    first_frame = torch.searchsorted(frames, frames_before, right=True, out_int32=True)
    document = torch.searchsorted(end, index, right=True, out_int32=True)
    facts = begin, end, frames_before, first_frame + FRAME_HEADER - begin
    return [fact.index_select(0, document) for fact in facts]
