"""A training sample, and batches of them packed into one stream.

Legend: L tokens of a document, T tokens of a batch, B documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lumos.tokens import PLACEHOLDERS, Spans, cut_with_labels, drop_text
from lumos_kernels.frame_layout.frames import frame_length


@dataclass(frozen=True)
class Shape:
    """How long a document is and of what, known without its tokens.

    text_tokens: tokens before the video start, those that dropping the text takes away; 0 where there is no text.
    seconds, fps: as written in the document; frames: latent frames of rows x cols codes.
    length: L, all tokens.
    placeholders: how often 65539 and 65540 occur in the text.
    """

    text_tokens: int
    seconds: int
    fps: int
    frames: int
    rows: int
    cols: int
    length: int
    placeholders: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, ids: Tensor) -> Shape:
        """Reads it off a document, integer [L]. ValueError says what is malformed."""
        return Sample.from_ids(ids).shape

    def with_frames(self, frames: int, seconds: int, fps: int) -> Shape:
        """The shape after the video was cut to so many latent frames."""
        length = self.length + (frames - self.frames) * frame_length(self.rows, self.cols)
        return replace(self, frames=frames, seconds=seconds, fps=fps, length=length)

    def with_numbers(self, lengths: Sequence[int]) -> Shape:
        """The shape after each of the two placeholders was replaced by so many ids."""
        more = sum(count * (length - 1) for count, length in zip(self.placeholders, lengths, strict=True))
        return replace(self, text_tokens=self.text_tokens + more, length=self.length + more, placeholders=(0, 0))


@dataclass(frozen=True)
class Sample:
    """One document and what it shows.

    ids: int64 [L].
    seconds, fps: as written in the document; frames: latent frames of rows x cols codes.
    text_tokens: tokens before the video start.
    labels: int64 [L], ids or -100, of official samples; None elsewhere (lumos/masking.py makes the targets).
    caption, source: where known; id: of official samples.
    """

    ids: Tensor
    seconds: int
    fps: int
    frames: int
    rows: int
    cols: int
    text_tokens: int
    caption: str = ""
    source: str = ""
    labels: Tensor | None = None
    id: int | None = None

    @classmethod
    def from_ids(cls, ids: Tensor, **known: object) -> Sample:
        """Checks a document, integer [L], and reads its numbers. ValueError says what is malformed."""
        spans = Spans.of(ids)
        numbers = (spans.seconds, spans.fps, len(spans.frames), spans.rows, spans.cols, spans.begin)
        return cls(ids.long(), *numbers, **known)

    @property
    def shape(self) -> Shape:
        text = self.ids[: self.text_tokens]
        marks = tuple(int((text == placeholder).sum()) for placeholder in PLACEHOLDERS[1:])
        numbers = (self.seconds, self.fps, self.frames, self.rows, self.cols, len(self.ids))
        return Shape(self.text_tokens, *numbers, marks)

    @property
    def spans(self) -> Spans:
        """Where the parts lie, without looking for them again."""
        length, first = frame_length(self.rows, self.cols), self.text_tokens + 3
        frames = [(first + j * length, first + (j + 1) * length) for j in range(self.frames)]
        return Spans(self.text_tokens, frames[-1][1], self.seconds, self.fps, self.rows, self.cols, frames)

    def cut(self, fps: int, seconds: int, numbers: Mapping[int, Sequence[int]] | None = None, start: int = 0) -> Sample:
        """cut_video on ids and labels alike, from latent frame `start` on."""
        ids, labels = cut_with_labels(self.ids, self.labels, self.spans, fps, seconds, numbers, start)
        return Sample.from_ids(ids, caption=self.caption, source=self.source, labels=labels, id=self.id)

    def without_text(self) -> Sample:
        """drop_text on ids and labels alike."""
        ids = drop_text(self.ids)
        return replace(self, ids=ids, labels=None if self.labels is None else self.labels[-len(ids) :], text_tokens=0)


@dataclass(frozen=True)
class Batch:
    """Packed documents. input_ids: int64 [T]; cu_seqlens: int32 [B + 1], document b is cu_seqlens[b]..[b + 1]."""

    input_ids: Tensor
    cu_seqlens: Tensor


def collate(samples: Sequence[Sample | Tensor]) -> Batch:
    """Packs samples, or their ids int64 [L], one after the other without padding. ValueError for none."""
    if not samples:
        raise ValueError("samples is empty: a batch holds at least one document")
    rows = [sample.ids if isinstance(sample, Sample) else sample for sample in samples]
    ends = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    return Batch(torch.cat(rows).long(), ends.to(torch.int32))
