"""Items that sample frames with the whole model: step by step, and with the steps captured in CUDA graphs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bench.gpu.whole_model import FRAMES_256P, attempt, document, implementations, shared_model
from lumos import generate_frames

if TYPE_CHECKING:
    from bench.gpu.worker import Run

PROMPT_TEXT = 64
STEPS = 50


def eager(run: Run) -> None:
    """Record the seconds of a frame of 256p: 50 steps with guidance."""
    run["frames"] = []
    run["result"] = attempt(lambda: _sample(run, frames=1, cuda_graphs=False))


def graphs(run: Run) -> None:
    """Record the seconds of three frames: steps are captured in the second one and replayed in the third."""
    run["frames"] = []
    run["result"] = attempt(lambda: _sample(run, frames=3, cuda_graphs=not run.dry_run))


def _sample(run: Run, frames: int, cuda_graphs: bool) -> dict[str, Any]:
    model = shared_model(run)
    model.impl = implementations(run.device)
    grid, steps = ((4, 8), 2) if run.dry_run else (FRAMES_256P, STEPS)
    prompt = document(model.config, grid, 0, PROMPT_TEXT)[0, :-2]
    if not run.shared.get("warm"):
        list(generate_frames(model, [prompt], grid, 1, steps=2, guidance_scale=15.0))  # compiles
        run.shared["warm"] = True
    start = time.perf_counter()
    codes = 0
    for frame in generate_frames(
        model, [prompt], grid, frames, steps=steps, guidance_scale=15.0, cuda_graphs=cuda_graphs
    ):
        codes += frame.codes.numel()  # on the host: the frame is decided
        now = time.perf_counter()
        run["frames"] = [*run["frames"], now - start]
        start = now
    complete = codes == frames * grid[0] * grid[1]
    return {"steps": steps, "cuda_graphs": cuda_graphs, "complete": complete, "seconds": run["frames"][-1]}
