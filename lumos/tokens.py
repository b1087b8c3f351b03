"""Token ids of Lumos-1, text tokenizers, and documents: text and codes to ids and back.

A document is `0, text..., 8710, 9004, 8804 + seconds, 8804 + fps, frames..., 9005, 8710`; a frame of R x C_ codes is
`8197, 8804 + R/4, 8804 + C_/4, R lines of (C_ codes, 8803), 8196` (arXiv 2507.08801 and its official code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lumos_kernels.layout import (
    FRAME_END,
    FRAME_HEADER,
    FRAME_START,
    GRID_UNIT,
    MASK,
    NEW_LINE,
    NUMBER_BASE,
    TEXT_START,
    check_documents,
    frame_length,
    frame_skeleton,
)

__all__ = [
    "FRAME_END",
    "FRAME_HEADER",
    "FRAME_START",
    "GRID_UNIT",
    "MASK",
    "NEW_LINE",
    "NUMBER_BASE",
    "NUM_CODES",
    "PLACEHOLDERS",
    "SEPARATOR",
    "TEXT_START",
    "VIDEO_END",
    "VIDEO_START",
    "VISUAL_START",
    "ByteTokenizer",
    "Document",
    "TextTokenizer",
    "Tokenizer",
    "build_document",
    "load_tokenizer",
    "number",
    "parse_document",
]

SEPARATOR = 8710
VIDEO_START = 9004
VIDEO_END = 9005
VISUAL_START = 65536  # code c is the id VISUAL_START + c
NUM_CODES = 64000
PLACEHOLDERS = (65538, 65539, 65540)  # resolution, frames, fps inside the text of official samples

_NOT_TEXT = (FRAME_START, FRAME_END, NEW_LINE, MASK, VIDEO_START, VIDEO_END)
_BYTE_BASE = 16384


def number(n: int) -> int:
    """The id that writes the number n: 8804 + n, 0 < n < 199. ValueError outside."""
    if not 0 < n < MASK - NUMBER_BASE:
        raise ValueError(f"a number token holds 1..{MASK - NUMBER_BASE - 1}, got {n}")
    return NUMBER_BASE + n


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int] | Tensor) -> str: ...


class ByteTokenizer:
    """One id per UTF-8 byte, 16384 + byte: outside the special ids (below 9006) and the visual ones (from 65536).

    Serves where no checkpoint's tokenizer is at hand; a released checkpoint knows other ids.
    """

    def encode(self, text: str) -> list[int]:
        """Ids of any string, lone surrogates included; no begin of text."""
        return [_BYTE_BASE + byte for byte in text.encode("utf-8", "surrogatepass")]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The inverse of encode. ValueError for ids outside 16384..16639; bytes that are no UTF-8 become U+FFFD."""
        values = [int(i) - _BYTE_BASE for i in ids]
        wrong = next((v + _BYTE_BASE for v in values if not 0 <= v < 256), None)
        if wrong is not None:
            raise ValueError(f"ids hold {wrong}, but the byte tokenizer's are {_BYTE_BASE}..{_BYTE_BASE + 255}")
        try:
            return bytes(values).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return bytes(values).decode("utf-8", "replace")


class TextTokenizer:
    """The text tokenizer of a checkpoint, from its tokenizer.json (a file, or the folder that holds it).

    FileNotFoundError or ValueError name the file.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The library raises bare Exception for every malformed file.
        except Exception as error:
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no begin of text, no separator."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of the ids, special ones left out."""
        return self._tokenizer.decode([int(i) for i in ids])


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """TextTokenizer(path), or the ByteTokenizer for None."""
    return ByteTokenizer() if path is None else TextTokenizer(path)


@dataclass(frozen=True)
class Document:
    """What a document says.

    text_ids: int64 [n], or None where the document starts at the video (text dropped for guidance).
    seconds, fps: as written after the video start.
    codes: int64 [F, R, C_] in [0, 64000).
    """

    text_ids: Tensor | None
    seconds: int
    fps: int
    codes: Tensor


def build_document(text_ids: Sequence[int] | Tensor | None, codes: Tensor, seconds: int, fps: int) -> Tensor:
    """Ids of one document: int64 [L].

    text_ids: ids of the text without begin and separator; None starts the document at the video.
    codes: integer [F, R, C_] in [0, 64000), F >= 1, R and C_ multiples of 4.
    seconds, fps: 1..198. An image is one frame of 1 s at 1 fps.
    Raises ValueError naming the argument.
    """
    if codes.dim() != 3 or codes.is_floating_point() or 0 in codes.shape:
        raise ValueError(f"codes must be integers [F, R, C] and not empty; got {codes.dtype} {list(codes.shape)}")
    if codes.min() < 0 or codes.max() >= NUM_CODES:
        raise ValueError(f"codes must be in [0, {NUM_CODES}), got {int(codes.min())}..{int(codes.max())}")
    frames, rows, cols = codes.shape
    header = [VIDEO_START, _named_number("seconds", seconds), _named_number("fps", fps)]
    if text_ids is not None:
        text = torch.as_tensor(text_ids, dtype=torch.int64).reshape(-1)
        _check_text(text)
        header = [TEXT_START, *text.tolist(), SEPARATOR, *header]
    body = frame_skeleton(rows, cols).repeat(frames, 1)
    lines = body[:, FRAME_HEADER:-1].unflatten(1, (rows, cols + 1))
    lines[:, :, :cols] = codes.cpu().long() + VISUAL_START
    return torch.cat([torch.tensor(header), body.flatten(), torch.tensor([VIDEO_END, SEPARATOR])])


