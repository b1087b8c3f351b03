"""Padding waste and planning time of packed streams, on mixes of images and videos in the official aspect buckets.

`python -m bench.packing` prints a table: the packing of lumos.data.packing, first fit with as many waiting documents,
streams filled in order, padding to the longest document of a batch, and upstream's batches of one source, so padded. No
tokens are involved, and the same lengths come on every machine; only the times are the machine's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lumos.data.packing import Packer, mix
from lumos_kernels.frame_layout.frames import frame_length

PATCH = 32  # pixels of a bucket's unit, 4 codes
PATCHES = {"256p": (352 // PATCH) ** 2, "384p": (528 // PATCH) ** 2}  # upstream's target sizes
ASPECTS = (16 / 9, 16 / 9, 16 / 9, 4 / 3, 4 / 3, 3 / 2, 1.0, 1.0, 3 / 4, 9 / 16)  # width / height of pictures, as found
TEXT = range(150, 351)  # tokens of text; the published samples have 241 to 328
VIDEO_FRAMES = 7  # 2 s at 12 fps
OUTSIDE = 5  # video start, seconds, fps, video end, separator
UPSTREAM_IMAGES = 6  # images of a padded batch


@dataclass(frozen=True)
class Mix:
    """Sources of documents: (share of the documents, latent frames, resolution)."""

    name: str
    sources: tuple[tuple[float, int, str], ...]


def joint(name: str, images: int, *resolutions: str) -> Mix:
    """So many images a video, spread over resolutions."""
    return Mix(name, tuple((share, f, r) for r in resolutions for share, f in ((images, 1), (1, VIDEO_FRAMES))))


MIXES = (
    Mix("images, 256p and 384p", ((1, 1, "256p"), (1, 1, "384p"))),
    joint("6 images a video, 256p and 384p", 6, "256p", "384p"),
    joint("1 image a video, 256p and 384p", 1, "256p", "384p"),
    joint("6 images a video, 384p", 6, "384p"),
    Mix("videos, 256p and 384p", ((1, VIDEO_FRAMES, "256p"), (1, VIDEO_FRAMES, "384p"))),
)
BUDGETS = (32_768, 60_000, 131_072)


def buckets(patches: int, most: float = 4.0) -> list[tuple[int, int]]:
    """Upstream's crop sizes in patches, (width, height): the largest of each shape, up to 4 : 1."""
    sizes = ((width, patches // width) for width in range(1, patches + 1))
    return [(w, h) for w, h in sizes if max(w, h) <= most * min(w, h)]


def grid(aspect: float, patches: int) -> tuple[int, int]:
    """(rows, columns) of codes in the bucket that keeps most of a picture."""
    width, height = max(
        buckets(patches), key=lambda size: min(size[0] / aspect, size[1]) / max(size[0] / aspect, size[1])
    )
    unit = PATCH // 8
    return unit * height, unit * width


def measure_of(mixture: Mix, seed: int = 0) -> Callable[[int, int, int], int]:
    """Lengths of the documents at places: text and aspect are drawn for each sample."""
    frames = [
        [f * frame_length(*grid(aspect, PATCHES[resolution])) for aspect in ASPECTS]
        for _, f, resolution in mixture.sources
    ]

    def measure(place: int, source: int, sample: int) -> int:
        text, aspect = mix(seed, source, sample, 0), mix(seed, source, sample, 1)
        return TEXT[text % len(TEXT)] + OUTSIDE + frames[source][aspect % len(ASPECTS)]

    return measure


@dataclass(frozen=True)
class Result:
    """waste: share of the computed tokens that is padding; documents: of a stream; microseconds: a document."""

    name: str
    waste: float
    documents: float
    microseconds: float


def ours(mixture: Mix, budget: int, look_ahead: int, streams: int, samples: int) -> Result:
    packer = _packer(mixture, samples, budget, look_ahead)
    packer.next()  # fills the pool
    begin = time.perf_counter()
    bins = [packer.next() for _ in range(streams)]
    seconds = time.perf_counter() - begin
    count = sum(len(stream.documents) for stream in bins)
    return Result(f"best fit, {look_ahead} ahead", packer.waste, count / streams, 1e6 * seconds / count)


def rival(name: str, pack: Callable[[Iterator[int]], list[int]], mixture: Mix, budget: int, count: int) -> Result:
    """pack: lengths of documents, in order, to the number of documents in each stream."""
    packer = _packer(mixture, 10**6, 0, 1)
    lengths = [packer.next().length for _ in range(count)]
    begin = time.perf_counter()
    sizes = pack(iter(lengths))
    seconds = time.perf_counter() - begin
    return Result(name, 1 - sum(lengths) / (len(sizes) * budget), count / len(sizes), 1e6 * seconds / count)


def in_order(lengths: Iterator[int], budget: int) -> list[int]:
    """Documents as they come; the next stream begins where one does not fit."""
    streams, left = [], 0
    for length in lengths:
        if length > left:
            streams.append(0)
            left = budget
        streams[-1] += 1
        left -= length
    return streams


def first_fit(lengths: Iterator[int], budget: int, waiting: int) -> list[int]:
    """Each document into the first open stream that has room; the oldest closes when as many documents wait."""
    closed: list[int] = []
    opened: list[list[int]] = []  # documents, tokens left
    for length in lengths:
        stream = next((stream for stream in opened if stream[1] >= length), None)
        if stream is None:
            stream = [0, budget]
            opened.append(stream)
        stream[0] += 1
        stream[1] -= length
        if sum(count for count, _ in opened) >= waiting:
            closed.append(opened.pop(0)[0])
    return closed + [count for count, _ in opened]


def padded(mixture: Mix, count: int) -> Result:
    """Upstream: an image batch of 6 padded to its longest, videos alone; every batch of one source."""
    waiting: dict[int, list[int]] = {source: [] for source in range(len(mixture.sources))}
    used = computed = batches = 0
    packer = _packer(mixture, 10**6, 0, 1)
    for _ in range(count):
        stream = packer.next()
        source = stream.documents[0].source
        waiting[source].append(stream.length)
        if len(waiting[source]) == (UPSTREAM_IMAGES if mixture.sources[source][1] == 1 else 1):
            used += sum(waiting[source])
            computed += len(waiting[source]) * max(waiting[source])
            batches += 1
            waiting[source].clear()
    done = count - sum(len(rest) for rest in waiting.values())
    return Result("upstream's batches, padded to the longest", 1 - used / computed, done / batches, 0.0)


def padded_mixed(lengths: Iterator[int], budget: int) -> tuple[int, int]:
    """Documents as they come, padded to the longest of their batch, which is closed when its rectangle would be larger
    than the budget. Returns the tokens computed and the batches."""
    computed = batches = rows = longest = 0
    for length in lengths:
        if not rows or (rows + 1) * max(longest, length) > budget:
            computed += rows * longest
            batches, rows, longest = batches + 1, 0, 0
        rows, longest = rows + 1, max(longest, length)
    return computed + rows * longest, batches


def _packer(mixture: Mix, samples: int, budget: int, look_ahead: int) -> Packer:
    shares = [share for share, _, _ in mixture.sources]
    sizes = [samples] * len(shares)
    return Packer(sizes, shares, 0, measure_of(mixture), budget=budget, look_ahead=look_ahead)


def rows(mixture: Mix, budget: int, look_ahead: Sequence[int], streams: int, samples: int) -> Iterator[Result]:
    """The packings of one mix: ours with each look-ahead, then the others on as many documents."""
    best = [ours(mixture, budget, n, streams, samples) for n in look_ahead]
    yield from best
    count, most = round(streams * best[-1].documents), max(look_ahead)
    yield rival(f"first fit, {most} waiting", lambda lengths: first_fit(lengths, budget, most), mixture, budget, count)
    yield rival("in order", lambda lengths: in_order(lengths, budget), mixture, budget, count)
    packer = _packer(mixture, 10**6, 0, 1)
    lengths = [packer.next().length for _ in range(count)]
    computed, batches = padded_mixed(iter(lengths), budget)
    yield Result("any documents padded to the longest", 1 - sum(lengths) / computed, count / batches, 0.0)
    yield padded(mixture, count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.packing", description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="tokens of a stream")
    parser.add_argument("--look-ahead", type=int, nargs="+", default=(64,), help="waiting documents")
    parser.add_argument("--streams", type=int, default=1000, help="streams planned for a row")
    parser.add_argument("--samples", type=int, default=10**7, help="samples of each source")
    options = parser.parse_args(arguments)
    print("| mix | budget | packing | waste, % | documents a stream | planning, us a document |")
    print("|---|---|---|---|---|---|")
    for mixture in MIXES:
        for budget in options.budgets:
            for row in rows(mixture, budget, options.look_ahead, options.streams, options.samples):
                time_of = f"{row.microseconds:.0f}" if row.microseconds else ""
                cells = mixture.name, f"{budget:,}", row.name, f"{100 * row.waste:.2f}", f"{row.documents:.1f}", time_of
                print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
