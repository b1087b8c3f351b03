"""Micro-batches: which documents a training step sees, cut, packed and masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumos.data import collate, drop_text
from lumos.masking import MaskedBatch, mask_tokens
from lumos.train.config import TrainConfig
from lumos_kernels import FrameLayout


@dataclass(frozen=True)
class MicroBatch:
    """Masked documents of one packed stream with their layout, on the device of the step."""

    masked: MaskedBatch
    layout: FrameLayout

    @property
    def num_targets(self) -> int:
        return self.masked.num_targets

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(self.masked.to(device), self.layout.to(device))


class Batches:
    """Endless micro-batches of a dataset: every epoch visits each sample once, in an order of its own.

    Order, text drop and masks of micro-batch i are functions of (seed, i) alone.
    """

    def __init__(self, dataset: Any, config: TrainConfig, classes: tuple[int, int]) -> None:
        if not len(dataset):
            raise ValueError("data holds no samples: tokenise clips into it with `lumos tokenize`")
        self.dataset, self.config, self.classes = dataset, config, classes

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro-batch `index` >= 0, on the CPU."""
        config = self.config
        first = index * config.documents
        places = range(first, first + config.documents)
        random = np.random.default_rng([config.seed, index])
        ids = [self.dataset[self._sample(place)].ids for place in places]
        ids = [drop_text(i) if random.random() < config.text_drop else i for i in ids]
        batch = collate(ids)
        layout = FrameLayout.from_tokens(batch.input_ids, batch.cu_seqlens)
        masked = mask_tokens(
            batch.input_ids,
            layout,
            seeds=random.integers(2**63, size=config.documents).tolist(),
            kind=config.mask_kind,
            schedule=config.mask_schedule,
            min_rate=config.min_mask_rate,
            classes=self.classes,
        )
        return MicroBatch(masked, layout)

    def step(self, number: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `number` >= 0."""
        return [self[number * self.config.micro_batches + i] for i in range(self.config.micro_batches)]

    def _sample(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.dataset))
        return int(np.random.default_rng([self.config.seed, 1 << 32, epoch]).permutation(len(self.dataset))[offset])
