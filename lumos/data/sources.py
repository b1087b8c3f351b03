"""What a training run reads: data sources, and the samples behind a path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Protocol

import numpy as np
from torch import Tensor

from lumos.data.folder import SampleFolder
from lumos.data.official import OfficialDataset, OfficialFiles, OfficialMeta
from lumos.data.sample import Sample, Shape
from lumos.options import to_options
from lumos.placeholders import DIGITS, check_text, checked_numbers, known_numbers, replace_placeholders
from lumos.tokens import VISUAL_START, Cut, cut_with_labels, number

CROPS = ("start", "random")
AUTO = "auto"


class Samples(Protocol):
    """A dataset of samples that also tells their shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> Sample: ...

    def describe(self, at: int) -> Shape:
        """The shape of sample `at`, without its tokens where the format allows."""
        ...


def open_samples(path: str | Path) -> Samples:
    """The samples behind a path.

    A folder written by SampleWriter, its notes left unread; an official index (.json or .jsonl), META list (.yaml or
    .yml) or sample (.pkl).
    Raises FileNotFoundError and ValueError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        return SampleFolder(path, notes=False)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a folder of samples or a file of the official form")
    kind = {".json": OfficialDataset, ".jsonl": OfficialDataset, ".yaml": OfficialMeta, ".yml": OfficialMeta}
    if path.suffix == ".pkl":
        return OfficialFiles([path])
    if path.suffix not in kind:
        raise ValueError(f"{path} is neither a folder of samples nor a .json, .jsonl, .yaml, .yml or .pkl file")
    return kind[path.suffix](path)


@dataclass(frozen=True)
class DataSource:
    """Samples of a training run, and what is done to each of them before masking.

    path: what open_samples takes.
    weight: share of this source's documents among those of all sources, > 0.
    fps, seconds: the duration that videos are cut to, as cut_video does it; None keeps the document's. Images stay.
    crop: which latent frames stay: "start", the first ones, as upstream; "random", a window that starts at any latent
        frame. Only the first latent frame of a clip holds a single picture, each later one holds four: a window that
        does not start at 0 begins with a latent frame of four pictures, which is not how a generated clip begins.
    numbers: the ids that replace the placeholders 65539 (pictures) and 65540 (fps) in official texts, also in sample
        folders made of them. "auto" and "digits" are the digits of the released tokenizer (see read_numbers); a table
        or the path of one gives other ids. A text that then still holds a visual id is refused. "none" or None leaves
        every text as it is.
    """

    path: str | Path
    weight: float = 1.0
    fps: int | None = None
    seconds: int | None = None
    crop: str = "start"
    numbers: str | Path | Mapping[int, Sequence[int]] | None = AUTO

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, Path)) or not str(self.path):
            raise ValueError(f"path must name a folder or a file of samples, got {self.path!r}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be a finite number above 0, got {self.weight!r}")
        for name in ("fps", "seconds"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name} must be a whole number or None, got {value!r}")
            if value is not None:
                number(value, name)
        if self.crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {self.crop!r}")
        if self.numbers == "" or not isinstance(self.numbers, (str, Path, Mapping, NoneType)):
            raise ValueError(f"numbers must be 'auto', 'digits', 'none', a table or a path, got {self.numbers!r}")
        if isinstance(self.numbers, Mapping):
            object.__setattr__(self, "numbers", checked_numbers(self.numbers, "numbers"))
        elif self.numbers == "none":
            object.__setattr__(self, "numbers", None)

    def open(self) -> Samples:
        """open_samples(path)."""
        return open_samples(self.path)

    def prepare(self, sample: Sample, random: np.random.Generator) -> Tensor:
        """The document of a sample as training sees it, int64 [L'], and as long as prepared_shape says with the same
        generator. ValueError as in cut_video, naming the sample's source."""
        try:
            cut, start = self._cut(sample.frames, sample.seconds, sample.fps, random)
            ids, begin, seconds, fps = sample.ids, sample.text_tokens, sample.seconds, sample.fps
            if cut is not None:
                ids, seconds, fps = (
                    cut_with_labels(ids, None, sample.spans, cut.fps, cut.seconds, None, start)[0],
                    cut.seconds,
                    cut.fps,
                )
            if self.numbers is None or not (ids[:begin] >= VISUAL_START).any():
                return ids
            before = len(ids)
            ids = replace_placeholders(ids, None, begin, seconds, fps, self._table())[0]
            check_text(ids, begin + len(ids) - before)
            return ids
        except ValueError as error:
            raise ValueError(f"{sample.source or self.path}: {error}") from error

    def prepared_shape(self, shape: Shape, random: np.random.Generator) -> Shape:
        """The shape of what prepare returns; takes the same draws from the generator. ValueError likewise."""
        try:
            cut, _ = self._cut(shape.frames, shape.seconds, shape.fps, random)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if cut is not None:
            shape = shape.with_frames(cut.frames, cut.seconds, cut.fps)
        if self.numbers is None or not any(shape.placeholders):
            return shape
        numbers, lengths = self._table(), []
        for value, count in zip((shape.seconds * shape.fps, shape.fps), shape.placeholders, strict=True):
            if count and value not in numbers:
                raise ValueError(f"numbers has no ids for {value}")
            lengths.append(len(numbers[value]) if count else 0)
        return shape.with_numbers(lengths)

    def _cut(self, frames: int, seconds: int, fps: int, random: np.random.Generator) -> tuple[Cut | None, int]:
        """The cut, None for none, and the latent frame it starts at."""
        if self.fps is None and self.seconds is None:
            return None, 0
        cut = Cut.of(frames, seconds, fps, self.fps or fps, self.seconds or seconds)
        return cut, int(random.integers(cut.starts)) if self.crop == "random" else 0

    def _table(self) -> Mapping[int, Sequence[int]]:
        if isinstance(self.numbers, Mapping):
            return self.numbers
        return known_numbers(DIGITS if self.numbers == AUTO else self.numbers)


def trains_alike(source: DataSource, other: DataSource) -> bool:
    """Return True where two sources give the same documents, however their `numbers` are spelled.

    "auto" is "digits". All spellings are alike for a sample folder whose texts have no placeholders, which its index
    tells; official samples count as having some.
    """
    if to_options(replace(source, numbers=None)) != to_options(replace(other, numbers=None)):
        return False
    ways = [to_options(DIGITS if one.numbers == AUTO else one.numbers) for one in (source, other)]
    if ways[0] == ways[1]:
        return True
    return Path(source.path).is_dir() and not SampleFolder(source.path, notes=False).has_placeholders()
