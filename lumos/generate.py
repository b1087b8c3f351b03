"""Frame-by-frame sampling of masked discrete diffusion (arXiv 2507.08801, section 3.5; the official sampler).

A frame starts with all codes masked. Every step computes that frame alone, against the cached keys and values of what
came before, in one ragged pass of both guidance branches; lm_head and the draw see the undecided slots only. How many
slots stay undecided after a step is known beforehand, so the shapes of step k are the same in every frame.

Legend: T tokens of a pass, N undecided slots, S codes of a frame, R x C_ grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from lumos.frame_state import FrameState, not_finite
from lumos.head import sampling_weight
from lumos.kv_cache import CompactCache, FrameCache, StaticCache
from lumos.model import Lumos
from lumos.sampling import GeneratedFrame, Prompt, Sampling, read_prompts
from lumos.stream import Stream, choose_impl
from lumos.tokens import VIDEO_END
from lumos.wrappers import unwrap_lumos
from lumos_kernels import masked_sample
from lumos_kernels.errors import NotFiniteError
from lumos_kernels.layout import RowLimits
from lumos_kernels.masked_sample.philox import exponentials
from lumos_kernels.token_ids import MASK

# Confidence is compared by its logarithm, where upstream cuts it off.
SMALLEST_CONFIDENCE = 1e-20
# The words that make the confidence noise are those of counters no draw uses.
NOISE_COUNTERS = 1 << 62


def generate_tokens(
    model: Lumos,
    prompts: Sequence[Tensor],
    grid: tuple[int, int] | Sequence[tuple[int, int]],
    frames: int | Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    documents_per_pass: int = 1,
    progress: bool = False,
    **options: object,
) -> list[Tensor]:
    """Samples the frames of a batch of documents: for each, int64 [L] from its video start to its video end.

    Args:
        model: a Lumos, also inside peft, DDP or torch.compile. Evaluation mode is not needed; its dropout is off.
        prompts: for each document int64 [n] on any device: text, video start, seconds, fps, and any given frames,
            which are kept as they are. A prompt that begins at the video start has no text and needs no guidance.
        grid: (rows, columns) of codes, multiples of 4; one for all, or one a document.
        frames: latent frames in all, the given ones included; one for all, or one a document.
        seed: of all random numbers. An integer gives document i the seed `seed + i`; or one in [0, 2^63) a document.
        documents_per_pass: how many documents share the passes through the network. With 1 a document's result is,
            bit for bit, what it is alone: in a larger pass the matrix products of a library may round differently.
        progress: show a bar of steps on stderr.
        options: fields of lumos.sampling.Sampling: steps, guidance_scale, mask_history_ratio, temperature,
            temperature_schedule, greedy, and those that are faster than exact.

    Raises ValueError naming the argument, its value and what is allowed, a document longer than
    max_position_embeddings included. Raises NotFiniteError, a ValueError, where the logits of a frame hold NaN or an
    infinity; it names document, frame and step, and the first weight that is not finite.

    Source: official generate_maskedAR_mmrope_v8_newcache; equal to it token for token on tests/golden (greedy, fp32).
    """
    model = unwrap_lumos(model)
    first = model.config.visual_start
    documents = read_prompts(model.config, prompts, grid, frames, seed, Sampling(**options))
    pieces = [[document.ids[document.begin :]] for document in documents]
    made = generate_frames(
        model, prompts, grid, frames, seed=seed, documents_per_pass=documents_per_pass, progress=progress, **options
    )
    for result in made:
        pieces[result.document].append(documents[result.document].frame_ids(result.codes + first))
    end = torch.tensor([VIDEO_END])
    return [torch.cat([*piece, end]) for piece in pieces]


def generate_frames(
    model: Lumos,
    prompts: Sequence[Tensor],
    grid: tuple[int, int] | Sequence[tuple[int, int]],
    frames: int | Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    documents_per_pass: int = 1,
    progress: bool = False,
    **options: object,
) -> Iterator[GeneratedFrame]:
    """Yields every frame as soon as it is decided; arguments and errors as of generate_tokens.

    Given frames are not yielded. Documents of one pass advance together, passes follow one another. The arguments are
    checked by this call, before the first frame is asked for.
    """
    model = unwrap_lumos(model)
    sampling = Sampling(**options)
    documents = read_prompts(model.config, prompts, grid, frames, seed, sampling)
    if isinstance(documents_per_pass, bool) or not isinstance(documents_per_pass, int) or documents_per_pass < 1:
        raise ValueError(f"documents_per_pass must be an integer >= 1, got {documents_per_pass!r}")
    device = next(model.parameters()).device
    if sampling.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a model on a CUDA device, this one is on {device}")
    return _frames(model, documents, sampling, documents_per_pass, progress)


def _frames(
    model: Lumos, documents: list[Prompt], sampling: Sampling, documents_per_pass: int, progress: bool
) -> Iterator[GeneratedFrame]:
    training = model.training
    total = sampling.steps * sum(document.frames - document.given for document in documents)
    model.eval()
    try:
        with tqdm(total=total, unit="step", disable=not progress) as bar:
            for start in range(0, len(documents), documents_per_pass):
                group = _Group(model, documents[start : start + documents_per_pass], sampling)
                yield from group.run(bar)
    finally:
        model.train(training)


class _Lane:
    """One branch of one document: the tokens from `start` of the document on, and its run of the cache.

    base, capacity: where its run begins and how long it is. positions: int32 [3, n] of prompt and all frames.
    """

    def __init__(self, document: Prompt, start: int, base: int, sampling: Sampling, device: torch.device) -> None:
        self.document, self.start, self.base = document, start, base
        self.prefix = len(document.ids) - start - document.given * document.length
        self.capacity = document.capacity(start, sampling)
        self.positions = document.positions(start).to(device)

    def slot(self, frame: int, sampling: Sampling) -> int:
        """Place in the cache of the frame's first token."""
        return self.base + self.prefix + self.document.slot(frame, sampling) * self.document.length

    def visible(self, frame: int, sampling: Sampling) -> int:
        """One past the last place in the cache that the frame's tokens see: all frames kept so far, and itself."""
        frames = min(frame + 1, self.document.slots(sampling))
        return self.base + self.prefix + frames * self.document.length


