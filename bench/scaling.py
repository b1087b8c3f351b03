"""Tables of docs/scaling.md: memory, bytes and predicted times of a training step on 1 to 1,024 H100s.

`python -m bench.scaling` prints them. Nothing is measured here: lumos/scaling.py holds the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.shapes import Video
from lumos.config import LumosConfig
from lumos.scaling import Cluster, Memory, Step, fitting_steps

MODELS = ("1B", "3B")
GRIDS = {"256p": (32, 56), "384p": (48, 84)}
FRAMES = (7, 13, 22)
GPUS = (1, 8, 64, 256, 1024)
BROKEN_DOWN = 64  # GPUs of the second table


def best_step(model: str, video: Video, gpus: int, cluster: Cluster) -> Step | None:
    """One video a data-parallel rank, laid out as is predicted to be fastest; None where nothing fits."""

    def step_of(**options) -> Step:
        return Step(LumosConfig.preset(model), (video.layout,), (video.targets,), **options)

    return next(iter(fitting_steps(step_of, cluster, gpus)), None)


def videos() -> Iterator[Video]:
    for name, (rows, cols) in GRIDS.items():
        for frames in FRAMES:
            yield Video(f"{name}, {frames} frames", rows, cols, frames)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plans(model: str, cluster: Cluster) -> str:
    header = [
        "video",
        "tokens",
        "GPUs",
        "context",
        "copies",
        "recomputed",
        "GB a GPU",
        "GB sent a GPU",
        "predicted s",
        "predicted MFU",
        "predicted tokens/s",
    ]
    rows = []
    for video in videos():
        for gpus in GPUS:
            step = best_step(model, video, gpus, cluster)
            first = [video.name, f"{video.tokens:,}", f"{gpus:,}"]
            if step is None:
                rows.append([*first, *["-"] * 3, "does not fit", *["-"] * 4])
                continue
            seconds, sent = step.seconds(cluster)["total"], sum(step.bytes_sent().values())
            rows.append(
                [
                    *first,
                    str(step.context),
                    str(step.replicate),
                    step.recomputation,
                    f"{step.memory().total / 1e9:.1f}",
                    f"{sent / 1e9:.1f}",
                    f"{seconds:.2f}",
                    f"{step.mfu(cluster):.2f}",
                    f"{video.tokens * gpus / step.context / seconds:,.0f}",
                ]
            )
    return table(header, rows)


def parts(model: str, cluster: Cluster) -> str:
    names = list(Memory.__dataclass_fields__)
    rows = []
    for video in videos():
        step = best_step(model, video, BROKEN_DOWN, cluster)
        assert step is not None
        memory, sent, seconds = step.memory(), step.bytes_sent(), step.seconds(cluster)
        hidden = seconds["first gather"] + seconds["sharding beyond compute"]
        rows.append(
            [
                video.name,
                *(f"{getattr(memory, name) / 1e9:.2f}" for name in names),
                *(f"{sent[name] / 1e9:.2f}" for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")),
                f"{seconds['compute']:.2f} + {hidden:.3f} + {seconds['exchange']:.3f}",
            ]
        )
    columns = ["gather", "reduce-scatter", "all-reduce", "all-to-all", "s: compute + sharding + exchange"]
    return table(["video", *names, *columns], rows)


def document() -> str:
    """All tables, in Markdown."""
    cluster = Cluster()
    pieces = []
    for model in MODELS:
        pieces += [f"### {model}: the layout predicted to be fastest\n\n{plans(model, cluster)}"]
        pieces += [f"### {model} on {BROKEN_DOWN} GPUs: GB a GPU by part, GB sent a GPU\n\n{parts(model, cluster)}"]
    return "\n".join(pieces)


if __name__ == "__main__":
    print(document(), end="")
