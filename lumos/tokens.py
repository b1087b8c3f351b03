"""Token ids of Lumos-1, text tokenizers, and documents: text and codes to ids and back.

A document is `0, text..., 8710, 9004, 8804 + seconds, 8804 + fps, frames..., 9005, 8710`; a frame of R x C_ codes is
`8197, 8804 + R/4, 8804 + C_/4, R lines of (C_ codes, 8803), 8196` (arXiv 2507.08801 and its official code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lumos.placeholders import IGNORED, PLACEHOLDERS, replace_placeholders
from lumos.placeholders import read_numbers as read_numbers  # public here
from lumos_kernels.frame_layout.frames import TIME_STRIDE, check_documents, frame_length, frame_skeleton
from lumos_kernels.token_ids import (
    FRAME_END,
    FRAME_HEADER,
    FRAME_START,
    GRID_UNIT,
    MASK,
    NEW_LINE,
    NUM_CODES,
    NUMBER_BASE,
    SEPARATOR,
    TEXT_START,
    VIDEO_END,
    VIDEO_START,
    VISUAL_START,
)
from lumos_kernels.token_ids import VISUAL_CLASSES as VISUAL_CLASSES  # every id is public here too

_NOT_TEXT = (FRAME_START, FRAME_END, NEW_LINE, MASK, VIDEO_START, VIDEO_END)
_BYTE_BASE = 16384
_LARGEST_NUMBER = MASK - NUMBER_BASE - 1


def number(n: int, name: str = "n") -> int:
    """The id that writes the number n: 8804 + n, 0 < n < 199. ValueError outside, with the argument's name."""
    if not 0 < n <= _LARGEST_NUMBER:
        raise ValueError(f"{name} must be 1..{_LARGEST_NUMBER} to fit a number token, got {n}")
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


