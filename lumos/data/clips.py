"""Which clips and pictures to encode: files, folders with captions beside the files, CSV tables."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lumos.tokens import number

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".gif")

_COLUMNS = {"path": "path", "caption": "caption", "text": "caption", "fps": "fps", "seconds": "seconds"}
_LARGEST_FIELD = 1 << 20


@dataclass(frozen=True)
class Clip:
    """A video or a picture with its caption; fps and seconds where they differ from those of the others."""

    path: str
    caption: str
    fps: int | None = None
    seconds: int | None = None

    @property
    def image(self) -> bool:
        return Path(self.path).suffix.lower() in IMAGE_SUFFIXES


def find_clips(inputs: Sequence[str | Path], captions: Sequence[str] = ()) -> list[Clip]:
    """The clips behind inputs, each a video or picture file, a folder or a .csv.

    captions: one for everything that has none of its own, or one for each input where all inputs are files.
    A folder is searched with all folders inside it, in the order of the names; the caption of clip.mp4 is the text of
    clip.txt beside it. So is that of a file where no caption is given.
    A .csv has a header with the columns path and caption (or text, upstream's name), and fps and seconds where wanted;
    other columns are passed over; relative paths start from its folder.
    Raises FileNotFoundError and ValueError naming the file, the line and what is missing.
    """
    files = [not Path(path).is_dir() and Path(path).suffix.lower() != ".csv" for path in inputs]
    if len(captions) > 1 and (len(captions) != len(inputs) or not all(files)):
        raise ValueError(
            f"--caption must be given once, or once for each clip where only files are named; got {len(captions)} for "
            f"{len(inputs)} inputs"
        )
    clips: list[Clip] = []
    for at, (path, file) in enumerate(zip(map(Path, inputs), files, strict=True)):
        caption = captions[at] if len(captions) > 1 else captions[0] if captions else None
        if path.is_dir():
            clips += _folder(path, caption)
        elif not file:
            clips += _table(path)
        else:
            clips.append(Clip(str(path), _beside(path, None) if caption is None else caption))
    return clips


def _folder(folder: Path, caption: str | None) -> list[Clip]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no files that end in {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}")
    return [Clip(str(path), _beside(path, caption)) for path in paths]


def _beside(path: Path, caption: str | None) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside} is not UTF-8: {error}") from error
    if caption is None:
        raise ValueError(f"{path} has no caption: give --caption, or write one into {beside.name} beside it")
    return caption


def _table(path: Path) -> list[Clip]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    csv.field_size_limit(_LARGEST_FIELD)
    clips = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [column for column in reader.fieldnames or () if column in _COLUMNS]
            names = [_COLUMNS[column] for column in columns]
            if not {"path", "caption"} <= set(names) or len(names) != len(set(names)):
                raise ValueError(f"the header must name path and caption once, got {reader.fieldnames}")
            for row in reader:
                known = {_COLUMNS[column]: row[column] for column in columns}
                clips.append(_row(path.parent, known, f"line {reader.line_num}"))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not clips:
        raise ValueError(f"{path}: no rows below the header")
    return clips


def _row(folder: Path, known: dict[str, str | None], where: str) -> Clip:
    if not known["path"] or "\0" in known["path"] or known["caption"] is None:
        raise ValueError(f"{where}: path is {known['path']!r}, caption {known['caption']!r}")
    numbers = {}
    for name in ("fps", "seconds"):
        text = (known.get(name) or "").strip()
        if text:
            if not (text.isascii() and text.isdigit() and len(text) < 5):
                raise ValueError(f"{where}: {name} must be a whole number, got {text!r}")
            number(int(text), f"{where}: {name}")
            numbers[name] = int(text)
    return Clip(str(folder / known["path"]), known["caption"], **numbers)
