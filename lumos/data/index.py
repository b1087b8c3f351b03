"""The index of a sample folder: fixed-size records, mapped, with what a crash may leave of them."""

from __future__ import annotations

import io
import os
import zlib
from bisect import bisect_right
from pathlib import Path

import numpy as np

from lumos.disk import sync, sync_path

INDEX, NOTES = "index.bin", "notes.jsonl"
HEADER = b"LUMOSIDX\x01".ljust(64, b"\0")  # the version is the ninth byte
MOST_TORN = 1024  # records of an unfinished batch that a power failure may leave as zeros

# In tokens: offset (in the shard), length, text (up to the video start). In bytes: note, note_length (in notes.jsonl).
# tokens_crc: CRC-32 of the sample's bytes; crc: of the record before it. key: what resumed runs recognise a sample by,
# 0 for nothing. flags: 1 where the sample has an id.
RECORD = np.dtype(
    [("offset", "<u8"), ("note", "<u8"), ("id", "<i8"), ("key", "<u8")]
    + [(name, "<u4") for name in ("shard", "length", "text", "note_length", "frames", "tokens_crc")]
    + [("frame_marks", "<u2"), ("fps_marks", "<u2"), ("rows", "<u2"), ("cols", "<u2")]
    + [("seconds", "u1"), ("fps", "u1"), ("flags", "<u2"), ("crc", "<u4")]
)
CHECKED = RECORD.itemsize - 4


def create_index(folder: Path) -> None:
    """An index of no samples where there is none, complete at once."""
    if (folder / INDEX).exists():
        return
    _refuse_old(folder)
    stray = next(folder.glob("tokens*.bin"), None)
    if stray is not None:
        raise ValueError(f"{folder} holds a {stray.name} without {INDEX}: it would be overwritten")
    beginning = folder / f"{INDEX}.{os.getpid()}"
    with open(beginning, "wb") as file:
        file.write(HEADER)
        sync(file)
    os.replace(beginning, folder / INDEX)
    sync_path(folder)


def _refuse_old(folder: Path) -> None:
    if (folder / "index.jsonl").exists():
        raise ValueError(f"{folder} holds index.jsonl, the layout of earlier versions: tokenise into a new folder")


def open_index(folder: Path) -> tuple[np.ndarray, str]:
    """The records of the finished samples, and what was left out of a torn tail ("" for nothing)."""
    if not (folder / INDEX).is_file():
        _refuse_old(folder)
        raise FileNotFoundError(f"{folder / INDEX} is missing: not a folder of samples")
    records = map_index(folder)
    there = len(records)
    count = there
    # A power failure can leave the end of a file as zeros. Records never are: their length is not 0.
    while count > max(0, there - MOST_TORN) and not records[count - 1].tobytes().strip(b"\0"):
        count -= 1
    if count and not intact(records[count - 1]) and not records[count - 1]["crc"]:
        count -= 1  # the zeros began inside it
    if count and _missing(folder, records[count - 1]):
        count -= 1
    for last in _last_in_shards(folder, records[:count]):
        missing = _missing(folder, records[last])
        if missing:
            raise ValueError(f"{missing} ends before sample {last} of {there} does")
    left = f"the last sample, {count}, is" if count == there - 1 else f"samples {count} to {there - 1} are"
    return records[:count], "" if count == there else f"{left} left out"


def intact(record: np.void) -> bool:
    """Whether a record is as it was written."""
    return zlib.crc32(record.tobytes()[:CHECKED]) == record["crc"]


def _missing(folder: Path, record: np.void) -> Path | None:
    """The file that ends before a sample, or its note, does."""
    needed = {
        shard_name(int(record["shard"])): 4 * (int(record["offset"]) + int(record["length"])),
        NOTES: int(record["note"]) + int(record["note_length"]),
    }
    for name, size in needed.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < size:
            return folder / name
    return None


def map_index(folder: Path) -> np.ndarray:
    index = map_bytes(folder / INDEX)
    if len(index) < len(HEADER) or index[: len(HEADER)].tobytes() != HEADER:
        raise ValueError(f"{folder / INDEX} is no index of samples of this version")
    rest = index[len(HEADER) :]
    return rest[: len(rest) // RECORD.itemsize * RECORD.itemsize].view(RECORD)


def _last_in_shards(folder: Path, records: np.ndarray) -> list[int]:
    """The last sample of each shard, by bisection: no pass over the records."""
    found: list[int] = []
    while len(records) and (not found or found[-1] < len(records) - 1):
        after = bisect_right(range(len(records)), len(found), key=lambda at: int(records[at]["shard"]))
        if after <= (found[-1] + 1 if found else 0):
            raise ValueError(
                f"{folder / INDEX}: sample {after} is not in shard {len(found)}, the next one: a damaged record"
            )
        found.append(after - 1)
    return found


def shard_name(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def map_bytes(path: Path) -> np.ndarray:
    """The bytes of a file, mapped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a folder of samples")
    return np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, np.uint8)


def open_at(path: Path, size: int) -> io.BufferedRandom:
    """A file opened for writing at `size`, with what lies behind cut off."""
    if not path.exists():
        path.touch()
        sync_path(path.parent)
    file = open(path, "r+b")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file
