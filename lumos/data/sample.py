"""A training sample, and batches of them packed into one stream.

Legend: L tokens of a document, T tokens of a batch, B documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lumos.tokens import Spans, cut_with_labels, drop_text


@dataclass(frozen=True)
class Sample:
    """One document and what it shows.

    ids: int64 [L].
    seconds, fps: as written in the document; frames: latent frames of rows x cols codes.
    labels: int64 [L], ids or -100, of official samples; None elsewhere (lumos/masking.py makes the targets).
    caption, source: where known; id: of official samples.
    """

    ids: Tensor
    seconds: int
    fps: int
    frames: int
    rows: int
    cols: int
    caption: str = ""
    source: str = ""
    labels: Tensor | None = None
    id: int | None = None

    @classmethod
    def from_ids(cls, ids: Tensor, **known: object) -> Sample:
        """Checks a document, integer [L], and reads its numbers. ValueError says what is malformed."""
        spans = Spans.of(ids)
        return cls(ids.long(), spans.seconds, spans.fps, len(spans.frames), spans.rows, spans.cols, **known)

    def cut(self, fps: int, seconds: int, numbers: Mapping[int, Sequence[int]] | None = None) -> Sample:
        """cut_video on ids and labels alike."""
        ids, labels = cut_with_labels(self.ids, self.labels, fps, seconds, numbers)
        return Sample.from_ids(ids, caption=self.caption, source=self.source, labels=labels, id=self.id)

    def without_text(self) -> Sample:
        """drop_text on ids and labels alike."""
        ids = drop_text(self.ids)
        return replace(self, ids=ids, labels=None if self.labels is None else self.labels[-len(ids) :])


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
