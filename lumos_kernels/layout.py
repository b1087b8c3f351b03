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
from .tensors import INT32_MAX, host_may_read


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

    Query i sees the keys kv_start[i] <= j < kv_end[i]. A query with kv_start[i] >= kv_end[i] sees nothing. The rows may
    come in any order: order only makes attention fast, because a tile of queries walks over all keys between its lowest
    kv_start and its highest kv_end.

    The backward pass needs bounds from the other side: every query that sees key j lies in q_start[j] <= i < q_end[j],
    and q_start[j] == q_end[j] for a key that no query sees. Where kv_start and kv_end never fall, the queries between
    the bounds are exactly those that see the key.

    frame_attention reads limits outside 0..Tk as the nearest of 0 and Tk (q_start and q_end: 0 and Tq), so no limits
    make it read or write outside its tensors.

    kv_start, kv_end: int32 [Tq]. q_start, q_end: int32 [Tk].
    """

    kv_start: Tensor
    kv_end: Tensor
    q_start: Tensor
    q_end: Tensor

    @classmethod
    def from_kv(cls, kv_start: Tensor, kv_end: Tensor, num_keys: int, check: bool | None = None) -> RowLimits:
        """Build both views from the view of the queries, which may come in any order.

        kv_start, kv_end: integer [Tq], 0 <= kv_start <= kv_end <= num_keys. The results are new tensors.
        check: raise ValueError where a value is outside. None checks tensors on the CPU, outside torch.compile. True
            checks tensors on any device, which is a host sync on GPUs. Unchecked values are clamped to 0..num_keys.
        """
        _require_limits(kv_start, kv_end, num_keys)
        if host_may_read(kv_start, kv_end) if check is None else check:
            _check_limits(kv_start, kv_end, num_keys)
        kv_start, kv_end = (limit.clamp(0, num_keys).to(torch.int32).contiguous() for limit in (kv_start, kv_end))
        return cls(kv_start, kv_end, *_query_bounds(kv_start, kv_end, num_keys))

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
        start, end = (limit.clamp(0, self.num_keys) for limit in (self.kv_start, self.kv_end))
        return int((end - start).clamp_min(0).sum())

    def to(self, device: torch.device | str) -> RowLimits:
        """Return the limits on another device."""
        return RowLimits(*(_moved(getattr(self, f.name), device) for f in fields(self)))


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
    def from_tokens(cls, input_ids: Tensor, cu_seqlens: Tensor | None = None, check: bool | None = None) -> FrameLayout:
        """Read the layout off token ids, masked (id 9003) or not, without a host sync.

        input_ids: int32 or int64, [B, L] with one document a row, padded at the end, or [T] with packed documents.
        cu_seqlens: int32 or int64 [B + 1] on the same device, with [T] only. It rises from 0 to T.
        check: None checks a cu_seqlens on the CPU, outside torch.compile. True also validates the documents, on any
            device, which reads the tensors. False checks nothing, and a bad cu_seqlens is read as frame_layout says.

        Raises ValueError where cu_seqlens does not rise from 0 to T, and where a checked document is malformed. The
        message then names the document, the frame and the defect: a header without a size, a truncated frame, content
        that does not match its size.
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
            check = bool(check)  # these bounds are right
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
        return cls._read(ids, torch.tensor(lengths, device="cpu").cumsum(0).to(torch.int32), check=False)

    @classmethod
    def _read(cls, ids: Tensor, cu_seqlens: Tensor, check: bool | None) -> FrameLayout:
        read = frame_layout(ids, cu_seqlens, check=check)
        if cu_seqlens.dtype == torch.int64:  # frame_layout does not return what it converted
            cu_seqlens = cu_seqlens.to(torch.int32)
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
        cu_seqlens, positions, content, frame_index = (_moved(x, device) for x in own)
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


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on a device. The copy to the CPU blocks: the host may read it as soon as it has the tensor."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def queries_before(limit: Tensor, num_keys: int) -> Tensor:
    """Return int32 [num_keys], for each key j the number of queries with limit <= j.

    limit: int32 [Tq]. Where it never falls, these are the first queries.
    """
    count = limit.new_zeros(num_keys + 1)
    count.index_add_(0, limit.clamp(0, num_keys), torch.ones_like(limit))
    return count[:num_keys].cumsum(0, dtype=torch.int32)


def _query_bounds(kv_start: Tensor, kv_end: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Return q_start and q_end, int32 [num_keys], of limits in 0..num_keys, without a host sync.

    No query sees key j before the running maximum of kv_end exceeds j, nor once the minimum of kv_start over all later
    queries exceeds it. Both are monotone, so counts find the places. A query that sees nothing moves neither.
    """
    sees = kv_start < kv_end
    first_start, last_end = kv_start.where(sees, num_keys), kv_end.where(sees, 0)
    q_start = queries_before(last_end.cummax(0).values, num_keys)
    q_end = queries_before(first_start.flip(0).cummin(0).values, num_keys)
    # Queries that see key j: those that start at or before it, less those that end there.
    watchers = queries_before(first_start, num_keys) - queries_before(kv_end.where(sees, num_keys), num_keys)
    return q_start, q_end.where(watchers > 0, q_start)


def _require_limits(kv_start: Tensor, kv_end: Tensor, num_keys: int) -> None:
    are_integers = {kv_start.dtype, kv_end.dtype} <= set(errors.INTEGERS)
    if kv_start.dim() != 1 or kv_start.shape != kv_end.shape or not are_integers:
        raise ValueError(
            f"kv_start and kv_end must both be integer [Tq]; got {errors.describe(kv_start)}, {errors.describe(kv_end)}"
        )
    errors.require_same("kv_end", kv_end, "kv_start", kv_start, dtypes=False)
    if not 0 <= num_keys <= INT32_MAX:
        raise ValueError(f"num_keys must be 0 .. {INT32_MAX}, the number of keys; got {num_keys}")


def _check_limits(kv_start: Tensor, kv_end: Tensor, num_keys: int) -> None:
    wrong = (kv_start < 0) | (kv_start > kv_end) | (kv_end > num_keys)
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            f"kv_start and kv_end must satisfy 0 <= kv_start <= kv_end <= {num_keys}, the number of keys; "
            f"row {row} has kv_start {int(kv_start[row])} and kv_end {int(kv_end[row])}"
        )
