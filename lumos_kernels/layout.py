"""FrameLayout: the O(T) description of a packed stream of text and frames that every op shares.

Legend: T tokens of the stream, B documents, L tokens of a row, R x C_ grid of a frame (rows x columns of codes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from lumos_kernels import checks
from lumos_kernels.frame_layout import ops as _ops  # noqa: F401  # defines torch.ops.lumos_kernels.frame_layout

# Structural token ids of Lumos-1. The visual codes and the text ids never take part in the layout.
TEXT_START = 0
FRAME_START = 8197
FRAME_END = 8196
NEW_LINE = 8803
NUMBER_BASE = 8804  # NUMBER_BASE + n writes the number n
MASK = 9003
GRID_UNIT = 4  # a frame header counts its rows and columns in units of 4 codes
FRAME_HEADER = 3  # FRAME_START, rows, columns

INTEGERS = (torch.int32, torch.int64)

# MM-RoPE strides (arXiv 2507.08801, section 3.2): one latent frame spans 4 pictures, one code 8 x 8 pixels.
TIME_STRIDE = 4
SPACE_STRIDE = 8


@dataclass(frozen=True)
class Text:
    """A run of `length` tokens outside every frame: text, document header, document end."""

    length: int


@dataclass(frozen=True)
class Frame:
    """A frame of rows x cols codes with its header, new lines and end: rows * (cols + 1) + 4 tokens."""

    rows: int
    cols: int

    @property
    def length(self) -> int:
        return frame_length(self.rows, self.cols)


def frame_length(rows: int, cols: int) -> int:
    """Tokens of a frame with its header (3), `rows` lines of `cols` codes and a new line, and its end (1)."""
    return FRAME_HEADER + rows * (cols + 1) + 1


@dataclass(frozen=True)
class RowLimits:
    """Which keys each query sees, as two integers a row instead of a mask.

    Query i sees the keys kv_start[i] <= j < kv_end[i]; equivalently key j is seen by the queries
    q_start[j] <= i < q_end[j]. kv_start and kv_end are non-decreasing over the stream, which is what makes the
    two views equivalent and lets a tile know its bounds from its first and last row. kv_start[i] == kv_end[i]
    is a row without keys.

    kv_start, kv_end: int32 [Tq]; q_start, q_end: int32 [Tk].
    """

    kv_start: Tensor
    kv_end: Tensor
    q_start: Tensor
    q_end: Tensor

    @classmethod
    def from_kv(cls, kv_start: Tensor, kv_end: Tensor, num_keys: int, check: bool = False) -> RowLimits:
        """Builds both views from the queries' one.

        kv_start, kv_end: integer [Tq], non-decreasing, 0 <= kv_start <= kv_end <= num_keys.
        check: raise ValueError where that does not hold (reads the tensors: a host sync on GPUs).
        """
        if check:
            _check_limits(kv_start, kv_end, num_keys)
        kv_start, kv_end = kv_start.to(torch.int32).contiguous(), kv_end.to(torch.int32).contiguous()
        return cls(kv_start, kv_end, _queries_before(kv_end, num_keys), _queries_before(kv_start, num_keys))

    @property
    def num_queries(self) -> int:
        return self.kv_start.shape[0]

    @property
    def num_keys(self) -> int:
        return self.q_start.shape[0]

    def dense_mask(self, start: int = 0, end: int | None = None) -> Tensor:
        """bool [end - start, Tk], True where the query may see the key. For references and tests only."""
        keys = torch.arange(self.num_keys, device=self.kv_start.device)
        return (keys >= self.kv_start[start:end, None]) & (keys < self.kv_end[start:end, None])

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs the mask allows: the unit of useful attention work. Reads the tensors."""
        return int((self.kv_end.long() - self.kv_start.long()).sum())

    def to(self, device: torch.device | str) -> RowLimits:
        return RowLimits(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


@dataclass(frozen=True)
class FrameLayout:
    """Where the documents, frames and content of a packed stream of T tokens lie (ARCHITECTURE: one packed stream).

    cu_seqlens: int32 [B + 1], document b is the tokens cu_seqlens[b] <= i < cu_seqlens[b + 1].
    positions: int32 [3, T], the MM-RoPE positions t, h, w of each token inside its document.
    content: bool [T], True on the codes and new lines of frames.
    frame_index: int32 [T], the number of the token's frame inside its document on content, -1 elsewhere.
    limits: RowLimits of self attention: causal over text, bidirectional inside a frame, causal between frames.
    """

    cu_seqlens: Tensor
    positions: Tensor
    content: Tensor
    frame_index: Tensor
    limits: RowLimits

    @classmethod
    def from_tokens(cls, input_ids: Tensor, cu_seqlens: Tensor | None = None, check: bool = False) -> FrameLayout:
        """Reads the layout off token ids, masked (id 9003) or not, without a host sync.

        input_ids: integer [B, L], one document a row, padded at the end; or [T] with cu_seqlens, packed documents.
        cu_seqlens: integer [B + 1] on the same device, only with [T].
        check: validate the rows (reads the tensors) and raise ValueError naming the document, the frame and the
            defect: a header without a size, a truncated frame, content that does not match its size.
        """
        if input_ids.dim() not in (1, 2) or input_ids.dtype not in INTEGERS:
            raise ValueError(
                f"input_ids must be int32 or int64 [B, L], or [T] with cu_seqlens; got {checks.describe(input_ids)}"
            )
        if (input_ids.dim() == 1) != (cu_seqlens is not None):
            raise ValueError("cu_seqlens goes with input_ids [T], and only with it: rows of [B, L] are documents")
        ids = input_ids.reshape(-1)
        if cu_seqlens is None:
            rows, length = input_ids.shape
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=ids.device) * length
        elif cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in INTEGERS:
            raise ValueError(f"cu_seqlens must be int32 or int64 [B + 1]; got {checks.describe(cu_seqlens)}")
        cu_seqlens = cu_seqlens.to(torch.int32)
        if check:
            check_documents(ids, cu_seqlens)
        return cls._read(ids, cu_seqlens)

    @classmethod
    def from_segments(cls, documents: Sequence[Sequence[Text | Frame]]) -> FrameLayout:
        """Layout of packed documents from their segments, on the CPU.

        documents: for each document its Text and Frame segments in order; grids are multiples of 4.
        """
        if not documents:
            raise ValueError("documents is empty: give at least one list of Text and Frame segments")
        pieces, lengths = [], [0]
        for number, segments in enumerate(documents):
            runs = [_skeleton(number, segment) for segment in segments]
            pieces += runs
            lengths.append(sum(len(run) for run in runs))
        ids = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device="cpu")
        return cls._read(ids, torch.tensor(lengths, device="cpu").cumsum(0).to(torch.int32))

    @classmethod
    def _read(cls, ids: Tensor, cu_seqlens: Tensor) -> FrameLayout:
        positions, content, frame_index, *limits = torch.ops.lumos_kernels.frame_layout.default(ids, cu_seqlens)
        return cls(cu_seqlens, positions, content, frame_index, RowLimits(*limits))

    @property
    def num_tokens(self) -> int:
        """T, the tokens of the whole stream."""
        return self.content.shape[0]

    @property
    def num_documents(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_frames(self) -> int:
        """Frames of the document that has most of them. Reads the tensors: a host sync on GPUs."""
        return int(self.frame_index.max()) + 1 if self.num_tokens else 0

    def dense_mask(self) -> Tensor:
        """bool [T, T], True where query i may see key j. For references and tests only: O(T^2) memory."""
        return self.limits.dense_mask()

    def to(self, device: torch.device | str) -> FrameLayout:
        return FrameLayout(
            *(getattr(self, name).to(device, non_blocking=True) for name in ("cu_seqlens", "positions", "content")),
            self.frame_index.to(device, non_blocking=True),
            self.limits.to(device),
        )


def header_numbers(ids: Tensor) -> Tensor:
    """The grid rows or columns that an id of a frame header writes, 0 where it writes none."""
    number = ids - NUMBER_BASE
    return torch.where((number > 0) & (number < MASK - NUMBER_BASE), GRID_UNIT * number, 0)


def _skeleton(document: int, segment: Text | Frame) -> Tensor:
    """Token ids with the segment's structure: zeros for text, mask ids for content."""
    if isinstance(segment, Text):
        if segment.length < 0:
            raise ValueError(f"documents[{document}]: Text length must be >= 0, got {segment.length}")
        return torch.zeros(segment.length, dtype=torch.int64, device="cpu")
    if not isinstance(segment, Frame):
        raise ValueError(f"documents[{document}]: segments are Text or Frame, got {type(segment).__name__}")
    return frame_skeleton(segment.rows, segment.cols)


def frame_skeleton(rows: int, cols: int) -> Tensor:
    """int64 [rows * (cols + 1) + 4]: a frame whose codes are all masked (id 9003), new lines in place."""
    limit = GRID_UNIT * (MASK - NUMBER_BASE)
    for name, value in (("rows", rows), ("cols", cols)):
        if value <= 0 or value % GRID_UNIT or value >= limit:
            raise ValueError(f"frame {name} must be a positive multiple of {GRID_UNIT} below {limit}, got {value}")
    codes = torch.full((rows, cols + 1), MASK, dtype=torch.int64, device="cpu")
    codes[:, cols] = NEW_LINE
    header = torch.tensor([FRAME_START, NUMBER_BASE + rows // GRID_UNIT, NUMBER_BASE + cols // GRID_UNIT], device="cpu")
    return torch.cat([header, codes.reshape(-1), torch.tensor([FRAME_END], device="cpu")])


def check_documents(ids: Tensor, cu_seqlens: Tensor) -> None:
    """Raises ValueError where a document's frames are malformed. ids: integer [T]; cu_seqlens: int32 [B + 1]."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != ids.shape[0] or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {ids.shape[0]} tokens of input_ids, got {bounds}")
    ids = ids.cpu()
    for document, (begin, end) in enumerate(pairwise(bounds)):
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


def _queries_before(limit: Tensor, num_keys: int) -> Tensor:
    """int32 [num_keys]: how many queries have limit <= j, which are the first ones since limits never fall."""
    count = limit.new_zeros(num_keys + 1)
    count.index_add_(0, limit.clamp(0, num_keys), torch.ones_like(limit))
    return count[:num_keys].cumsum(0, dtype=torch.int32)


def _check_limits(kv_start: Tensor, kv_end: Tensor, num_keys: int) -> None:
    if kv_start.dim() != 1 or kv_start.shape != kv_end.shape or not {kv_start.dtype, kv_end.dtype} <= set(INTEGERS):
        raise ValueError(
            f"kv_start and kv_end must both be integer [Tq]; got {checks.describe(kv_start)}, {checks.describe(kv_end)}"
        )
    if kv_start.numel() == 0:
        return
    if kv_start.min() < 0 or kv_end.max() > num_keys or (kv_start > kv_end).any():
        raise ValueError(f"kv_start and kv_end must satisfy 0 <= kv_start <= kv_end <= {num_keys}")
    if (kv_start.diff() < 0).any() or (kv_end.diff() < 0).any():
        raise ValueError("kv_start and kv_end must be non-decreasing: overlapping or unordered limits are refused")