def latent_frames(pictures: int) -> int:
    """Latent frames of a clip: ceil((pictures - 1) / 4) + 1; the first holds one picture, each later one four."""
    return -(-(pictures - 1) // TIME_STRIDE) + 1


@dataclass(frozen=True)
class Spans:
    """Where the parts of a document lie, and what its headers say.

    begin, stop: positions of the video start and of the video end.
    frames: (start, end) of each frame, from its 8197 to one past its 8196; all of rows x cols codes.
    """

    begin: int
    stop: int
    seconds: int
    fps: int
    rows: int
    cols: int
    frames: list[tuple[int, int]]

    @classmethod
    def of(cls, ids: Tensor) -> Spans:
        """Reads them off a document, integer [L], masked or not. ValueError says what is malformed and where.

        Between video start and end lie seconds, fps and at least one frame and nothing else; no frame lies outside.
        """
        if ids.dim() != 1 or ids.is_floating_point():
            raise ValueError(f"ids must be integers [L]; got {ids.dtype} {list(ids.shape)}")
        if len(ids) and (ids.min() < 0 or ids.max() >= VISUAL_START + NUM_CODES):
            raise ValueError(f"ids must be in [0, {VISUAL_START + NUM_CODES}), got {int(ids.min())}..{int(ids.max())}")
        begin, stop = (_only(ids, mark, name) for mark, name in ((VIDEO_START, "start"), (VIDEO_END, "end")))
        header = ids[begin + 1 : begin + 3]
        if len(header) < 2 or ((header <= NUMBER_BASE) | (header >= MASK)).any():
            raise ValueError(f"video start at token {begin} must be followed by seconds and fps, ids 8805..9002")
        check_documents(ids, torch.tensor([0, len(ids)]))
        starts = (ids == FRAME_START).nonzero().flatten().tolist()
        grids = {tuple(GRID_UNIT * (n - NUMBER_BASE) for n in ids[at + 1 : at + 3].tolist()) for at in starts}
        if len(grids) != 1:
            raise ValueError(f"a document holds at least one frame, all of one grid; got the grids {sorted(grids)}")
        rows, cols = grids.pop()
        length = frame_length(rows, cols)
        expected = list(range(begin + 3, stop, length))
        if starts != expected or expected[-1] + length != stop:
            raise ValueError(f"frames start at {starts}; they must fill the video, tokens {begin + 3} to {stop}")
        frames = [(at, at + length) for at in starts]
        seconds, fps = (n - NUMBER_BASE for n in header.tolist())
        return cls(begin, stop, seconds, fps, rows, cols, frames)


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
    header = [VIDEO_START, number(seconds, "seconds"), number(fps, "fps")]
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
    ids = ids.cpu()
    spans = Spans.of(ids)
    begin, stop, rows, cols = spans.begin, spans.stop, spans.rows, spans.cols
    if (stop + 1 < len(ids) and ids[stop + 1] != SEPARATOR) or stop + 2 < len(ids):
        raise ValueError(f"video end at token {stop} must be followed by one separator ({SEPARATOR}) and nothing else")
    text_ids = None
    if begin:
        if begin < 2 or ids[0] != TEXT_START or ids[begin - 1] != SEPARATOR:
            raise ValueError(f"the text before the video start must begin with {TEXT_START} and end with {SEPARATOR}")
        text_ids = ids[1 : begin - 1].long()
        _check_text(text_ids)
    frames = ids[begin + 3 : stop].long().unflatten(0, (len(spans.frames), -1))
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
    return Document(text_ids, spans.seconds, spans.fps, codes)


def cut_video(ids: Tensor, fps: int, seconds: int, numbers: Mapping[int, Sequence[int]] | None = None) -> Tensor:
    """The document cut to a duration as upstream does before training: int64 [L'].

    Latent frame j stays if j % (data_fps // fps) == 0 and (j + 1) / data_fps <= latent_frames / fps, where data_fps is
    what the document says and latent_frames = ceil((fps * seconds - 1) / 4) + 1; seconds and fps are rewritten. With
    `numbers` (number -> text ids, see read_numbers) the placeholders 65539 and 65540 in the text become fps * seconds
    and fps. An image (one frame, 1 s, 1 fps) stays an image.

    ids: integer [L]. Raises ValueError for a malformed document, an fps that does not divide the document's, a
    document shorter than asked for, a number that `numbers` lacks.
    """
    return cut_with_labels(ids, None, Spans.of(ids), fps, seconds, numbers)[0]


def take_frames(ids: Tensor, n: int) -> Tensor:
    """The document's first n latent frames: int64 [L'].

    Its seconds become what 4 (n - 1) pictures last, rounded, at least 1 and at most what they were; a single frame
    becomes an image (1 s, 1 fps); all frames leave the document as it is. ValueError where n is not 1..its frames.
    """
    spans = Spans.of(ids)
    if not 0 < n <= len(spans.frames):
        raise ValueError(f"n must be 1..{len(spans.frames)}, the frames of the document; got {n}")
    if n == len(spans.frames):
        return ids.long()
    seconds = int(TIME_STRIDE * (n - 1) / spans.fps + 0.5)
    seconds, fps = (1, 1) if n == 1 else (min(max(seconds, 1), spans.seconds), spans.fps)
    return _keep(ids, None, spans, range(n), seconds, fps)[0]


def drop_text(ids: Tensor) -> Tensor:
    """The document from its video start on, int64 [L'], for guidance. ValueError where there is no video start."""
    starts = (ids == VIDEO_START).nonzero()
    if not len(starts):
        raise ValueError(f"the document has no video start ({VIDEO_START})")
    return ids[int(starts[0]) :].long()


def cut_with_labels(
    ids: Tensor,
    labels: Tensor | None,
    spans: Spans,
    fps: int,
    seconds: int,
    numbers: Mapping[int, Sequence[int]] | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """cut_video on a document of known spans and its labels, int64 [L] with -100 where nothing is predicted; from
    latent frame `start` on."""
    cut = Cut.of(len(spans.frames), spans.seconds, spans.fps, fps, seconds)
    if not 0 <= start < cut.starts:
        raise ValueError(f"start must be 0..{cut.starts - 1} to leave {cut.frames} frames, got {start}")
    ids, labels = _keep(ids, labels, spans, cut.kept(start), cut.seconds, cut.fps)
    return replace_placeholders(ids, labels, spans.begin, cut.seconds, cut.fps, numbers)


@dataclass(frozen=True)
class Cut:
    """What cut_video makes of a document: `frames` latent frames, every `step`-th of its own, and the new header.

    starts: latent frames that a cut may start at, 0..starts - 1. Only the one from 0 begins with a frame that holds a
    single picture; from any other on, the first frame holds four.
    """

    seconds: int
    fps: int
    frames: int
    step: int
    starts: int

    @classmethod
    def of(cls, frames: int, data_seconds: int, data_fps: int, fps: int, seconds: int) -> Cut:
        """The cut of a document of `frames` latent frames to a duration. ValueError as in cut_video."""
        number(fps, "fps"), number(seconds, "seconds")
        if frames == data_seconds == data_fps == 1:
            return cls(1, 1, 1, 1, 1)
        if data_fps % fps:
            raise ValueError(f"fps {fps} does not divide the document's {data_fps}: latent frames cannot be resampled")
        step, wanted = data_fps // fps, latent_frames(fps * seconds)
        starts = frames - (wanted - 1) * step
        if starts < 1:
            there = -(-frames // step)
            raise ValueError(
                f"seconds: {seconds} s at {fps} fps are {wanted} latent frames, the document has {there} of them"
            )
        return cls(seconds, fps, wanted, step, starts)

    def kept(self, start: int = 0) -> range:
        """The latent frames that stay, of the document's."""
        return range(start, start + (self.frames - 1) * self.step + 1, self.step)


def _keep(
    ids: Tensor, labels: Tensor | None, spans: Spans, kept: Sequence[int], seconds: int, fps: int
) -> tuple[Tensor, Tensor | None]:
    """ids and labels with only the frames `kept`, and the header rewritten."""
    pieces = [(0, spans.frames[0][0]), *(spans.frames[j] for j in kept), (spans.stop, len(ids))]
    index = torch.cat([torch.arange(*piece) for piece in pieces])
    header = torch.tensor([number(seconds), number(fps)])
    here = slice(spans.begin + 1, spans.begin + 3)
    ids = ids[index].long()
    ids[here] = header
    if labels is not None:
        labels = labels[index].long()
        labels[here] = torch.where(labels[here] == IGNORED, IGNORED, header)
    return ids, labels


def _only(ids: Tensor, mark: int, name: str) -> int:
    places = (ids == mark).nonzero().flatten().tolist()
    if len(places) != 1:
        raise ValueError(f"a document has one video {name} ({mark}); got it at {places}")
    return places[0]


def _check_text(text: Tensor) -> None:
    wrong = (text < 0) | (text >= VISUAL_START) | torch.isin(text, torch.tensor(_NOT_TEXT))
    wrong &= ~torch.isin(text, torch.tensor(PLACEHOLDERS))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"text_ids[{at}] is {int(text[at])}: ids of frames, videos and visual codes are no text")
