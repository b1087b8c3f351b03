"""Sample folders: token ids as memory-mapped uint32 in shards of bounded size, beside a memory-mapped index.

    index.bin         a header, then a record of 72 bytes for each sample (lumos/data/index.py)
    tokens-00000.bin  uint32 little-endian, documents one after another; tokens-00001.bin and so on
    notes.jsonl       a line a sample: caption and source, which training does not read

Opening reads the header and the last record, whatever the number of samples, and makes no Python object per sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lumos.data.index import (
    CHECKED,
    HEADER,
    INDEX,
    MOST_TORN,
    NOTES,
    RECORD,
    create_index,
    intact,
    map_bytes,
    map_index,
    open_at,
    open_index,
    shard_name,
)
from lumos.data.sample import Sample, Shape
from lumos.disk import sync, try_lock
from lumos.tokens import IGNORED
from lumos_kernels.frame_layout.frames import frame_length

SHARD_TOKENS = 1 << 28  # 1 GiB: few files for many samples, and small enough to copy, check or lose one by one


@dataclass(frozen=True)
class Note:
    """What is known of a sample beside its tokens."""

    caption: str
    source: str


class SampleWriter:
    """Appends samples to a folder.

    A sample's record is written after its tokens and its note reached the disk, so a crash, or a kill at any moment,
    leaves at most a torn tail, which the next writer cuts off.

    batch: samples that are brought to the disk together; a crash loses at most the unfinished batch.
    shard_tokens: size of a shard in tokens; a longer sample has a shard of its own.
    A context manager. ValueError for malformed samples, for a folder of another layout and for a second writer.
    """

    def __init__(self, folder: str | Path, batch: int = 1, shard_tokens: int = SHARD_TOKENS) -> None:
        if not 1 <= batch <= MOST_TORN:
            raise ValueError(f"batch must be 1..{MOST_TORN} samples, got {batch}")
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens must be >= 1, got {shard_tokens}")
        self.folder, self.batch, self.shard_tokens = Path(folder), batch, shard_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        create_index(self.folder)
        self._index = open(self.folder / INDEX, "r+b")  # noqa: SIM115
        if not try_lock(self._index):
            raise ValueError(f"{self.folder} is being written already: one writer a folder at a time")
        records, _ = open_index(self.folder)
        self._keys = np.sort(records["key"])
        self._new_keys: set[int] = set()
        last = records[-1] if len(records) else np.zeros(1, RECORD)[0]
        self._shard, self._end = int(last["shard"]), int(last["offset"]) + int(last["length"])
        self._note_end = int(last["note"]) + int(last["note_length"])
        self._index.truncate(len(HEADER) + len(records) * RECORD.itemsize)
        self._index.seek(0, os.SEEK_END)
        self._tokens = open_at(self.folder / shard_name(self._shard), 4 * self._end)
        self._notes = open_at(self.folder / NOTES, self._note_end)
        self._pending: list[bytes] = []

    def add(
        self,
        ids: Tensor,
        caption: str = "",
        source: str = "",
        *,
        labels: Tensor | None = None,
        id: int | None = None,
        key: int = 0,
    ) -> Sample:
        """Checks and appends one document, integer [L]. Returns the sample as it will be read.

        labels: int64 [L], not stored: they must say what the document says, -100 before the video start and the ids
            from there on, as upstream writes them. ValueError where they say something else.
        id: of official samples, a signed 64-bit integer. key: see sample_key.
        """
        sample = Sample.from_ids(ids, caption=caption, source=source, id=id)
        shape = sample.shape
        check_labels(sample, labels)
        if id is not None and not -(2**63) <= id < 2**63:
            raise ValueError(f"id must fit 64 bits, got {id}")
        if max(shape.placeholders) >= 2**16:
            raise ValueError(f"the text holds {shape.placeholders} placeholders, more than an index record can count")
        if self._end and self._end + shape.length > self.shard_tokens:
            self._next_shard()
        tokens = sample.ids.cpu().numpy().astype("<u4").tobytes()
        note = json.dumps({"caption": caption, "source": source}).encode() + b"\n"
        record = np.zeros(1, RECORD)
        for name, value in {
            **{"offset": self._end, "note": self._note_end, "id": id or 0, "key": key, "shard": self._shard},
            **{"length": shape.length, "text": shape.text_tokens, "note_length": len(note), "frames": shape.frames},
            **{"rows": shape.rows, "cols": shape.cols, "seconds": shape.seconds, "fps": shape.fps},
            **{"frame_marks": shape.placeholders[0], "fps_marks": shape.placeholders[1], "flags": id is not None},
            "tokens_crc": zlib.crc32(tokens),
        }.items():
            record[name] = value
        record["crc"] = zlib.crc32(record.tobytes()[:CHECKED])
        self._tokens.write(tokens)
        self._notes.write(note)
        self._pending.append(record.tobytes())
        self._end += shape.length
        self._note_end += len(note)
        if key:
            self._new_keys.add(key)
        if len(self._pending) >= self.batch:
            self.flush()
        return sample

    def has(self, key: int) -> bool:
        """Whether the folder holds a sample of this key."""
        at = np.searchsorted(self._keys, np.uint64(key))
        return key in self._new_keys or bool(at < len(self._keys) and self._keys[at] == key)

    def flush(self) -> None:
        """Brings every sample to the disk: tokens and notes first, then their records."""
        if not self._pending:
            return
        for file in (self._tokens, self._notes):
            sync(file)
        records, self._pending = self._pending, []  # taken first: an interrupt here must not write them twice
        self._index.write(b"".join(records))
        sync(self._index)

    def close(self) -> None:
        self.flush()
        for file in (self._tokens, self._notes, self._index):
            file.close()

    def _next_shard(self) -> None:
        self.flush()
        self._tokens.close()
        self._shard, self._end = self._shard + 1, 0
        self._tokens = open_at(self.folder / shard_name(self._shard), 0)

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SampleFolder(Dataset[Sample]):
    """The samples of a folder written by SampleWriter, read through memory maps; a torn tail is left out.

    notes: whether samples come with caption and source, which lie in a file that nothing else reads.

    The checksums of a sample and of its record are compared when it is read; the documents themselves were checked when
    they were written. Samples that a writer adds later are not seen. Cheap to send to data workers: the maps stay here.
    Raises FileNotFoundError for a missing file, ValueError naming file and sample for a broken one, IndexError outside.
    """

    def __init__(self, folder: str | Path, notes: bool = True) -> None:
        self.folder, self.notes = Path(folder), notes
        self._records, torn = open_index(self.folder)
        self._count = len(self._records)
        self._maps: dict[str, np.ndarray] = {}
        if torn:
            warnings.warn(f"{self.folder / INDEX} is torn: {torn}", stacklevel=2)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> Sample:
        record = self._record(at)
        file = shard_name(record["shard"])
        tokens = self._bytes(file, 4 * record["offset"], 4 * record["length"], at)
        if zlib.crc32(tokens) != record["tokens_crc"]:
            raise ValueError(f"{self.folder / file}, sample {at % len(self)}: the tokens are not those once written")
        note = self.note(at) if self.notes else Note("", "")
        return Sample(
            torch.from_numpy(tokens.view("<u4").astype(np.int64)),
            *(record[name] for name in ("seconds", "fps", "frames", "rows", "cols", "text")),
            caption=note.caption,
            source=note.source,
            id=record["id"] if record["flags"] & 1 else None,
        )

    def describe(self, at: int) -> Shape:
        """The shape of sample `at`, from its record alone."""
        record = self._record(at)
        marks = (record["frame_marks"], record["fps_marks"])
        return Shape(*(record[n] for n in ("text", "seconds", "fps", "frames", "rows", "cols", "length")), marks)

    def has_placeholders(self) -> bool:
        """Return whether any text holds 65539 or 65540, from the index alone."""
        records = map_index(self.folder)[: self._count]
        return bool(records["frame_marks"].any() or records["fps_marks"].any())

    def note(self, at: int) -> Note:
        """Caption and source of sample `at`."""
        record = self._record(at)
        line = self._bytes(NOTES, record["note"], record["note_length"], at).tobytes()
        try:
            known = json.loads(line)
            return Note(known["caption"], known["source"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / NOTES}, sample {at % len(self)}: {error!r}") from error

    def _record(self, at: int) -> dict[str, int]:
        if not -len(self) <= at < len(self):
            raise IndexError(f"sample {at} of {len(self)} in {self.folder}")
        if self._records is None:
            self._records = map_index(self.folder)[: self._count]
        row = self._records[at]
        record = dict(zip(RECORD.names, row.item(), strict=True))
        video = 3 + record["frames"] * frame_length(record["rows"], record["cols"])
        if not intact(row) or record["text"] + video > record["length"]:
            raise ValueError(f"{self.folder / INDEX}, sample {at % len(self)}: the record is damaged")
        return record

    def _bytes(self, name: str, start: int, count: int, at: int) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = map_bytes(self.folder / name)
        found = self._maps[name][start : start + count]
        if len(found) != count:
            raise ValueError(f"{self.folder / name}, sample {at % len(self)}: the file ends before the sample does")
        return found

    def __iter__(self) -> Iterator[Sample]:
        return (self[at] for at in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_maps": {}, "_records": None}


def sample_key(*parts: object) -> int:
    """A number that stands for what a sample was made of, 1..2^64 - 1: two different things practically never share
    one."""
    text = json.dumps([str(part) for part in parts]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def check_labels(sample: Sample, labels: Tensor | None) -> None:
    """ValueError where labels, int64 [L], say something that a folder does not keep."""
    if labels is None:
        return
    if labels.shape != sample.ids.shape:
        raise ValueError(f"labels must be one a token: {list(labels.shape)} for {list(sample.ids.shape)}")
    expected = sample.ids.clone()
    expected[: sample.text_tokens] = IGNORED
    wrong = (labels != expected).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"labels[{at}] is {int(labels[at])}, but a folder of samples only knows labels that are {IGNORED} before "
            f"the video start, token {sample.text_tokens}, and the ids from there on"
        )
