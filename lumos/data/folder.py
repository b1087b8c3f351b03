"""Sample folders: token ids as memory-mapped uint32 beside an index."""

from __future__ import annotations

import io
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lumos.data.sample import Sample, Shape


class SampleWriter:
    """Appends samples to a folder: tokens.bin, uint32 little-endian, and index.jsonl, one line a sample.

    A sample's index line is written after its tokens reached the disk, so a crash leaves at most a torn tail, which
    the next writer cuts off. One writer a folder at a time. A context manager; ValueError for malformed samples.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {name: _size(self.folder / name) for name in (_TOKENS, _INDEX)}
        if sizes[_TOKENS] and not sizes[_INDEX]:
            raise ValueError(f"{self.folder} holds a {_TOKENS} without {_INDEX}: it would be overwritten")
        for name in sizes:
            (self.folder / name).touch()
        entries, finished = _read_index(self.folder)
        self._end = entries[-1].offset + entries[-1].length if entries else 0
        os.truncate(self.folder / _TOKENS, 4 * self._end)
        os.truncate(self.folder / _INDEX, finished)
        self._tokens = open(self.folder / _TOKENS, "ab")  # noqa: SIM115
        self._index = open(self.folder / _INDEX, "ab")  # noqa: SIM115

    def add(self, ids: Tensor, caption: str = "", source: str = "") -> Sample:
        """Checks and appends one document, integer [L]. Returns the sample as it will be read."""
        sample = Sample.from_ids(ids, caption=caption, source=source)
        if os.fstat(self._tokens.fileno()).st_size != 4 * self._end:
            raise RuntimeError(f"{self.folder / _TOKENS} changed under this writer: one writer a folder at a time")
        entry = _Entry(self._end, len(ids), *(getattr(sample, name) for name in _DESCRIPTION))
        self._tokens.write(sample.ids.cpu().numpy().astype("<u4").tobytes())
        _flush(self._tokens)
        self._index.write((json.dumps(asdict(entry)) + "\n").encode())
        _flush(self._index)
        self._end += len(ids)
        return sample

    def close(self) -> None:
        self._tokens.close()
        self._index.close()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SampleFolder(Dataset[Sample]):
    """The samples of a folder written by SampleWriter, read through a memory map; a torn tail is left out.

    Every sample is checked when it is read. Raises FileNotFoundError for a missing file, ValueError naming the file
    and the line or sample for a broken one, IndexError outside the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries, _ = _read_index(self.folder)
        self._map: np.memmap | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, at: int) -> Sample:
        entry = self.entries[at]
        if self._map is None:
            # Up to the last finished sample: a torn tail need not end on a token.
            self._map = np.memmap(
                self.folder / _TOKENS, "<u4", "r", shape=self.entries[-1].offset + self.entries[-1].length
            )
        ids = torch.from_numpy(self._map[entry.offset : entry.offset + entry.length].astype(np.int64))
        where = f"{self.folder / _TOKENS}, sample {at % len(self)}"
        try:
            sample = Sample.from_ids(ids, caption=entry.caption, source=entry.source)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for name in _DESCRIPTION:
            if getattr(sample, name) != getattr(entry, name):
                says = f"{getattr(sample, name)!r}, {_INDEX} {getattr(entry, name)!r}"
                raise ValueError(f"{where}: {name} is {says}")
        return sample

    def describe(self, at: int) -> Shape:
        """The shape of sample `at`."""
        return Shape.of(self[at].ids)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_map": None}  # a pickled map would carry the whole file to every data worker


_TOKENS, _INDEX = "tokens.bin", "index.jsonl"
_DESCRIPTION = ("seconds", "fps", "frames", "rows", "cols", "caption", "source")


@dataclass(frozen=True)
class _Entry:
    """A line of index.jsonl; offset and length in tokens."""

    offset: int
    length: int
    seconds: int
    fps: int
    frames: int
    rows: int
    cols: int
    caption: str
    source: str

    @classmethod
    def parse(cls, line: bytes, offset: int) -> _Entry:
        known = json.loads(line)
        kinds = dict.fromkeys(cls.__dataclass_fields__, int) | {"caption": str, "source": str}
        if not isinstance(known, dict) or set(known) != set(kinds):
            raise ValueError(f"expected an object with the keys {', '.join(kinds)}")
        for name, kind in kinds.items():
            if type(known[name]) is not kind or (kind is int and known[name] < (name != "offset")):
                raise ValueError(f"{name} is {known[name]!r}")
        if known["offset"] != offset:
            raise ValueError(f"offset is {known['offset']}, but the sample before ends at {offset}")
        return cls(**known)


def _read_index(folder: Path) -> tuple[list[_Entry], int]:
    """The finished samples, and the bytes of index.jsonl that describe them."""
    for name in (_TOKENS, _INDEX):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: not a folder of samples")
    tokens = (folder / _TOKENS).stat().st_size // 4
    lines = (folder / _INDEX).read_bytes().splitlines(keepends=True)
    entries: list[_Entry] = []
    finished = end = 0
    for place, line in enumerate(lines):
        last = place == len(lines) - 1
        if last and not line.endswith(b"\n"):
            break
        try:
            entry = _Entry.parse(line, end)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / _INDEX}, line {place + 1}: {error}") from error
        if entry.offset + entry.length > tokens:
            if not last:
                raise ValueError(f"{folder / _TOKENS} ends at token {tokens}, inside sample {place} of {len(lines)}")
            warnings.warn(f"{folder / _TOKENS} is torn: the last sample, {place}, is left out", stacklevel=3)
            break
        entries.append(entry)
        end, finished = entry.offset + entry.length, finished + len(line)
    return entries, finished


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _flush(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
