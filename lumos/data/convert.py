"""From the official training form to a folder of samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lumos.data.additions import Additions, Summary
from lumos.data.folder import check_labels, sample_key
from lumos.data.official import OfficialFiles, OfficialMeta
from lumos.data.sources import open_samples
from lumos.data.workers import WorkerDied, ordered

_BATCH = 64  # samples brought to the disk together: a crash costs their conversion, an fsync for each most of the time


def convert(inputs: Sequence[str | Path], out: str | Path, workers: int = 1, progress: bool = True) -> Summary:
    """Copies official samples into a folder, in their order, with tokens and ids as they are.

    inputs: official indexes (.json, .jsonl), META lists (.yaml, .yml; where a ratio leaves samples out, the same ones
        as training on the list does) and samples (.pkl).
    workers: processes that read the pickles, see lumos/data/workers.py.

    Nothing is lost: official labels are -100 before the video start and the ids from there on, which the document tells
    by itself, and a sample whose labels say anything else is refused. So is a damaged one. Refused samples are named in
    the summary and in out/failures.jsonl and do not stop the others. A file that the folder has a sample of is not read
    again: an interrupted run goes on where it was.
    Raises FileNotFoundError and ValueError naming an input, or the first sample where every one was refused.
    """
    files = [file for path in inputs for file in _files(path)]
    with (
        Additions(out, _BATCH) as additions,
        tqdm(total=len(files), unit="sample", desc="convert", disable=not progress) as bar,
    ):
        for file, result in ordered(_read, _wanted(files, additions, bar), workers):
            if isinstance(result, tuple):
                ids, id = result
                additions.add(file.key, ids, source=file.path, id=id)
            else:
                error = "the process that read it died" if isinstance(result, WorkerDied) else result
                additions.fail(file.key, file.path, error)
            bar.update()
    return additions.summary(len(files))


@dataclass(frozen=True)
class _File:
    """A pickle, and how many tokens its index says it holds."""

    path: str
    length: int | None
    listing: str

    @property
    def key(self) -> int:
        return sample_key(os.path.abspath(self.path))


def _files(path: str | Path) -> Iterator[_File]:
    dataset = open_samples(path)
    if isinstance(dataset, OfficialMeta):
        parts = dataset.parts
    elif isinstance(dataset, OfficialFiles):
        parts = [(dataset, range(len(dataset)))]
    else:
        raise ValueError(f"{path} is not of the official form: it is a folder of samples already")
    for part, chosen in parts:
        for at in chosen:
            yield _File(part.files[at], None if part.lengths is None else part.lengths[at], str(part.listing))


def _wanted(files: Sequence[_File], additions: Additions, bar: tqdm) -> Iterator[_File]:
    for file in files:
        if additions.wants(file.key):
            yield file
        else:
            bar.update()


def _read(file: _File) -> tuple[np.ndarray, int | None] | str:
    """The ids, uint32 [L], and the id of a sample, or why it is refused."""
    try:
        lengths = None if file.length is None else [file.length]
        sample = OfficialFiles([file.path], lengths, file.listing)[0]
        check_labels(sample, sample.labels)
    except (ValueError, OSError) as error:
        return str(error)
    return sample.ids.numpy().astype(np.uint32), sample.id
