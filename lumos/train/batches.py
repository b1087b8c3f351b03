"""Micro-batches: which documents a training step sees, packed into streams, cut, masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumos.data import SampleFolder, collate, drop_text
from lumos.data.packing import Bin, Draw, Packer, mix, uniform
from lumos.data.sources import DataSource, Samples
from lumos.masking import MaskedBatch, mask_tokens
from lumos.train.config import TrainConfig
from lumos_kernels import FrameLayout
from lumos_kernels.token_ids import FRAME_START


@dataclass(frozen=True)
class MicroBatch:
    """Masked documents of one packed stream with their layout, on the device of the step.

    padding: tokens at the end of the stream that belong to no document of the data (pad_to_budget).
    """

    masked: MaskedBatch
    layout: FrameLayout
    padding: int = 0

    @property
    def num_targets(self) -> int:
        return self.masked.num_targets

    @property
    def num_tokens(self) -> int:
        """T, the padding included."""
        return self.layout.num_tokens

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(self.masked.to(device), self.layout.to(device), self.padding)


class PackedBatches:
    """The streams of a run, step after step without end: planned alike by every process, read where they are needed.

    A step is `options.micro_batches` streams over all processes. Streams are packed as lumos.data.packing.Packer tells:
    whole documents of any size up to options.token_budget, or options.documents of them where there is no budget.
    Sources are mixed by weight (share of the documents), each visited once an epoch in an order of its own. Which
    sample lies at place p of the run, how it is cut, whether its text is dropped, its given frames and its mask are
    functions of (options.seed, p) alone.

        plan = batches.next_plan()                                      # the same in every process
        step = [batches.load(stream) for stream in batches.own(plan)]   # what this process reads

    sources: what is done to the samples of each dataset, and the dataset.
    options: seed, token_budget, documents, micro_batches, look_ahead, pad_to_budget, too_long, text_drop, the masks'.
    classes: ids (lo, hi) that can be targets: LumosConfig.classes.
    rank, ranks: this process loads plan[rank::ranks]; a thread plans the next step and reads these streams ahead.

    A document longer than the budget is named in a ValueError: at once if it is among the samples of its source that
    are looked at here (all up to CHECKED, spread over the source; READ of sources that must read a sample to know its
    length), otherwise when its turn comes, which is look_ahead documents before it would be trained on. With
    too_long="drop" such documents are left out with a warning and counted (`dropped`); that no sample of a source fits
    is a ValueError all the same.
    """

    CHECKED, READ = 20_000, 100

    def __init__(
        self,
        sources: Sequence[tuple[DataSource, Samples]],
        options: TrainConfig,
        classes: tuple[int, int],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not sources:
            raise ValueError("sources is empty: name at least one folder of samples")
        for source, dataset in sources:
            if not len(dataset):
                raise ValueError(f"{source.path} holds no samples: tokenise clips into it with `lumos tokenize`")
        if not 0 <= rank < ranks or options.micro_batches % ranks:
            raise ValueError(
                f"micro_batches {options.micro_batches} must be a multiple of the {ranks} processes that share them, "
                f"and rank in [0, {ranks}), got {rank}"
            )
        self.sources, self.options, self.classes = list(sources), options, classes
        self._mine = slice(rank, None, ranks)
        if options.token_budget:
            self._check_lengths()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lumos-batches")
        self._packer = self._new_packer()
        self._state = self._packer.state()
        self._ahead: Future[_Ahead] | None = None
        self._loading: dict[Bin, Future[MicroBatch]] = {}

    def next_plan(self) -> list[Bin]:
        """The streams of the next step: options.micro_batches Bins, from the indices alone."""
        self._ahead = self._ahead or self._reader.submit(self._plan)
        ahead = self._ahead.result()  # raises what planning raised, now and whenever this step is asked for
        self._state, self._loading = ahead.state, ahead.loading
        self._ahead = self._reader.submit(self._plan)
        return ahead.bins

    def own(self, plan: Sequence[Bin]) -> Sequence[Bin]:
        """The streams of a plan that this process reads."""
        return plan[self._mine]

    def load(self, stream: Bin) -> MicroBatch:
        """Reads and masks one stream; on the CPU."""
        future = self._loading.pop(stream, None)
        return self._load(stream) if future is None else future.result()

    def names(self, stream: Bin) -> list[str]:
        """What its documents are called in messages."""
        return [self._named(draw.source, draw.sample) for draw in stream.documents]

    def state_dict(self) -> dict[str, Any]:
        """Where the run is after the last plan that next_plan returned: numbers, and lists of them by name (JSON)."""
        return {"order": self._order(), **self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind that plan: the next ones are, bit for bit, those of the run that made the state.

        token_budget, look_ahead, micro_batches and the number of processes may differ: every document still comes
        once an epoch. ValueError where what decides their order, the seed, the sources' sizes or weights, is another.
        """
        if state.get("order") != self._order():
            raise ValueError(
                f"the state is of other data: seed, and samples and weight of each source, were {state.get('order')}, "
                f"here they are {self._order()}"
            )
        if self._ahead is not None:
            wait([self._ahead])
        self._packer = self._new_packer()
        self._packer.load(dict(state))
        self._state, self._ahead, self._loading = self._packer.state(), None, {}

    @property
    def waste(self) -> float:
        """Share of the token budgets of all streams planned so far, earlier runs included, that no document fills."""
        room = self._state["room"]
        return 1 - self._state["tokens"] / room if room else 0.0

    @property
    def dropped(self) -> dict[str, int]:
        """Documents left out because they are longer than token_budget, by the path of their source."""
        counts = zip(self.sources, self._state["dropped"], strict=True)
        return {str(source.path): count for (source, _), count in counts}

    def _plan(self) -> _Ahead:
        """Plans a step and has this process's streams of it read; in the reader's thread."""
        bins = [self._packer.next() for _ in range(self.options.micro_batches)]
        loading = {stream: self._reader.submit(self._load, stream) for stream in self.own(bins)}
        return _Ahead(bins, self._packer.state(), loading)

    def _load(self, stream: Bin) -> MicroBatch:
        options = self.options
        ids = [self._read(draw) for draw in stream.documents]
        seeds = [mix(options.seed, _MASK, place) for place in stream.places]
        given = [self._given_frames(*pair) for pair in zip(stream.places, ids, strict=True)]
        padding = options.token_budget - stream.length if options.pad_to_budget else 0
        # In documents of their own, and short ones, so that attention over them costs next to nothing.
        pieces = torch.zeros(padding, dtype=torch.int64).split(PADDING_DOCUMENT) if padding else ()
        batch = collate([*ids, *pieces])
        layout = FrameLayout.from_tokens(batch.input_ids, batch.cu_seqlens)
        masked = mask_tokens(
            batch.input_ids,
            layout,
            seeds=seeds + [0] * len(pieces),
            kind=options.mask_kind,
            schedule=options.mask_schedule,
            min_rate=options.min_mask_rate,
            given_frames=given + [0] * len(pieces),
            classes=self.classes,
        )
        return MicroBatch(masked, layout, padding)

    def _read(self, draw: Draw) -> Tensor:
        """int64 [L], the document at a place as it is trained on."""
        source, dataset = self.sources[draw.source]
        ids = source.prepare(dataset[draw.sample], self._random(draw.place))
        ids = drop_text(ids) if self._drops_text(draw.place) else ids
        if len(ids) != draw.length:
            raise ValueError(
                f"{self._named(draw.source, draw.sample)} has {len(ids)} tokens, its description says {draw.length}"
            )
        return ids

    def _measure(self, place: int, source: int, sample: int) -> int:
        """Tokens of the document at a place, from its description."""
        prepare, dataset = self.sources[source]
        shape = prepare.prepared_shape(dataset.describe(sample), self._random(place))
        return shape.length - (shape.text_tokens if self._drops_text(place) else 0)

    def _random(self, place: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=mix(self.options.seed, _CUT, place)))

    def _drops_text(self, place: int) -> bool:
        return uniform(self.options.seed, _TEXT, place) < self.options.text_drop

    def _given_frames(self, place: int, ids: Tensor) -> int:
        """How many first frames of a document are shown: as many as asked for, but one is always left to predict."""
        seed, wanted = self.options.seed, self.options.given_frames
        most = int((ids == FRAME_START).sum()) - 1
        if not wanted or most < 1 or uniform(seed, _WHETHER_GIVEN, place) >= self.options.given_frames_prob:
            return 0
        return min(wanted, most) if wanted > 0 else 1 + mix(seed, _GIVEN, place) % most

    def _order(self) -> dict[str, Any]:
        """What decides which document lies at a place."""
        sources = [[len(dataset), float(source.weight)] for source, dataset in self.sources]
        return {"seed": self.options.seed, "sources": sources}

    def _new_packer(self) -> Packer:
        options = self.options
        return Packer(
            [len(dataset) for _, dataset in self.sources],
            [source.weight for source, _ in self.sources],
            options.seed,
            self._measure,
            budget=options.token_budget,
            look_ahead=options.look_ahead,
            documents=options.documents,
            drop=options.too_long == "drop",
            named=self._named,
        )

    def _named(self, source: int, sample: int) -> str:
        return f"sample {sample} of {self.sources[source][0].path}"

    def _check_lengths(self) -> None:
        """Names documents that are longer than the budget before the first step, where that takes little time."""
        budget = self.options.token_budget
        for number, (source, dataset) in enumerate(self.sources):
            limit = self.CHECKED if isinstance(dataset, SampleFolder) else self.READ
            picked = range(0, len(dataset), -(-len(dataset) // limit))
            random = self._random(0)
            lengths = [source.prepared_shape(dataset.describe(sample), random).length for sample in picked]
            longest = max(range(len(picked)), key=lengths.__getitem__)
            too_long = sum(length > budget for length in lengths)
            if too_long == len(dataset) or (too_long and self.options.too_long == "error"):
                raise ValueError(
                    f"{too_long} of {len(picked)} samples of {source.path} are longer than token_budget {budget}; "
                    f"{self._named(number, picked[longest])} has {lengths[longest]} tokens: raise token_budget, cut "
                    f"the videos (fps, seconds of the source), or set too_long to drop"
                )


@dataclass(frozen=True)
class _Ahead:
    """A planned step: its streams, the state behind it, the reading of this process's share."""

    bins: list[Bin]
    state: dict[str, Any]
    loading: dict[Bin, Future[MicroBatch]]


def open_sources(data: Sequence[DataSource | str | Path]) -> list[tuple[DataSource, Samples]]:
    """Sources and their samples; a bare path is a source that is trained on as it is, with weight 1."""
    sources = [source if isinstance(source, DataSource) else DataSource(source) for source in data]
    return [(source, source.open()) for source in sources]


PADDING_DOCUMENT = 1024
# What a random number of a place is for (the first word after the seed; the packer's orders have 0).
_CUT, _TEXT, _MASK, _WHETHER_GIVEN, _GIVEN = range(1, 6)
