"""Memory and time of fine-tuning by model, resolution and frames, from the formulas of lumos.scaling.

python -m bench.finetuning_table: the table of docs/finetuning.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from lumos.config import LumosConfig
from lumos.scaling import Cluster, Step
from lumos_kernels import Frame, FrameLayout, Text

GRIDS = {"256x448": (32, 56), "384x672": (48, 84)}
SECONDS = {1: "image", 7: "2 s", 13: "4 s", 22: "7 s"}  # latent frames, and what they show at 12 fps
CAPTION = 310  # tokens, as upstream's captions


def document(grid: tuple[int, int], frames: int) -> FrameLayout:
    return FrameLayout.from_segments([[Text(CAPTION), *[Frame(*grid)] * frames, Text(2)]])


def rows(processes: int, recomputation: str = "full") -> Iterator[tuple[str, str, str, int, float, float]]:
    """(model, size, length, tokens, 10^9 bytes of a GPU, predicted seconds): one document a GPU and step, bf16."""
    for model in ("1B", "3B"):
        for size, grid in GRIDS.items():
            for frames, length in SECONDS.items():
                layout = document(grid, frames)
                targets = round(0.8 * int(layout.content.sum()))  # the mean of max(cosine, 0.7)
                step = Step(LumosConfig.preset(model), (layout,), (targets,), processes, recomputation=recomputation)
                seconds = step.seconds(Cluster())["total"]
                yield model, size, length, layout.num_tokens, step.memory().total / 1e9, seconds


def table() -> str:
    lines = [
        "| model | size | length | tokens | GB of 1 GPU | s | GB of each of 8 | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for alone, shared in zip(rows(1), rows(8), strict=True):
        *what, tokens, memory, seconds = alone
        lines.append(
            f"| {' | '.join(what)} | {tokens:,} | {memory:.0f} | {seconds:.2f} | {shared[4]:.0f} | {shared[5]:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