class _Pass:
    """Inputs of a forward of one frame of some lanes, in tensors that are refilled and never replaced.

    A CUDA graph captured with them serves every frame: which keys are visible, where new ones go and which positions
    they have is data, not shape.
    """

    def __init__(self, group: _Group, lanes: Sequence[_Lane]) -> None:
        self.model, self.lanes, self.cache, self.sampling = group.model, lanes, group.cache, group.sampling
        device, self.keys = group.device, group.tokens
        lengths = [lane.document.length for lane in lanes]
        total = sum(lengths)
        self.offsets = [sum(lengths[:i]) for i in range(len(lanes))]
        self.rows = torch.zeros(total, dtype=torch.int64, device=device)
        zeros = torch.zeros(total, dtype=torch.int32, device=device)
        limits = RowLimits.from_kv(zeros.clone(), zeros.clone(), self.keys)
        self.stream = Stream(zeros.expand(3, -1).clone(), limits, self.model.impl, self.cache)
        self.used = self.keys

    def aim(self, round_: int) -> None:
        """Fills the inputs for frame given + round_ of every lane's document."""
        starts, ends, rows, positions = [], [], [], []
        for lane in self.lanes:
            document, frame = lane.document, lane.document.given + round_
            slot, length = lane.slot(frame, self.sampling), document.length
            ends += [lane.visible(frame, self.sampling)] * length
            starts += [lane.base] * length
            rows.append(torch.arange(slot, slot + length))
            at = lane.prefix + frame * length
            positions.append(lane.positions[:, at : at + length])
        filled = RowLimits.from_kv(torch.tensor(starts), torch.tensor(ends), self.keys)
        for name in ("kv_start", "kv_end", "q_start", "q_end"):
            getattr(self.stream.limits, name).copy_(getattr(filled, name))
        self.rows.copy_(torch.cat(rows))
        self.stream.positions.copy_(torch.cat(positions, 1))
        self.used = max(ends)  # what a cache need not unpack

    def forward(self, frame_ids: dict[Prompt, Tensor], keep: bool) -> Tensor:
        """Hidden states [T, C] of the lanes' frames, given the ids of each document's frame."""
        self.cache.rows, self.cache.keep, self.cache.used = self.rows, keep, self.used
        return self.model.model(torch.cat([frame_ids[lane.document] for lane in self.lanes]), self.stream)


