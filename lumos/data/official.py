"""The official training format: pickles of token lists, the JSON index that lists them, the YAML list of indexes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.data import Dataset

from lumos.data.pickles import read_plain
from lumos.data.sample import Sample, Shape
from lumos.tokens import IGNORED, NUM_CODES, VISUAL_START

_VOCABULARY = VISUAL_START + NUM_CODES


def read_official_sample(path: str | Path) -> Sample:
    """One sample of the official training format: a pickle {"token": list[int], "label": list[int], "id": int}.

    Only dicts, lists, ints and strings are admitted; a file with anything else is refused before anything of it runs.
    Raises FileNotFoundError or ValueError naming the file.
    """
    data = Path(path).read_bytes()
    try:
        content = read_plain(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a pickle of dicts, lists, ints and strings only: {error}") from error
    try:
        return _official_sample(content, str(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _official_sample(content: object, source: str) -> Sample:
    if not isinstance(content, dict) or not {"token", "label"} <= set(content):
        raise ValueError("expected a dict with token, label and id")
    rows = []
    for name in ("token", "label"):
        row = content[name]
        if not isinstance(row, np.ndarray) or row.min() < IGNORED or row.max() >= _VOCABULARY:
            raise ValueError(f"{name} must be a list of ids")
        rows.append(torch.from_numpy(row))
    ids, labels = rows
    if len(ids) != len(labels) or ((labels != ids) & (labels != IGNORED)).any():
        raise ValueError(f"label must hold token's {len(ids)} ids or {IGNORED} in their places")
    given = content.get("id")
    if given is not None and type(given) is not int:
        raise ValueError(f"id must be an integer, got {given!r}")
    return Sample.from_ids(ids, source=source, labels=labels, id=given)


class OfficialFiles(Dataset[Sample]):
    """Official pickles as a dataset; each is read whole and checked.

    files: their paths. lengths: how many tokens each must hold, where known, as `listing` says.
    Raises FileNotFoundError and ValueError naming the file, IndexError outside.
    """

    def __init__(
        self, files: Sequence[str | Path], lengths: Sequence[int] | None = None, listing: str | Path = "their listing"
    ) -> None:
        self.listing = listing
        self.files = [str(file) for file in files]
        self.lengths = lengths
        self._shapes = np.zeros((len(self.files), 10), np.int32)  # a row of zeros: not read yet

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> Sample:
        sample = read_official_sample(self.files[at])
        if self.lengths is not None and len(sample.ids) != self.lengths[at]:
            raise ValueError(f"{self.files[at]} holds {len(sample.ids)} tokens, {self.listing} says {self.lengths[at]}")
        self._remember(at, sample.shape)
        return sample

    def describe(self, at: int) -> Shape:
        """The shape of sample `at`: reads its file the first time, and knows it from then on."""
        if not self._shapes[at, 0]:
            self[at]
        _, *numbers, frames_marks, fps_marks = self._shapes[at].tolist()
        return Shape(*numbers, (frames_marks, fps_marks))

    def _remember(self, at: int, shape: Shape) -> None:
        self._shapes[at] = (1, *astuple(shape)[:-1], *shape.placeholders)


class OfficialDataset(OfficialFiles):
    """The official pickles that an index lists: a JSON list [{"file", "len", "id"}, ...], or one such object a line
    in a .jsonl.

    index: the JSON file. root: folder that relative file names start from. None looks for the first file from the
    index's folder, from the folders above it and from the working folder, in this order: upstream's names start from
    the folder its scripts are run in.
    Raises FileNotFoundError and ValueError naming the file.
    """

    def __init__(self, index: str | Path, root: str | Path | None = None) -> None:
        self.index = Path(index)
        text = self.index.read_bytes()
        try:
            lines = [line for line in text.splitlines() if line.strip()]
            entries = [json.loads(line) for line in lines] if self.index.suffix == ".jsonl" else json.loads(text)
            names, lengths = [entry["file"] for entry in entries], [entry["len"] for entry in entries]
            if not all(type(name) is str and "\0" not in name for name in names):
                raise TypeError("file must be a string")
            if not all(type(length) is int for length in lengths):
                raise TypeError("len must be an integer")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{index} is not a list of objects with file, len and id: {error!r}") from error
        self.root = Path(root) if root is not None else _root(self.index, names)
        super().__init__([self.root / name for name in names], lengths, index)


class OfficialMeta(Dataset[Sample]):
    """The samples of an official META list: YAML {"META": [{"path", "ratio", "type"}, ...]}, indexes one after another.

    path: an index (.json or .jsonl), relative to the list's folder, to a folder above it, or to the working folder.
    ratio: share of the index's samples that is used, 0 < ratio <= 1, default 1: int(ratio * samples) of them, drawn
    once and always the same ones (upstream draws others in each run). type: anything; upstream groups batches by it,
    it is not used here.
    Raises FileNotFoundError and ValueError naming the file and the entry.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.parts: list[tuple[OfficialDataset, np.ndarray]] = []
        for place, entry in enumerate(self._entries()):
            where = f"{self.path}, META[{place}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise ValueError(f"{where} must be a mapping with a path, got {entry!r}")
            unknown = set(entry) - {"path", "ratio", "type"}
            if unknown:
                raise ValueError(f"{where} has unknown keys {sorted(map(str, unknown))}; known: path, ratio, type")
            ratio = entry.get("ratio", 1.0)
            if type(ratio) not in (int, float) or not 0 < ratio <= 1:
                raise ValueError(f"{where}: ratio must be above 0 and at most 1, got {ratio!r}")
            index = _root(self.path, [entry["path"]]) / entry["path"]
            if index.suffix not in (".json", ".jsonl"):
                raise ValueError(f"{where}: path must be a .json or .jsonl index, got {entry['path']!r}")
            dataset = OfficialDataset(index)
            chosen = np.arange(len(dataset))
            if ratio < 1:
                chosen = np.sort(np.random.default_rng(place).permutation(chosen)[: int(ratio * len(dataset))])
            self.parts.append((dataset, chosen))
        self._ends = np.cumsum([0] + [len(chosen) for _, chosen in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, at: int) -> Sample:
        dataset, place = self._find(at)
        return dataset[place]

    def describe(self, at: int) -> Shape:
        """The shape of sample `at`, as OfficialFiles.describe."""
        dataset, place = self._find(at)
        return dataset.describe(place)

    def _find(self, at: int) -> tuple[OfficialDataset, int]:
        if not -len(self) <= at < len(self):
            raise IndexError(f"sample {at} of {len(self)}")
        at %= len(self)
        part = int(np.searchsorted(self._ends, at, "right")) - 1
        dataset, chosen = self.parts[part]
        return dataset, int(chosen[at - self._ends[part]])

    def _entries(self) -> list[object]:
        try:
            content = yaml.safe_load(self.path.read_bytes())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is not YAML: {error}") from error
        entries = content.get("META") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{self.path} must hold a list META of mappings with path, and ratio and type if wanted")
        return entries


def _root(listing: Path, names: Sequence[str]) -> Path:
    """The folder that relative names in a listing start from."""
    folders = [*listing.resolve().parents, Path.cwd()]
    if not names:
        return folders[0]
    found = next((folder for folder in folders if (folder / names[0]).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{listing}: {names[0]} is neither in its folder, nor above it, nor in the working folder"
        )
    return found