def parse_document(ids: Tensor) -> Document:
    """The inverse of build_document, for documents and for what generate_tokens returns.

    ids: integer [L]; may start at the video start instead of the text, and may lack the last separator.
    Raises ValueError saying what is wrong and where: structure, grids that differ, masked slots, ids that are no code.
    """
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"ids must be integers [L]; got {ids.dtype} {list(ids.shape)}")
    ids = ids.cpu().long()
    begin, stop = video_span(ids)
    if (stop + 1 < len(ids) and ids[stop + 1] != SEPARATOR) or stop + 2 < len(ids):
        raise ValueError(f"video end at token {stop} must be followed by one separator ({SEPARATOR}) and nothing else")
    text_ids = None
    if begin:
        if begin < 2 or ids[0] != TEXT_START or ids[begin - 1] != SEPARATOR:
            raise ValueError(f"the text before the video start must begin with {TEXT_START} and end with {SEPARATOR}")
        text_ids = ids[1 : begin - 1]
        _check_text(text_ids)
    seconds, fps = (int(value) - NUMBER_BASE for value in ids[begin + 1 : begin + 3])
    frames = ids[begin + 3 : stop]
    rows, cols = (int(value - NUMBER_BASE) * GRID_UNIT for value in frames[1:3])
    length = frame_length(rows, cols)
    frames = frames.reshape(-1, length) if len(frames) % length == 0 else None
    if frames is None or (frames[:, :FRAME_HEADER] != frames[0, :FRAME_HEADER]).any():
        raise ValueError(f"the frames of a document must share one grid; frame 0 has {rows} x {cols} codes")
    grid = frames[:, FRAME_HEADER:-1].unflatten(1, (rows, cols + 1))
    codes = grid[:, :, :cols] - VISUAL_START
    wrong = ((codes < 0) | (codes >= NUM_CODES)).nonzero()
    if len(wrong):
        frame, row, col = wrong[0].tolist()
        value = int(grid[frame, row, col])
        what = "is masked" if value == MASK else f"is {value}, not a visual id"
        raise ValueError(f"frame {frame}, row {row}, column {col} {what}; {len(wrong)} such slots")
    if (grid[:, :, cols] != NEW_LINE).any():
        raise ValueError("masked new lines: every line of codes must end with 8803")
    return Document(text_ids, seconds, fps, codes)


def video_span(ids: Tensor) -> tuple[int, int]:
    """Positions of the video start and the video end of one document, ids int64 [L] on the CPU.

    Between them lie seconds, fps and at least one frame, and nothing else; no frame lies outside. ValueError if not.
    """
    marks = [((ids == mark).nonzero().flatten().tolist(), mark) for mark in (VIDEO_START, VIDEO_END)]
    for places, mark in marks:
        if len(places) != 1:
            raise ValueError(f"a document has one video start (9004) and one video end (9005); {mark} at {places}")
    begin, stop = marks[0][0][0], marks[1][0][0]
    header = ids[begin + 1 : begin + 3]
    if len(header) < 2 or ((header <= NUMBER_BASE) | (header >= MASK)).any():
        raise ValueError(f"video start at token {begin} must be followed by seconds and fps, ids 8805..9002")
    check_documents(ids, torch.tensor([0, len(ids)]))
    at = begin + 3
    while at < stop and ids[at] == FRAME_START:
        at += frame_length(*(int(ids[at + axis] - NUMBER_BASE) * GRID_UNIT for axis in (1, 2)))
    if at != stop or at == begin + 3:
        raise ValueError(f"token {at}: expected frames from token {begin + 3} to the video end at token {stop}")
    if (ids[:begin] == FRAME_START).any() or (ids[stop:] == FRAME_START).any():
        raise ValueError("frame starts (8197) outside the video")
    return begin, stop


def _named_number(name: str, n: int) -> int:
    try:
        return number(n)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_text(text: Tensor) -> None:
    wrong = (text < 0) | (text >= VISUAL_START) | torch.isin(text, torch.tensor(_NOT_TEXT))
    wrong &= ~torch.isin(text, torch.tensor(PLACEHOLDERS))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"text_ids[{at}] is {int(text[at])}: ids of frames, videos and visual codes are no text")
