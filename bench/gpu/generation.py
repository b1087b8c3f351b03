"""Items that sample frames with the whole model: step by step, and with the steps captured in CUDA graphs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bench.gpu.whole_model import FRAMES_256P, attempt, document, implementations, shared_model
from lumos import generate_frames

if TYPE_CHECKING:
    from bench.gpu.worker import Run

PROMPT_TEXT = 64
STEPS, FRAMES = 50, 3


def eager(run: Run) -> None:
    """Record the seconds of three frames of 256p, frame by frame: 50 steps with guidance."""
    run["frames"], run.shared["codes"] = [], []
    run["result"] = attempt(lambda: _sample(run, run.shared["codes"], cuda_graphs=False))


def graphs(run: Run) -> None:
    """Record the seconds of the same frames: steps are captured in the second one and replayed in the third."""
    codes: list[Tensor] = []
    run["frames"] = []
    run["result"] = attempt(lambda: _sample(run, codes, cuda_graphs=not run.dry_run))
    before = run.shared.get("codes", [])
    run["frames_equal"] = [bool(a.equal(b)) for a, b in zip(codes, before, strict=False)]


def _sample(run: Run, codes: list[Tensor], cuda_graphs: bool) -> dict[str, Any]:
    """Sample FRAMES frames, put their codes into the list, and say how it went."""
    model = shared_model(run)
    model.impl = implementations(run.device)
    grid, steps = ((4, 8), 2) if run.dry_run else (FRAMES_256P, STEPS)
    prompt = document(model.config, grid, 0, PROMPT_TEXT)[0, :-2]
    if not run.shared.get("warm"):
        list(generate_frames(model, [prompt], grid, 1, steps=2, guidance_scale=15.0))  # compiles
        run.shared["warm"] = True
    start = time.perf_counter()
    options = {"steps": steps, "guidance_scale": 15.0, "cuda_graphs": cuda_graphs}
    for frame in generate_frames(model, [prompt], grid, FRAMES, **options):
        codes.append(frame.codes.cpu())
        now = time.perf_counter()
        run["frames"] = [*run["frames"], now - start]
        start = now
    return {"steps": steps, "cuda_graphs": cuda_graphs, "seconds": run["frames"][-1]}
