"""What a run writes down: a line of log.jsonl for each step."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lumos.train.batches import MicroBatch
from lumos.train.step import StepStats


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a log.jsonl, one dictionary a step."""
    with Path(path).open() as log:
        for line in log:
            yield json.loads(line)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in 10^9 bytes: allocated on a GPU, resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def log_line(
    number: int, loss: float, stats: StepStats, step: list[MicroBatch], lr: float, seconds: float, device: torch.device
) -> dict[str, Any]:
    tokens = sum(batch.num_tokens for batch in step)
    frame_losses = [None if math.isnan(x) else round(x, 5) for x in stats.frame_losses.tolist()]
    return {
        "step": number,
        "loss": round(loss, 6),
        "frame_losses": frame_losses,
        "grad_norm": round(float(stats.grad_norm), 5),
        "lr": lr,
        "tokens": tokens,
        "targets": sum(batch.num_targets for batch in step),
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        "peak_memory_gb": round(peak_memory_gb(device), 3),
    }
