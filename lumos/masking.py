"""Masks of autoregressive discrete diffusion forcing: which content slots a training step hides and predicts.

Everything here runs on the CPU, in the data path, where the grid of every document is known: the number of target
rows is then a shape, and the training step has nothing to count on the device (arXiv 2507.08801, section 3.3).

A document's mask is a function of its own seed and grid. Its random words are those of Philox-4x64-10 keyed by the
seed (numpy.random.Philox(key=seed).random_raw, a stream that numpy guarantees not to change), read in this order:
    tube, tubeDecay   1 word for u, then 1 word a slot of a frame;
    random            1 word for u, then 1 word a content slot of all maskable frames;
    DiffForcing       1 word a maskable frame for its u, then 1 word a content slot, frame by frame.
u is the word's top 24 bits / 2^24; the slots with the n smallest words (ties: the lower slot) are masked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from lumos.tokens import IGNORED, NUM_CODES, VISUAL_START
from lumos_kernels.layout import FrameLayout
from lumos_kernels.token_ids import MASK

MASK_KINDS = ("tube", "random", "DiffForcing", "tubeDecay")
MASK_SCHEDULES = ("cosine", "linear", "sigmoid", "pow<exponent>")
SMALLEST_RATIO = 1e-6
SIGMOID_RANGE = (-3.0, 3.0)


@dataclass(frozen=True)
class MaskedBatch:
    """What a training step needs of a batch after masking.

    input_ids: like the input, int64 [B, L] or [T], the masked slots replaced by id 9003.
    labels: int64, same shape: the visual code at target slots, -100 elsewhere, masked new lines included, which are
        noise in the input and never targets (upstream keeps the labels 8803 there and drops them in its loss).
    rows: int32 [N], the target slots in ascending order, as indices into the packed stream of T tokens.
    mask_prob: fp32 [B], the mask probability of each document (DiffForcing: the mean over its frames); 0 for text.
    """

    input_ids: Tensor
    labels: Tensor
    rows: Tensor
    mask_prob: Tensor

    @property
    def num_targets(self) -> int:
        """N, the rows that enter the loss."""
        return self.rows.shape[0]

    def to(self, device: torch.device | str) -> MaskedBatch:
        return MaskedBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def mask_ratio(schedule: str, u: Tensor) -> Tensor:
    """Share of the slots to mask at time u, before the floor min_rate.

    schedule: "cosine" cos(pi u / 2); "linear" 1 - u; "pow<e>" 1 - u^e; "sigmoid", a sigmoid over [-3, 3] rescaled to
        fall from 1 to 0. All but cosine are clamped to at least 1e-6, as upstream.
    u: fp32, any shape, in [0, 1). Returns fp32, same shape. Raises ValueError for an unknown schedule.
    """
    if schedule == "cosine":
        return torch.cos(u * math.pi * 0.5)
    if schedule == "linear":
        return (1 - u).clamp(SMALLEST_RATIO, 1.0)
    if schedule == "sigmoid":
        start, end = SIGMOID_RANGE
        first, last = torch.tensor(SIGMOID_RANGE, dtype=u.dtype, device=u.device).sigmoid()
        return ((last - torch.sigmoid(u * (end - start) + start)) / (last - first)).clamp(SMALLEST_RATIO, 1.0)
    return (1 - u ** _exponent(schedule)).clamp(SMALLEST_RATIO, 1.0)


def mask_tokens(
    input_ids: Tensor,
    layout: FrameLayout | None = None,
    *,
    seeds: Sequence[int],
    kind: str = "tube",
    schedule: str = "cosine",
    min_rate: float = 0.7,
    given_frames: int | Sequence[int] = 0,
    classes: tuple[int, int] = (VISUAL_START, VISUAL_START + NUM_CODES),
) -> MaskedBatch:
    """Masks the content of every document of a batch (arXiv 2507.08801 section 3.3; upstream's mask types).

    A document draws u, its probability is p = max(schedule(u), min_rate) in fp32, and of the S content slots of a
    frame (new lines included) n = max(1, round(p S)), halves to even, are masked:
        "tube"         the same n slots in every frame;
        "random"       max(1, round(p S F)) of all content slots, frames mixed;
        "DiffForcing"  every frame its own u, p and slots;
        "tubeDecay"    counts rising linearly from n in the first frame to S in the last (rounded up), each the
                       beginning of one order of the slots.

    input_ids: int64 [B, L] or packed [T], on the CPU; not modified. All frames of a document have one size.
    layout: of input_ids, on the CPU; may be left out for [B, L].
    seeds: one integer in [0, 2^64) a document. The mask of a document depends on its seed, not on its neighbours.
    given_frames: the first k frames of every document, or of each, are shown: never masked, never targets. A document
        with frames must keep at least one to mask (upstream's masking mode video_next_frame).
    classes: ids (lo, hi) that can be targets: LumosConfig.classes.

    Raises ValueError naming the argument, or the document, that does not fit.
    """
    layout = _checked_layout(input_ids, layout)
    documents = layout.num_documents
    seeds = _checked_seeds(seeds, documents)
    given = _checked_given(given_frames, documents)
    if kind not in MASK_KINDS:
        raise ValueError(f"kind must be one of {', '.join(MASK_KINDS)}, got {kind!r}")
    if not 0 <= min_rate <= 1:
        raise ValueError(f"min_rate must lie in [0, 1], got {min_rate}")
    mask_ratio(schedule, torch.zeros(1))  # names an unknown schedule even where no document has a frame

    content, frame_index = layout.content.numpy(), layout.frame_index.numpy()
    bounds = layout.cu_seqlens.tolist()
    masked = np.zeros(layout.num_tokens, dtype=bool)
    mask_prob = np.zeros(documents, dtype=np.float32)
    for document, (begin, end) in enumerate(itertools.pairwise(bounds)):
        slots_FS = _content_slots(document, content[begin:end], frame_index[begin:end])
        if not slots_FS.size:
            continue
        if given[document] >= len(slots_FS):
            raise ValueError(
                f"given_frames {given[document]} leaves nothing to mask in document {document}: {len(slots_FS)} frames"
            )
        slots_FS = slots_FS[given[document] :] + begin
        mask_FS, mask_prob[document] = _draw(kind, schedule, min_rate, seeds[document], *slots_FS.shape)
        masked[slots_FS[mask_FS]] = True

    hidden = torch.from_numpy(masked)
    ids = input_ids.reshape(-1)
    target = hidden & (ids >= classes[0]) & (ids < classes[1])
    return MaskedBatch(
        input_ids=torch.where(hidden, MASK, ids).view_as(input_ids),
        labels=torch.where(target, ids, IGNORED).view_as(input_ids),
        rows=target.nonzero().flatten().to(torch.int32),
        mask_prob=torch.from_numpy(mask_prob),
    )


def _draw(kind: str, schedule: str, min_rate: float, seed: int, frames: int, slots: int) -> tuple[np.ndarray, float]:
    """bool [F, S], True where masked, and the (mean) probability behind it."""
    stream = np.random.Philox(key=seed)
    times = stream.random_raw(frames if kind == "DiffForcing" else 1)
    u = torch.from_numpy((times >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))
    p = mask_ratio(schedule, u).clamp(min=min_rate)
    pool = frames * slots if kind == "random" else slots
    count = (pool * p).round().clamp(min=1)
    if kind == "tubeDecay":
        # Not rounded: a slot is masked where its rank lies below the line, so the count is rounded up (upstream).
        count = torch.linspace(float(count), float(slots), frames)
    shape = {"random": (1, pool), "DiffForcing": (frames, slots)}.get(kind, (1, slots))
    words = stream.random_raw(math.prod(shape)).reshape(shape)
    mask = _ranks(words) < count.numpy()[:, None]
    mask = mask.reshape(frames, slots) if kind == "random" else np.broadcast_to(mask, (frames, slots))
    return mask, float(p.mean())


def _ranks(words: np.ndarray) -> np.ndarray:
    """int64, same shape: the rank of each word in its row, 0 for the smallest, ties in order."""
    order = np.argsort(words, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(words.shape[1])[None], axis=1)
    return ranks


def _content_slots(document: int, content: np.ndarray, frame_index: np.ndarray) -> np.ndarray:
    """int64 [F, S], the places of a document's content slots inside the document, one row a frame."""
    places = np.flatnonzero(content)
    sizes = np.bincount(frame_index[places])
    if len(np.unique(sizes)) > 1:
        raise ValueError(f"document {document} has frames of {sizes.tolist()} content slots: they must have one size")
    return places.reshape(len(sizes), -1) if sizes.size else places.reshape(0, 0)


def _checked_layout(input_ids: Tensor, layout: FrameLayout | None) -> FrameLayout:
    if input_ids.dtype != torch.int64 or input_ids.dim() not in (1, 2) or input_ids.device.type != "cpu":
        raise ValueError(
            f"input_ids must be int64 [B, L] or [T] on the CPU (mask in the data path, then move the batch), "
            f"got {input_ids.dtype} {list(input_ids.shape)} on {input_ids.device}"
        )
    if layout is None:
        return FrameLayout.from_tokens(input_ids)
    if layout.content.device.type != "cpu" or layout.num_tokens != input_ids.numel():
        raise ValueError(
            f"layout must describe the {input_ids.numel()} tokens of input_ids on the CPU, "
            f"got {layout.num_tokens} on {layout.content.device}"
        )
    return layout


def _checked_seeds(seeds: Sequence[int], documents: int) -> list[int]:
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != documents or any(not 0 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"seeds must be {documents} integers in [0, 2^64), one a document, got {seeds}")
    return seeds


def _checked_given(given_frames: int | Sequence[int], documents: int) -> list[int]:
    given = [given_frames] * documents if isinstance(given_frames, int) else [int(k) for k in given_frames]
    if len(given) != documents or any(k < 0 for k in given):
        raise ValueError(f"given_frames must be a count >= 0, or one for each of {documents} documents, got {given}")
    return given


def _exponent(schedule: str) -> float:
    try:
        exponent = float(schedule.removeprefix("pow")) if schedule.startswith("pow") else math.nan
    except ValueError:
        exponent = math.nan
    if not 0 < exponent < math.inf:
        raise ValueError(f"schedule must be one of {', '.join(MASK_SCHEDULES)} with an exponent > 0, got {schedule!r}")
    return exponent
