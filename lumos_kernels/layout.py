"""FrameLayout and RowLimits: the O(T) description of a packed stream of text and frames that every op shares.

Legend: T tokens of the stream, B documents, L tokens of a row, R x C_ grid of a frame (rows x columns of codes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import errors
from .frame_layout.api import frame_layout
from .frame_layout.frames import frame_length, frame_skeleton


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
        """The frame's tokens."""
        return frame_length(self.rows, self.cols)


@dataclass(frozen=True)
class RowLimits:
    """The keys that each query sees, as one range of keys a query instead of a mask. from_kv builds it.

    Query i sees the keys kv_start[i] <= j < kv_end[i]. The backward pass needs the same relation from the other side:
    key j is seen by the queries q_start[j] <= i < q_end[j]. A query without keys has kv_start[i] == kv_end[i], and a
    key that no query sees has q_start[j] == q_end[j].

    kv_start and kv_end are non-decreasing in i, queries without keys included. That makes the queries of a key one
    range too, and kernels take the bounds of a tile of queries from its first and last row.

    kv_start, kv_end: int32 [Tq]. q_start, q_end: int32 [Tk].
    """

    kv_start: Tensor
    kv_end: Tensor
    q_start: Tensor
    q_end: Tensor

    @classmethod
    def from_kv(cls, kv_start: Tensor, kv_end: Tensor, num_keys: int, check: bool = False) -> RowLimits:
        """Build both views from the view of the queries.

        kv_start, kv_end: integer [Tq], non-decreasing, 0 <= kv_start <= kv_end <= num_keys.
        check: raise ValueError where that does not hold. This reads the tensors, a host sync on GPUs.
        """
        if check:
            _check_limits(kv_start, kv_end, num_keys)
        kv_start, kv_end = kv_start.to(torch.int32).contiguous(), kv_end.to(torch.int32).contiguous()
        return cls(kv_start, kv_end, _queries_before(kv_end, num_keys), _queries_before(kv_start, num_keys))

    @property
    def num_queries(self) -> int:
        """The number of queries, Tq."""
        return self.kv_start.shape[0]

    @property
    def num_keys(self) -> int:
        """The number of keys, Tk."""
        return self.q_start.shape[0]

    def dense_mask(self, start: int = 0, end: int | None = None) -> Tensor:
        """Return bool [end - start, Tk], True where the query sees the key. For references and tests only."""
        keys = torch.arange(self.num_keys, device=self.kv_start.device)
        return (keys >= self.kv_start[start:end, None]) & (keys < self.kv_end[start:end, None])

    def visible_pairs(self) -> int:
        """Return the number of (query, key) pairs that the mask allows, the unit of useful attention work.

        Reads the tensors: a host sync on GPUs.
        """
        return int((self.kv_end.long() - self.kv_start.long()).sum())

    def to(self, device: torch.device | str) -> RowLimits:
        """Return the limits on another device."""
        return RowLimits(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


@dataclass(frozen=True)
class FrameLayout:
    """The documents, frames and content of a packed stream of T tokens.

    A stream is one row of documents, one after the other. A padded batch [B, L] is a stream of B * L tokens with
    documents of length L.

    cu_seqlens: int32 [B + 1]. Document b is the tokens cu_seqlens[b] <= i < cu_seqlens[b + 1].
    positions: int32 [3, T], the MM-RoPE positions t, h, w of each token inside its document.
    content: bool [T], True on the codes and new lines of frames.
    frame_index: int32 [T]. On content the number of the token's frame inside its document, elsewhere -1.
    limits: RowLimits of self attention: causal over text, bidirectional inside a frame, causal between frames, never
        across documents.
    """

    cu_seqlens: Tensor
    positions: Tensor
    content: Tensor
    frame_index: Tensor
    limits: RowLimits

    @classmethod
    def from_tokens(cls, input_ids: Tensor, cu_seqlens: Tensor | None = None, check: bool = False) -> FrameLayout:
        """Read the layout off token ids, masked (id 9003) or not, without a host sync.

        input_ids: int32 or int64, [B, L] with one document a row, padded at the end, or [T] with packed documents.
        cu_seqlens: int32 or int64 [B + 1] on the same device, with [T] only.
        check: validate the documents first, which reads the tensors. The ValueError names the document, the frame and
            the defect: a header without a size, a truncated frame, content that does not match its size.
        """
        if input_ids.dim() not in (1, 2) or input_ids.dtype not in errors.INTEGERS:
            raise ValueError(
                f"input_ids must be int32 or int64 [B, L], or [T] with cu_seqlens; got {errors.describe(input_ids)}"
            )
        if (input_ids.dim() == 1) != (cu_seqlens is not None):
            raise ValueError("cu_seqlens goes with input_ids [T], and only with it: rows of [B, L] are documents")
        if cu_seqlens is None:
            rows, length = input_ids.shape
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=input_ids.device) * length
        return cls._read(input_ids.reshape(-1), cu_seqlens, check)

    @classmethod
    def from_segments(cls, documents: Sequence[Sequence[Text | Frame]]) -> FrameLayout:
        """Return the layout of packed documents from their segments, on the CPU.

        documents: for each document its Text and Frame segments in order. Grids are multiples of 4.
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
    def _read(cls, ids: Tensor, cu_seqlens: Tensor, check: bool = False) -> FrameLayout:
        if cu_seqlens.dtype == torch.int64:  # once, and here: frame_layout would not return what it converted
            cu_seqlens = cu_seqlens.to(torch.int32)
        read = frame_layout(ids, cu_seqlens, check=check)
        limits = RowLimits(read.kv_start, read.kv_end, read.q_start, read.q_end)
        return cls(cu_seqlens, read.positions, read.content, read.frame_index, limits)

    @property
    def num_tokens(self) -> int:
        """The tokens of the stream, T."""
        return self.content.shape[0]

    @property
    def num_documents(self) -> int:
        """The documents of the stream, B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_frames(self) -> int:
        """The frames of the document that has most of them. Reads the tensors: a host sync on GPUs."""
        return int(self.frame_index.max()) + 1 if self.num_tokens else 0

    def dense_mask(self) -> Tensor:
        """Return bool [T, T], True where query i sees key j. For references and tests only: O(T^2) memory."""
        return self.limits.dense_mask()

    def to(self, device: torch.device | str) -> FrameLayout:
        """Return the layout on another device."""
        own = (self.cu_seqlens, self.positions, self.content, self.frame_index)
        cu_seqlens, positions, content, frame_index = (x.to(device, non_blocking=True) for x in own)
        return FrameLayout(cu_seqlens, positions, content, frame_index, self.limits.to(device))


