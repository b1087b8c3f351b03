"""What to sample and how: options, prompts, and the schedules that are known before the first step.

Legend: L tokens of a prompt, S codes of a frame, R x C_ grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

from lumos.config import LumosConfig
from lumos.kv_cache import FP8, cache_bytes
from lumos.tokens import NUMBER_BASE, VIDEO_END, VIDEO_START
from lumos_kernels.frame_layout.frames import check_documents, frame_length, frame_skeleton
from lumos_kernels.layout import FrameLayout, RowLimits
from lumos_kernels.token_ids import FRAME_END, FRAME_HEADER, FRAME_START, GRID_UNIT, MASK

TEMPERATURE_SCHEDULES = ("official", "per_frame")
WORKSPACE_BYTES = 64 * 2**20
KV_DTYPES = (torch.bfloat16, torch.float16, FP8)


@dataclass(frozen=True)
class Sampling:
    """How frames are sampled. The defaults are upstream's text-to-video; everything below `greedy` is ours.

    steps: forwards a frame. guidance_scale: classifier-free guidance; None or 1 runs the conditional branch alone.
    mask_history_ratio: share of a finished frame's content slots that are masked again before its keys and values are
        kept, evenly spaced, at least one (upstream's images use 0.3, where it changes nothing: no frame follows).
    temperature: of the Gumbel noise on the confidences, which decide what is kept; tokens are drawn at temperature 1.
    temperature_schedule: "official" multiplies it by 1 - (step + 1) / steps at every step and never resets it, so
        that only the first frame has noise; "per_frame" restarts in each frame.
    greedy: the most probable token, and no noise.

    Faster than exact, off by default (docs/generation.md has their quality):
    confidence_threshold: also keep every slot whose token had at least this probability; a frame ends early.
    guidance_interval: (from, to), parts of the steps in [0, 1], where guidance is on; elsewhere one branch runs.
    window: (sink, recent): a frame sees the text, the first `sink` frames and the last `recent` ones, in a cache of
        so many frames; documents may then be longer than max_position_embeddings.

    Smaller:
    kv_dtype: of the history's keys and values: torch.bfloat16, torch.float16 or torch.float8_e4m3fn, None for the
        model's. kv_device: where they are kept, e.g. "cpu" for a model on a GPU; alone, it changes no result.

    cuda_graphs: capture each step in the second frame and replay it from there on. Not yet run on a GPU.
    """

    steps: int = 50
    guidance_scale: float | None = 15.0
    mask_history_ratio: float = 0.7
    temperature: float = 1.0
    temperature_schedule: str = "official"
    greedy: bool = False
    confidence_threshold: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    window: tuple[int, int] | None = None
    kv_dtype: torch.dtype | None = None
    kv_device: torch.device | str | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if not _is_integer(self.steps) or self.steps < 1:
            raise ValueError(f"steps must be an integer >= 1, got {self.steps!r}")
        if self.guidance_scale is not None and not (
            _is_number(self.guidance_scale) and 0 <= self.guidance_scale < math.inf
        ):
            raise ValueError(f"guidance_scale must be None or a number >= 0, got {self.guidance_scale!r}")
        if not _is_number(self.mask_history_ratio) or not 0 <= self.mask_history_ratio <= 1:
            raise ValueError(f"mask_history_ratio must lie in [0, 1], got {self.mask_history_ratio!r}")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number >= 0, got {self.temperature!r}")
        if self.temperature_schedule not in TEMPERATURE_SCHEDULES:
            allowed = ", ".join(TEMPERATURE_SCHEDULES)
            raise ValueError(f"temperature_schedule must be one of {allowed}, got {self.temperature_schedule!r}")
        if self.confidence_threshold is not None and not (
            _is_number(self.confidence_threshold) and 0 < self.confidence_threshold <= 1
        ):
            raise ValueError(f"confidence_threshold must be None or lie in (0, 1], got {self.confidence_threshold!r}")
        interval = self.guidance_interval
        if not _are_two(interval, _is_number) or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must be (from, to) in [0, 1], got {self.guidance_interval!r}")
        if self.window is not None and (
            not _are_two(self.window, _is_integer) or min(self.window) < 0 or sum(self.window) < 1
        ):
            raise ValueError(f"window must be (sink, recent) frames >= 0, at least one in all; got {self.window!r}")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype must be None or one of {', '.join(map(str, KV_DTYPES))}, got {self.kv_dtype!r}")
        if self.kv_device is not None:
            try:
                torch.device(self.kv_device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"kv_device must be None or a torch device, got {self.kv_device!r}") from error
        if self.cuda_graphs and (self.confidence_threshold or self.kv_dtype or self.kv_device):
            raise ValueError(
                "cuda_graphs needs shapes that are known beforehand and keys that stay in place: not with "
                "confidence_threshold, kv_dtype or kv_device"
            )

    @property
    def guided(self) -> bool:
        """Whether any step needs the unconditional branch."""
        return self.guidance_scale not in (None, 1) and any(self.is_guided(step) for step in range(self.steps))

    def is_guided(self, step: int) -> bool:
        first, last = (edge * self.steps for edge in self.guidance_interval)
        return self.guidance_scale not in (None, 1) and first <= step < last

    def temperatures(self, frames: int) -> list[list[float]]:
        """The noise temperature at every step of every frame."""
        falling = [1.0 - (step + 1) / self.steps for step in range(self.steps)]
        if self.temperature_schedule == "per_frame":
            return [[self.temperature * factor for factor in falling] for _ in range(frames)]
        result, now = [], self.temperature
        for _ in range(frames):
            result.append([now := now * factor for factor in falling])
        return result


def mask_counts(steps: int, slots: int) -> list[int]:
    """How many of a frame's `slots` codes are undecided after each step; the last step decides all of them anyway.

    max(1, min(number now - 1, floor(slots cos(pi/2 (step + 1) / steps)))), cosine and product in fp32 as upstream: at
    60 degrees that is just below one half. Equal to masked_after_step of tests/golden.
    """
    now, counts = slots, []
    for step in range(steps):
        ratio = torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)
        now = max(1, min(now - 1, int((slots * ratio).floor())))
        counts.append(now)
    return counts


def forgotten_slots(ratio: float, slots: int) -> Tensor:
    """int64 [n]: the content slots of a finished frame that are masked again, n = max(1, round(ratio slots)) evenly
    spaced ones; slots that rounding lost are replaced by ones counted from the end. Products in fp32 as upstream."""
    wanted = max(1, round(ratio * slots))
    places = (torch.arange(wanted) * (slots / wanted)).round().long().clamp(0, slots - 1).unique()
    extra = [slots - 1 - n for n in range(len(places), wanted)]
    return torch.cat([places, torch.tensor(extra, dtype=torch.int64)])


@dataclass(frozen=True)
class GeneratedFrame:
    """One decided frame. document: its place in the batch; frame: counted from 0, given ones included.

    codes: int64 [R, C_], counted from 0 as codecs take them. steps: how many it took.
    """

    document: int
    frame: int
    codes: Tensor
    steps: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """One document to continue.

    ids: int64 [L] on the CPU. begin: place of its video start. given: frames that are there, of `frames` in all.
    """

    number: int
    ids: Tensor
    begin: int
    rows: int
    cols: int
    frames: int
    given: int
    seed: int

    @property
    def length(self) -> int:
        """Tokens of a frame."""
        return frame_length(self.rows, self.cols)

    @cached_property
    def skeleton(self) -> Tensor:
        """int64 [length]: a frame whose codes are all masked."""
        return frame_skeleton(self.rows, self.cols)

    @cached_property
    def code_places(self) -> Tensor:
        """int64 [S]: places of the codes in a frame."""
        return (self.skeleton == MASK).nonzero()[:, 0]

    def branches(self, sampling: Sampling) -> list[int]:
        """First token of each branch: 0, and the video start for the unconditional one where there is a text."""
        return [0, self.begin] if sampling.guided and self.begin else [0]

    def positions(self, start: int) -> Tensor:
        """int32 [3, n]: positions of the branch from `start` on, its frames to come included."""
        body = self.skeleton.repeat(self.frames - self.given)
        return FrameLayout.from_tokens(torch.cat([self.ids[start:], body])[None]).positions

    def prompt_limits(self, start: int) -> RowLimits:
        return FrameLayout.from_tokens(self.ids[None, start:]).limits

    def forgotten(self, sampling: Sampling) -> Tensor:
        """int64 [n]: places in a frame that are masked again before it becomes history."""
        return FRAME_HEADER + forgotten_slots(sampling.mask_history_ratio, self.rows * (self.cols + 1))

    def capacity(self, start: int, sampling: Sampling) -> int:
        """Tokens that the cache holds for the branch from `start` on."""
        return len(self.ids) - start + (self.slots(sampling) - self.given) * self.length

    def slots(self, sampling: Sampling) -> int:
        """Frames that the cache must hold, the one being decided included."""
        return self.frames if sampling.window is None else min(self.frames, sum(sampling.window) + 1)

    def slot(self, frame: int, sampling: Sampling) -> int:
        """Place of a frame among them: with a window, behind the sinks, that of the frame nobody sees any more."""
        if sampling.window is None or frame < sampling.window[0]:
            return frame
        sink, recent = sampling.window
        return sink + (frame - sink) % (recent + 1)

    def frame_ids(self, ids_RC: Tensor) -> Tensor:
        """int64 [length]: the frame with those ids as its codes."""
        return self.skeleton.index_copy(0, self.code_places, ids_RC.flatten().cpu())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that sampling needs at its peak: the weights, the cache of a pass (exact), and a bound of the rest."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def plan_memory(
    config: LumosConfig,
    documents: Sequence[Prompt],
    sampling: Sampling,
    dtype: torch.dtype,
    documents_per_pass: int = 1,
) -> MemoryPlan:
    """The memory of generate_tokens for these documents; where kv_device keeps the history, the cache counts there.

    cache: kv_cache.cache_bytes of every branch's prompt and frames (of sink + recent + 1 frames with a window).
    workspace: a pass of T tokens, the longest of prompts and frames, holds at its widest either four rows of
    hidden_size and three of intermediate_size, or three of hidden_size, three of all query heads and four of all kv
    heads; and the draw works in WORKSPACE_BYTES (lumos_kernels.masked_sample on CPUs). Integers of a token: 64 bytes.
    """
    cache = workspace = 0
    for begin in range(0, len(documents), documents_per_pass):
        group = documents[begin : begin + documents_per_pass]
        lanes = [(document, start) for document in group for start in document.branches(sampling)]
        tokens = sum(document.capacity(start, sampling) for document, start in lanes)
        cache = max(cache, cache_bytes(config, tokens, dtype, _storage(sampling, dtype)))
        prompts = sum(len(document.ids) - start for document, start in lanes)
        frames = sum(document.length for document, _ in lanes)
        hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        mlp = 4 * hidden + 3 * config.intermediate_size
        attention = 3 * hidden + 3 * heads + 4 * config.num_key_value_heads * config.head_dim
        row = max(mlp, attention) * dtype.itemsize + 64
        workspace = max(workspace, max(prompts, frames) * row + 16 * tokens + WORKSPACE_BYTES)
    return MemoryPlan(config.num_parameters * dtype.itemsize, cache, workspace)


def _storage(sampling: Sampling, dtype: torch.dtype) -> torch.dtype | None:
    if sampling.kv_dtype is None and sampling.kv_device is None:
        return None
    return sampling.kv_dtype or dtype


def read_prompts(
    config: LumosConfig,
    prompts: Sequence[Tensor],
    grid: tuple[int, int] | Sequence[tuple[int, int]],
    frames: int | Sequence[int],
    seed: int | Sequence[int],
    sampling: Sampling,
) -> list[Prompt]:
    """Checks the arguments of generate_tokens together. Raises ValueError naming the one that does not fit."""
    if isinstance(prompts, Tensor) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError(
            f"prompts must be a list of 1-D int64 tensors, one a document, and not empty; got {_describe(prompts)}"
        )
    size = len(prompts)
    grids = _one_each("grid", [tuple(grid)] * size if _are_two(grid, _is_integer) else grid, size)
    counts = _one_each("frames", [frames] * size if _is_integer(frames) else frames, size)
    seeds = _one_each("seed", [seed + i for i in range(size)] if _is_integer(seed) else seed, size)
    return [
        _read(config, number, prompts[number], grids[number], counts[number], seeds[number], sampling)
        for number in range(size)
    ]


def _read(
    config: LumosConfig,
    number: int,
    ids: Tensor,
    grid: tuple[int, ...],
    frames: int,
    seed: int,
    sampling: Sampling,
) -> Prompt:
    name = f"prompts[{number}]"
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype != torch.int64 or not len(ids):
        raise ValueError(f"{name} must be a 1-D int64 tensor and not empty, got {_describe(ids)}")
    if not _are_two(grid, _is_integer) or any(n < GRID_UNIT or n % GRID_UNIT for n in grid):
        raise ValueError(f"grid must be (rows, columns) of codes, positive multiples of {GRID_UNIT}; got {grid!r}")
    if not _is_integer(frames) or frames < 1:
        raise ValueError(f"frames must be an integer >= 1, got {frames!r}")
    if not _is_integer(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be integers in [0, 2^63), got {seed!r}")
    ids = ids.cpu()
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"{name} must hold ids in [0, {config.vocab_size}), got {int(ids.min())}..{int(ids.max())}")
    starts = (ids == VIDEO_START).nonzero()[:, 0].tolist()
    if len(starts) != 1 or (ids == VIDEO_END).any():
        raise ValueError(f"{name} must have one video start ({VIDEO_START}) and no video end; starts at {starts}")
    begin, given = starts[0], int((ids == FRAME_START).sum())
    prompt = Prompt(number, ids, begin, *grid, frames, given, seed)
    if given >= frames:
        raise ValueError(f"frames counts the given ones too: {name} has {given} of {frames}, which leaves none to make")
    _check_video(name, ids, prompt)
    if sampling.window is not None and given > sum(sampling.window):
        raise ValueError(f"window {sampling.window} must hold the {given} given frames of {name}")
    total = len(ids) + (frames - given) * prompt.length
    if total > config.max_position_embeddings and sampling.window is None:
        raise ValueError(
            f"{name} with {frames} frames of {grid[0]} x {grid[1]} codes is {total} tokens long, more than "
            f"max_position_embeddings {config.max_position_embeddings}: fewer frames, a smaller grid, or a window"
        )
    return prompt


def _check_video(name: str, ids: Tensor, prompt: Prompt) -> None:
    """What follows the video start: seconds, fps, whole frames of the grid."""
    header = ids[prompt.begin + 1 : prompt.begin + 3]
    if len(header) < 2 or ((header <= NUMBER_BASE) | (header >= MASK)).any():
        raise ValueError(f"{name}: the video start must be followed by seconds and fps, ids 8805..9002")
    try:
        check_documents(ids, torch.tensor([0, len(ids)]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    first = prompt.begin + 3
    places = (ids == FRAME_START).nonzero()[:, 0].tolist()
    expected = list(range(first, len(ids), prompt.length))
    ends = (ids == FRAME_END).nonzero()[:, 0].tolist()
    sizes = {tuple(GRID_UNIT * (n - NUMBER_BASE) for n in ids[at + 1 : at + 3].tolist()) for at in places}
    if sizes - {(prompt.rows, prompt.cols)}:
        raise ValueError(f"{name} gives frames of {sorted(sizes)} codes, but grid is {prompt.rows} x {prompt.cols}")
    if places != expected or len(ends) != prompt.given or (prompt.given and ends[-1] != len(ids) - 1):
        raise ValueError(f"{name}: after seconds and fps come whole frames and nothing else; frames start at {places}")
    if (ids[first:] == MASK).any():
        raise ValueError(f"{name}: given frames must not hold masked slots ({MASK})")


def _one_each(name: str, values: object, size: int) -> list:
    if not isinstance(values, Sequence):
        raise ValueError(f"{name} must be one for all {size} documents, or a list with one for each; got {values!r}")
    if len(values) != size:
        raise ValueError(f"{name} must be one for all {size} documents, or one for each; got {len(values)}")
    return list(values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_two(values: object, kind: Callable[[object], bool]) -> bool:
    return isinstance(values, (tuple, list)) and len(values) == 2 and all(map(kind, values))


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