class _Group:
    """Documents that go through the network together, and their cache."""

    def __init__(self, model: Lumos, documents: Sequence[Prompt], sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.device = next(model.parameters()).device
        self.weight, self.first, dtype = sampling_weight(model)
        autocast = torch.is_autocast_enabled(self.device.type)  # keys and values come out of matrix products
        self.dtype = torch.get_autocast_dtype(self.device.type) if autocast else dtype
        self.classes = tuple(end - self.first for end in model.config.classes)
        self.documents = list(documents)
        self.lanes: list[_Lane] = []
        self.tokens = 0  # of the cache
        for document in documents:
            for start in document.branches(sampling):
                self.lanes.append(_Lane(document, start, self.tokens, sampling, self.device))
                self.tokens += self.lanes[-1].capacity
        self.cache = self._allocate(self.tokens)
        self.state = {document: FrameState(document, sampling, self.device) for document in documents}

    def _allocate(self, tokens: int) -> FrameCache:
        storage, home = self.sampling.kv_dtype, self.sampling.kv_device
        if storage is None and home is None:
            return StaticCache(self.model.config, tokens, self.dtype, self.device)
        home = None if home is None else torch.device(home)
        return CompactCache(self.model.config, tokens, self.dtype, self.device, storage or self.dtype, home)

    @torch.no_grad()
    def _prefill(self) -> None:
        """Keys and values of every lane's prompt, given frames included and unmasked (upstream's re-masking of them
        has no effect on its cache)."""
        ids, rows, starts, ends, positions = [], [], [], [], []
        for lane in self.lanes:
            prompt = lane.document.ids[lane.start :]
            limits = lane.document.prompt_limits(lane.start)
            ids.append(prompt)
            rows.append(torch.arange(lane.base, lane.base + len(prompt)))
            starts.append(limits.kv_start + lane.base)
            ends.append(limits.kv_end + lane.base)
            positions.append(lane.positions[:, : len(prompt)])
        limits = RowLimits.from_kv(torch.cat(starts), torch.cat(ends), self.tokens).to(self.device)
        self.cache.rows, self.cache.keep = torch.cat(rows).to(self.device), True
        self.cache.used = int(limits.kv_end[-1])
        self.model.model(
            torch.cat(ids).to(self.device), Stream(torch.cat(positions, 1), limits, self.model.impl, self.cache)
        )

    def run(self, bar: tqdm) -> Iterator[GeneratedFrame]:
        """Decides frame after frame of all documents."""
        self._prefill()
        decoder = _Decoder(self, self.documents)
        for round_, temperatures in enumerate(self.sampling.temperatures(max(map(_to_make, self.documents)))):
            active = [document for document in self.documents if round_ < _to_make(document)]
            if active != decoder.documents:
                decoder = _Decoder(self, active)
            decoder.decide(round_, temperatures, bar)
            decoder.check(round_)
            if any(round_ + 1 < _to_make(document) for document in active):
                decoder.remember()
            for document in active:
                yield self.state[document].result(document.given + round_, self.model.config.visual_start)


def _to_make(document: Prompt) -> int:
    return document.frames - document.given


class _Decoder:
    """Decides one frame of each of its documents at a time."""

    def __init__(self, group: _Group, documents: list[Prompt]) -> None:
        self.group, self.documents, self.sampling = group, documents, group.sampling
        self.model, self.state = group.model, [group.state[document] for document in documents]
        lanes = [lane for lane in group.lanes if lane.document in documents]
        self.all = _Pass(group, lanes)
        conditional = [lane for lane in lanes if lane.start == 0]
        alone = len(conditional) == len(lanes)
        self.conditional = self.all if alone else _Pass(group, conditional)
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    @torch.no_grad()
    def decide(self, round_: int, temperatures: Sequence[float], bar: tqdm) -> None:
        """All steps of one frame. temperatures: of the confidence noise, one a step."""
        sampling, steps = self.sampling, self.sampling.steps
        self.all.aim(round_)
        self.conditional.aim(round_)
        for state in self.state:
            state.begin()
        for step in range(steps):
            if not any(len(state.undecided[step]) for state in self.state):
                bar.update((steps - step) * len(self.documents))
                return
            for state in self.state:
                frame = state.document.given + round_
                state.counter.fill_((frame * steps + step) * state.document.length)
                state.temperature.fill_(temperatures[step])
                state.steps_taken += bool(len(state.undecided[step]))
            if sampling.cuda_graphs:
                self._replay(step)
            else:
                try:
                    self._step(step)
                except NotFiniteError as error:  # the op's own, on the CPU
                    raise self._not_finite(self._owner(error.row, step), round_, step) from error
            bar.update(len(self.documents))

    def _owner(self, row: int, step: int) -> FrameState:
        """The document that one of the step's undecided rows belongs to."""
        ends = itertools.accumulate(len(state.undecided[step]) for state in self.state)
        return next(state for state, end in zip(self.state, ends, strict=True) if row < end)

    def check(self, round_: int) -> None:
        """Raise NotFiniteError where a step of the frame had NaN for a confidence. Reads the device once a frame."""
        failed = torch.stack([state.failed for state in self.state]).tolist()
        for state, step in zip(self.state, failed, strict=True):
            if step < self.sampling.steps:
                raise self._not_finite(state, round_, step)

    def _not_finite(self, state: FrameState, round_: int, step: int) -> NotFiniteError:
        return not_finite(self.model, state.document.number, state.document.given + round_, step)

    @torch.no_grad()
    def remember(self) -> None:
        """Puts the frame's keys and values into the cache, computed from the partly re-masked frame."""
        self.all.forward({state.document: state.remembered() for state in self.state}, keep=True)

    def _step(self, step: int) -> None:
        """One step of every document. Reads undecided[step], writes ids and undecided[step + 1] and nothing else, so
        that doing it twice does no harm."""
        states, sampling = self.state, self.sampling
        guided = sampling.is_guided(step)
        pass_ = self.all if guided else self.conditional
        for state in states:
            state.ids.index_fill_(0, state.undecided[step], MASK)
        hidden_TC = pass_.forward({state.document: state.ids for state in states}, keep=False)

        branches: dict[Prompt, list[Tensor]] = {state.document: [] for state in states}
        for lane, offset in zip(pass_.lanes, pass_.offsets, strict=True):
            places = self.group.state[lane.document].undecided[step] + offset
            branches[lane.document].append(hidden_TC[places])
        conditional = torch.cat([branches[state.document][0] for state in states])
        # A document without text is its own unconditional branch.
        unconditional = torch.cat([branches[state.document][-1] for state in states]) if guided else None
        if guided and conditional.dtype == torch.float32:
            # lm_head is linear: guiding the hidden states instead of the logits halves its product. In 16 bits the
            # guided states would be rounded, up to `guidance_scale` times as coarsely as their logits.
            conditional = unconditional + sampling.guidance_scale * (conditional - unconditional)
            unconditional = None
        ids, confidence = masked_sample(
            conditional,
            unconditional,
            self.group.weight,
            classes=self.group.classes,
            guidance_scale=None if unconditional is None else sampling.guidance_scale,
            greedy=sampling.greedy,
            row_keys=torch.cat([state.row_keys(state.undecided[step]) for state in states]),
            impl=choose_impl(self.model.impl, "masked_sample"),
        )
        sizes = [len(state.undecided[step]) for state in states]
        for state, new, sure in zip(states, ids.split(sizes), confidence.split(sizes), strict=True):
            state.put(step, new + self.group.first if self.group.first else new, sure)
            if step + 1 < sampling.steps:
                self._keep_least_confident(state, step, sure)

    def _keep_least_confident(self, state: FrameState, step: int, confidence: Tensor) -> None:
        """Chooses the slots that stay undecided after this step; ties go to the lower slot."""
        places = state.undecided[step]
        score = confidence.clamp_min(SMALLEST_CONFIDENCE).log()
        if not self.sampling.greedy:
            keys = state.row_keys(places)
            keys[:, 1] |= NOISE_COUNTERS
            # A variate of an exponential is infinite once in 2^25: times a temperature of 0 it would be no number.
            gumbel = -exponentials(keys, 1)[:, 0].clamp_max(88.0).log()
            score = score + state.temperature * gumbel
        left = score.argsort(stable=True)[: min(state.left[step + 1], max(1, len(places) - 1))]
        threshold = self.sampling.confidence_threshold
        if threshold is None:
            state.undecided[step + 1].copy_(places[left].sort().values)
        else:
            state.undecided[step + 1] = places[left[confidence[left] < threshold]].sort().values

    def _replay(self, step: int) -> None:
        """The step as a CUDA graph: run eagerly in the first frame, captured in the second, replayed from then on."""
        if step not in self.graphs:
            self._step(step)
            self.graphs[step] = None
            return
        if self.graphs[step] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(step)
            self.graphs[step] = graph
        self.graphs[step].replay()