# Wrappers (DDP, FSDP) and torch.export find tensors in pytree nodes only.
torch.export.register_dataclass(RowLimits, serialized_type_name="lumos_kernels.RowLimits")
torch.export.register_dataclass(FrameLayout, serialized_type_name="lumos_kernels.FrameLayout")


def _skeleton(document: int, segment: Text | Frame) -> Tensor:
    """Return token ids with the segment's structure: zeros for text, mask ids for content."""
    if isinstance(segment, Text):
        if segment.length < 0:
            raise ValueError(f"documents[{document}]: Text length must be >= 0, got {segment.length}")
        return torch.zeros(segment.length, dtype=torch.int64, device="cpu")
    if not isinstance(segment, Frame):
        raise ValueError(f"documents[{document}]: segments are Text or Frame, got {type(segment).__name__}")
    return frame_skeleton(segment.rows, segment.cols)


def _queries_before(limit: Tensor, num_keys: int) -> Tensor:
    """Return int32 [num_keys], the number of queries with limit <= j. They come first, since limits never fall."""
    count = limit.new_zeros(num_keys + 1)
    count.index_add_(0, limit.clamp(0, num_keys), torch.ones_like(limit))
    return count[:num_keys].cumsum(0, dtype=torch.int32)


def _check_limits(kv_start: Tensor, kv_end: Tensor, num_keys: int) -> None:
    are_integers = {kv_start.dtype, kv_end.dtype} <= set(errors.INTEGERS)
    if kv_start.dim() != 1 or kv_start.shape != kv_end.shape or not are_integers:
        raise ValueError(
            f"kv_start and kv_end must both be integer [Tq]; got {errors.describe(kv_start)}, {errors.describe(kv_end)}"
        )
    if kv_start.numel() == 0:
        return
    if kv_start.min() < 0 or kv_end.max() > num_keys or (kv_start > kv_end).any():
        raise ValueError(f"kv_start and kv_end must satisfy 0 <= kv_start <= kv_end <= {num_keys}")
    if (kv_start.diff() < 0).any() or (kv_end.diff() < 0).any():
        raise ValueError("kv_start and kv_end must be non-decreasing: overlapping or unordered limits are refused")
