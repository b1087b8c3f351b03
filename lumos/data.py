"""Training samples: sample folders, the official pickles, the transforms of the official data path, packing.

Legend: L tokens of a document, T tokens of a batch, B documents, R x C_ grid of a frame.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lumos.codec import VideoCodec
from lumos.tokens import (
    IGNORED,
    NUM_CODES,
    VISUAL_START,
    ByteTokenizer,
    Spans,
    Tokenizer,
    build_document,
    cut_video,
    cut_with_labels,
    drop_text,
    number,
    read_numbers,
    take_frames,
)
from lumos.video import ClipTooShortError, read_image, read_video, to_float

__all__ = [
    "Batch",
    "OfficialDataset",
    "Sample",
    "SampleFolder",
    "SampleWriter",
    "TokenizeSummary",
    "collate",
    "cut_video",
    "drop_text",
    "read_numbers",
    "read_official_sample",
    "take_frames",
    "tokenize",
]

_VOCABULARY = VISUAL_START + NUM_CODES
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Sample:
    """One document and what it shows.

    ids: int64 [L].
    seconds, fps: as written in the document; frames: latent frames of rows x cols codes.
    labels: int64 [L], ids or -100, of official samples; None elsewhere (lumos/masking.py makes the targets).
    caption, source: where known; id: of official samples.
    """

    ids: Tensor
    seconds: int
    fps: int
    frames: int
    rows: int
    cols: int
    caption: str = ""
    source: str = ""
    labels: Tensor | None = None
    id: int | None = None

    @classmethod
    def from_ids(cls, ids: Tensor, **known: object) -> Sample:
        """Checks a document, integer [L], and reads its numbers. ValueError says what is malformed."""
        spans = Spans.of(ids)
        return cls(ids.long(), spans.seconds, spans.fps, len(spans.frames), spans.rows, spans.cols, **known)

    def cut(self, fps: int, seconds: int, numbers: Mapping[int, Sequence[int]] | None = None) -> Sample:
        """cut_video on ids and labels alike."""
        ids, labels = cut_with_labels(self.ids, self.labels, fps, seconds, numbers)
        return Sample.from_ids(ids, caption=self.caption, source=self.source, labels=labels, id=self.id)

    def without_text(self) -> Sample:
        """drop_text on ids and labels alike."""
        ids = drop_text(self.ids)
        return replace(self, ids=ids, labels=None if self.labels is None else self.labels[-len(ids) :])


@dataclass(frozen=True)
class Batch:
    """Packed documents. input_ids: int64 [T]; cu_seqlens: int32 [B + 1], document b is cu_seqlens[b]..[b + 1]."""

    input_ids: Tensor
    cu_seqlens: Tensor


def collate(samples: Sequence[Sample | Tensor]) -> Batch:
    """Packs samples, or their ids int64 [L], one after the other without padding. ValueError for none."""
    if not samples:
        raise ValueError("samples is empty: a batch holds at least one document")
    rows = [sample.ids if isinstance(sample, Sample) else sample for sample in samples]
    ends = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    return Batch(torch.cat(rows).long(), ends.to(torch.int32))


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


_PLAIN_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
)


class _PlainUnpickler(pickle._Unpickler):
    """Knows only the opcodes of dicts, lists, ints and strings (protocols 2 to 5).

    No opcode that imports or calls is in the table, so no file can make it run code. The Python implementation, not
    the C one, because only its table can be narrowed, and because a forged memo index makes the C one allocate
    gigabytes.
    """

    dispatch = {op[0]: pickle._Unpickler.dispatch[op[0]] for op in _PLAIN_OPCODES}  # noqa: RUF012


def read_official_sample(path: str | Path) -> Sample:
    """One sample of the official training format: a pickle {"token": list[int], "label": list[int], "id": int}.

    Only dicts, lists, ints and strings are admitted; a file with anything else is refused before anything of it runs.
    Raises FileNotFoundError or ValueError naming the file.
    """
    data = Path(path).read_bytes()
    try:
        content = _PlainUnpickler(io.BytesIO(data)).load()
    # Malformed bytes can raise nearly anything: the opcodes trust their operands.
    except Exception as error:
        reason = "an opcode that plain data does not need" if isinstance(error, KeyError) else repr(error)
        raise ValueError(f"{path} is not a pickle of dicts, lists, ints and strings only: {reason}") from error
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
        if not isinstance(row, list) or any(type(i) is not int or not IGNORED <= i < _VOCABULARY for i in row):
            raise ValueError(f"{name} must be a list of ids")
        rows.append(torch.tensor(row, dtype=torch.int64))
    ids, labels = rows
    if len(ids) != len(labels) or ((labels != ids) & (labels != IGNORED)).any():
        raise ValueError(f"label must hold token's {len(ids)} ids or {IGNORED} in their places")
    given = content.get("id")
    if given is not None and type(given) is not int:
        raise ValueError(f"id must be an integer, got {given!r}")
    return Sample.from_ids(ids, source=source, labels=labels, id=given)


class OfficialDataset(Dataset[Sample]):
    """The official pickles that an index lists: a JSON list [{"file", "len", "id"}, ...].

    index: the JSON file. root: folder that relative file names start from; None is the index's own.
    Raises FileNotFoundError and ValueError naming the file.
    """

    def __init__(self, index: str | Path, root: str | Path | None = None) -> None:
        self.index = Path(index)
        self.root = self.index.parent if root is None else Path(root)
        try:
            entries = json.loads(self.index.read_text())
            self.files = [(self.root / entry["file"], int(entry["len"])) for entry in entries]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{index} is not a list of objects with file, len and id: {error!r}") from error

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> Sample:
        path, length = self.files[at]
        sample = read_official_sample(path)
        if len(sample.ids) != length:
            raise ValueError(f"{path} holds {len(sample.ids)} tokens, {self.index} says {length}")
        return sample


@dataclass(frozen=True)
class TokenizeSummary:
    """What tokenize wrote."""

    out: Path
    clips: int
    samples: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.out}: {self.samples} samples of {self.clips} clips, {self.tokens:,} tokens"


def tokenize(
    paths: Sequence[str | Path],
    captions: Sequence[str],
    out: str | Path,
    codec: VideoCodec,
    fps: int = 12,
    seconds: int = 2,
    size: tuple[int, int] | None = None,
    tokenizer: Tokenizer | None = None,
    windows: int = 1,
    max_pixels: int | None = None,
) -> TokenizeSummary:
    """Encodes clips into a folder of samples (appended to where it exists), with a progress bar.

    paths, captions: one caption a clip. Picture files (.png, .jpg, .jpeg, .webp, .bmp) become images, 1 s at 1 fps.
    codec: makes the codes. fps, seconds: 1..198. size, max_pixels: as in read_video.
    tokenizer: of the captions; None is the ByteTokenizer.
    windows: up to this many consecutive stretches of `seconds` of each clip, one sample each, as far as it reaches.
    Raises FileNotFoundError and ValueError naming the argument; the samples finished until then stay in the folder.
    """
    if len(paths) != len(captions):
        raise ValueError(f"captions must be one a clip: {len(captions)} for {len(paths)} clips")
    if windows < 1:
        raise ValueError(f"windows must be >= 1, got {windows}")
    number(fps, "fps"), number(seconds, "seconds")
    tokenizer = tokenizer or ByteTokenizer()
    samples = tokens = 0
    with SampleWriter(out) as writer, tqdm(total=len(paths) * windows, unit="sample", desc="tokenize") as bar:
        for path, caption in zip(paths, captions, strict=True):
            image = Path(path).suffix.lower() in _IMAGE_SUFFIXES
            text = tokenizer.encode(caption)
            for window in range(1 if image else windows):
                try:
                    pictures = (
                        read_image(path, size, max_pixels)[None]
                        if image
                        else read_video(path, fps, seconds, window * seconds, size, max_pixels)
                    )
                except ClipTooShortError:
                    if window:
                        break
                    raise
                codes = codec.encode(to_float(pictures))
                ids = build_document(text, codes, *((1, 1) if image else (seconds, fps)))
                tokens += len(writer.add(ids, caption=caption, source=str(path)).ids)
                samples += 1
                bar.update()
    return TokenizeSummary(Path(out), len(paths), samples, tokens)
