"""From clips and pictures to a folder of samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lumos.codec import VideoCodec
from lumos.data.additions import Additions, Summary
from lumos.data.buckets import bucket_sizes, nearest_bucket
from lumos.data.clips import Clip
from lumos.data.folder import sample_key
from lumos.data.workers import WorkerDied, ordered
from lumos.prompts import fill, read_template
from lumos.tokens import ByteTokenizer, Tokenizer, build_document, number
from lumos.video import ClipTooShortError, read_image, read_video, to_float


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
    **options: object,
) -> Summary:
    """tokenize_clips for paths with a caption each; further options as there. ValueError where the counts differ."""
    if len(paths) != len(captions):
        raise ValueError(f"captions must be one a clip: {len(captions)} for {len(paths)} clips")
    clips = [Clip(str(path), caption) for path, caption in zip(paths, captions, strict=True)]
    shared = {"fps": fps, "seconds": seconds, "size": size, "tokenizer": tokenizer, "windows": windows}
    return tokenize_clips(clips, out, codec, max_pixels=max_pixels, **shared, **options)


def tokenize_clips(
    clips: Sequence[Clip],
    out: str | Path,
    codec: VideoCodec,
    *,
    fps: int = 12,
    seconds: int = 2,
    size: tuple[int, int] | None = None,
    buckets: str | None = None,
    max_pixels: int | None = None,
    tokenizer: Tokenizer | None = None,
    template: str = "plain",
    windows: int = 1,
    workers: int = 1,
    progress: bool = True,
) -> Summary:
    """Encodes clips into a folder of samples, in the order of the clips whatever the number of workers.

    A sample that the folder has already, of the same clip, window, caption and options, is not made again: an
    interrupted run goes on where it was. A clip that cannot be read is no reason to stop: it is named in the summary
    and in out/failures.jsonl, and tried again by the next run.

    Picture files become images, 1 s at 1 fps.
    codec: makes the codes; picklable for more than one worker. fps, seconds: 1..198, where a clip has none of its own.
    size, max_pixels: as in read_video.
    buckets: "256p" or "384p" instead of a size: each clip gets upstream's size of the nearest aspect ratio.
    tokenizer: of the captions; None is the ByteTokenizer. template: the words around a caption, see lumos/prompts.py.
    windows: up to this many consecutive stretches of `seconds` of each clip, one sample each, as far as it reaches.
    workers: processes that read and encode, see lumos/data/workers.py.
    Raises ValueError naming the argument, or the first clip where none could be encoded; the samples finished until
    then stay in the folder.
    """
    if windows < 1:
        raise ValueError(f"windows must be >= 1, got {windows}")
    if size is not None and buckets is not None:
        raise ValueError(f"size and buckets exclude each other, got {size} and {buckets!r}")
    number(fps, "fps"), number(seconds, "seconds")
    sizes = None if buckets is None else bucket_sizes(buckets)
    tokenizer, template = tokenizer or ByteTokenizer(), read_template(template)
    encode = partial(_encode, codec=codec, tokenizer=tokenizer, template=template, size=sizes or size, limit=max_pixels)
    weights = os.path.abspath(codec.folder) if hasattr(codec, "folder") else ""
    made = (type(codec).__name__, weights, template, size, buckets, max_pixels)
    over: set[int] = set()  # clips, by their place, that have no further windows
    with (
        Additions(out) as additions,
        tqdm(total=len(clips) * windows, unit="sample", desc="tokenize", disable=not progress) as bar,
    ):
        jobs = _jobs(clips, windows, fps, seconds, lambda job: _key(job, tokenizer, made), over, additions, bar)
        for (job, key), result in ordered(encode, jobs, workers):
            bar.update()
            clip = job.clip
            if job.place in over or isinstance(result, _End):
                additions.drop(key)
            elif isinstance(result, np.ndarray):
                additions.add(key, result, caption=clip.caption, source=clip.path)
                continue
            else:
                error = "the process that read it died" if isinstance(result, WorkerDied) else result
                additions.fail(key, clip.path, error, job.window)
                bar.set_postfix_str(f"{len(additions.failures)} failed")
            over.add(job.place)
    return additions.summary(len(clips))


@dataclass(frozen=True)
class _Job:
    """A stretch of a clip."""

    place: int
    clip: Clip
    window: int
    fps: int
    seconds: int


class _End:
    """There is no such stretch: the clip ended before."""


def _jobs(
    clips: Sequence[Clip],
    windows: int,
    fps: int,
    seconds: int,
    key_of: Callable[[_Job], int],
    over: set[int],
    additions: Additions,
    bar: tqdm,
) -> Iterator[tuple[_Job, int]]:
    """The stretches that are to be made, with their keys; made as they are asked for, when the ends found are known."""
    for place, clip in enumerate(clips):
        header = (1, 1) if clip.image else (clip.fps or fps, clip.seconds or seconds)
        for window in range(1 if clip.image else windows):
            if place in over:
                break
            job = _Job(place, clip, window, *header)
            key = key_of(job)
            if additions.wants(key):
                yield job, key
            else:
                bar.update()


def _key(job: _Job, tokenizer: Tokenizer, made: tuple[object, ...]) -> int:
    text = tuple(tokenizer.encode(job.clip.caption))
    return sample_key(os.path.abspath(job.clip.path), job.window, job.fps, job.seconds, text, *made)


def _encode(
    job: tuple[_Job, int],
    codec: VideoCodec,
    tokenizer: Tokenizer,
    template: str,
    size: tuple[int, int] | list[tuple[int, int]] | None,
    limit: int | None,
) -> np.ndarray | str | _End:
    """The document, uint32 [L], or what went wrong."""
    stretch, _ = job
    clip = stretch.clip
    if isinstance(size, list):
        size = partial(nearest_bucket, sizes=size)
    try:
        if clip.image:
            pictures = read_image(clip.path, size, limit)[None]
        else:
            pictures = read_video(
                clip.path, stretch.fps, stretch.seconds, stretch.window * stretch.seconds, size, limit
            )
        codes = codec.encode(to_float(pictures))
        text = fill(template, clip.caption, pictures.shape[1:3], len(pictures), stretch.fps)
        ids = build_document(tokenizer.encode(text), codes, stretch.seconds, stretch.fps)
    except ClipTooShortError as error:
        return _End() if stretch.window else str(error)
    except (ValueError, OSError) as error:
        return str(error)
    return ids.numpy().astype(np.uint32)
