"""How a frame is written in token ids: its length, its skeleton, its header, and the check of a document's frames."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..token_ids import FRAME_END, FRAME_HEADER, FRAME_START, GRID_UNIT, MASK, NEW_LINE, NUMBER_BASE

# MM-RoPE strides (arXiv 2507.08801, section 3.2): one latent frame spans 4 pictures, one code 8 x 8 pixels.
TIME_STRIDE = 4
SPACE_STRIDE = 8


def frame_length(rows: int, cols: int) -> int:
    """Return the tokens of a frame: its header (3), `rows` lines of `cols` codes and a new line, and its end (1)."""
    return FRAME_HEADER + rows * (cols + 1) + 1


def frame_skeleton(rows: int, cols: int) -> Tensor:
    """Return int64 [rows * (cols + 1) + 4]: a frame whose codes are all masked (id 9003), new lines in place."""
    limit = GRID_UNIT * (MASK - NUMBER_BASE)
    for name, value in (("rows", rows), ("cols", cols)):
        if value <= 0 or value % GRID_UNIT or value >= limit:
            raise ValueError(f"frame {name} must be a positive multiple of {GRID_UNIT} below {limit}, got {value}")
    codes = torch.full((rows, cols + 1), MASK, dtype=torch.int64, device="cpu")
    codes[:, cols] = NEW_LINE
    header = torch.tensor([FRAME_START, NUMBER_BASE + rows // GRID_UNIT, NUMBER_BASE + cols // GRID_UNIT], device="cpu")
    return torch.cat([header, codes.reshape(-1), torch.tensor([FRAME_END], device="cpu")])


def header_numbers(ids: Tensor) -> Tensor:
    """Return the grid rows or columns that each id would write in a frame header, 0 where it writes none."""
    number = ids - NUMBER_BASE
    return torch.where((number > 0) & (number < MASK - NUMBER_BASE), GRID_UNIT * number, 0)


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError where cu_seqlens, integer [B + 1], does not rise from 0 to the number of tokens."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of input_ids, got {bounds}")


def check_documents(ids: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError where a document's frames are malformed. ids: integer [T]; cu_seqlens: integer [B + 1]."""
    ids = ids.cpu()
    for document, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        _check_document(document, ids[begin:end])


def _check_document(document: int, ids: Tensor) -> None:
    starts = (ids == FRAME_START).nonzero().flatten().tolist()
    ends = (ids == FRAME_END).nonzero().flatten().tolist()
    expected_ends = []
    for frame, start in enumerate(starts):
        where = f"document {document}, frame {frame} at token {start}"
        header = header_numbers(ids[start + 1 : start + FRAME_HEADER]).tolist()
        if len(header) < FRAME_HEADER - 1 or not all(header):
            raise ValueError(f"{where}: the frame start must be followed by its rows and columns, ids 8805..9002")
        rows, cols = header
        stop = start + frame_length(rows, cols)
        if stop > len(ids):
            raise ValueError(
                f"{where}: truncated, {rows} x {cols} needs {stop - start}, {len(ids) - start} tokens left"
            )
        expected_ends.append(stop - 1)
        grid = ids[start + FRAME_HEADER : stop - 1].view(rows, cols + 1)
        structural = (grid == FRAME_START) | (grid == FRAME_END)
        lines_ok = ((grid[:, cols] == NEW_LINE) | (grid[:, cols] == MASK)).all()
        if ids[stop - 1] != FRAME_END or structural.any() or not lines_ok or (grid[:, :cols] == NEW_LINE).any():
            raise ValueError(
                f"{where}: content does not match its size, {rows} lines of {cols} codes and a new line (8803), "
                f"then the frame end (8196)"
            )
    if ends != expected_ends:
        raise ValueError(f"document {document}: frame ends (8196) at {ends}, but the frame headers say {expected_ends}")
