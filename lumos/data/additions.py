"""A run that adds samples to a folder: what is there already, what is new, what failed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from lumos.data.folder import SampleWriter

FAILURES = "failures.jsonl"
_SHOWN = 10  # failures that a summary names; the file has all of them


@dataclass(frozen=True)
class Failure:
    """A source, or a stretch of it, of which no sample could be made."""

    source: str
    window: int
    error: str


@dataclass(frozen=True)
class Summary:
    """What a run wrote: samples, tokens; what it found already there: kept; and what failed."""

    out: Path
    sources: int
    samples: int
    tokens: int
    kept: int = 0
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        text = f"{self.out}: {self.samples} samples of {self.sources} sources, {self.tokens:,} tokens"
        if self.kept:
            text += f"; {self.kept} samples were there"
        if self.failures:
            text += f"; {len(self.failures)} failed, see {self.out / FAILURES}:"
            text += "".join(f"\n  {failure.source}: {failure.error}" for failure in self.failures[:_SHOWN])
        return text + ("\n  ..." if len(self.failures) > _SHOWN else "")


class Additions:
    """Writes new samples to a folder, each known by a key so that a later run does not make it again.

    A context manager. failures.jsonl in the folder has the failures of the latest run, each from the moment it happens.
    """

    def __init__(self, out: str | Path, batch: int = 1) -> None:
        self.writer = SampleWriter(out, batch)
        self.samples = self.tokens = self.kept = 0
        self.failures: list[Failure] = []
        self._pending: dict[int, int] = {}  # keys of samples being made -> how often each was asked for since
        (self.writer.folder / FAILURES).unlink(missing_ok=True)

    def wants(self, key: int) -> bool:
        """Whether the sample is neither there nor being made; if so it counts as being made from now on."""
        if self.writer.has(key):
            self.kept += 1
        elif key in self._pending:
            self._pending[key] += 1
        else:
            self._pending[key] = 0
            return True
        return False

    def add(self, key: int, ids: np.ndarray, **known: object) -> None:
        """A sample that was made, uint32 [L]; further arguments as SampleWriter.add."""
        sample = self.writer.add(torch.from_numpy(ids.astype(np.int64)), key=key, **known)
        self.samples, self.tokens = self.samples + 1, self.tokens + len(sample.ids)
        self.kept += self._pending.pop(key)

    def fail(self, key: int, source: str, error: str, window: int = 0) -> None:
        """A sample that could not be made."""
        del self._pending[key]
        self.failures.append(Failure(source, window, error))
        with open(self.writer.folder / FAILURES, "a", encoding="utf-8") as file:
            file.write(json.dumps({"source": source, "window": window, "error": error}) + "\n")

    def drop(self, key: int) -> None:
        """A sample that turned out not to exist."""
        del self._pending[key]

    def summary(self, sources: int) -> Summary:
        """ValueError where nothing but failures came of the run."""
        if self.failures and not self.samples and not self.kept:
            first = self.failures[0]
            raise ValueError(f"no sample could be made of {sources} sources; {first.source}: {first.error}")
        return Summary(self.writer.folder, sources, self.samples, self.tokens, self.kept, tuple(self.failures))

    def __enter__(self) -> Additions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()
