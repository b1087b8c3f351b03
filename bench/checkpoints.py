"""What a checkpoint costs a training run: the pause of its step, the steps beside the writing, against writing at once.

`python -m bench.checkpoints --folder DIR` trains the tiny preset (33 M parameters, 0.4 GB of state) on random tokens;
DIR lies on the disk to measure. Rounds of both ways alternate; medians.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lumos.data import SampleWriter
from lumos.tokens import NUM_CODES, ByteTokenizer, build_document
from lumos.train import TrainConfig, Trainer, training_step
from lumos.train.state import Checkpoints, newest_checkpoint


@dataclass
class Times:
    """Seconds: of steps alone, of the pause behind a step, of steps beside the writing, until it was complete."""

    step: list[float] = field(default_factory=list)
    pause: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    complete: list[float] = field(default_factory=list)
    at_once: list[float] = field(default_factory=list)


def timed(call, seconds: list[float]) -> None:
    begin = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - begin)


def measure(folder: Path, rounds: int, steps: int) -> tuple[Times, int]:
    """The times, and the bytes of a checkpoint."""
    with SampleWriter(folder / "tokens") as writer:
        for number in range(4):
            codes = torch.randint(NUM_CODES, (3, 16, 28), generator=torch.Generator().manual_seed(number))
            writer.add(build_document(ByteTokenizer().encode(f"clip {number}"), codes, seconds=1, fps=8))
    run = Trainer(TrainConfig(data=(str(folder / "tokens"),), out=str(folder / "run")), progress=False)
    checkpoints, times = Checkpoints(folder / "run" / "state", keep=1), Times()
    numbers = itertools.count()

    def step() -> None:
        streams = [run.batches.load(stream) for stream in run.batches.next_plan()]
        float(training_step(run.model, run.optimizer, streams, run.config.clip).loss)

    def save() -> None:
        checkpoints.save(next(numbers), run.state(), {})

    def save_at_once() -> None:
        save()
        checkpoints.wait()

    for _ in range(3):
        step()
    for _ in range(rounds):
        for _ in range(steps):
            timed(step, times.step)
        begin = time.perf_counter()
        timed(save, times.pause)
        while checkpoints.writing:
            timed(step, times.beside)
        times.complete.append(time.perf_counter() - begin)
        timed(save_at_once, times.at_once)
    checkpoints.close()
    size = sum(path.stat().st_size for path in newest_checkpoint(folder / "run" / "state").iterdir())
    return times, size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder's)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps alone of a round")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        times, size = measure(folder, options.rounds, options.steps)
    finally:
        shutil.rmtree(folder)
    print(f"checkpoint: {size / 1e9:.3f} GB, {options.rounds} of each kind, torch {torch.__version__}; medians")
    for name, seconds in (
        ("a step alone", times.step),
        ("pause behind the step of a checkpoint", times.pause),
        ("a step beside the writing", times.beside),
        ("until it is complete, steps going on", times.complete),
        ("the same, written at once while the run waits", times.at_once),
    ):
        print(f"{statistics.median(seconds) * 1e3:9.1f} ms   {name} ({len(seconds)})")


if __name__ == "__main__":
    main()
