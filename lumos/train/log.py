"""What a run writes down: a line of log.jsonl for each step, from values that are read when the device has them."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from lumos.config import LumosConfig
from lumos.parallel import Parallel
from lumos.train.batches import MicroBatch
from lumos.train.peak import Peak
from lumos.train.step import StepStats

LOG_HEADER = "log_header.json"


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


def log_header(parallel: Parallel, peak: Peak) -> dict[str, Any]:
    """What every line of a log rests on: LOG_HEADER, beside it."""
    device = parallel.device
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "processes": parallel.world_size,
        "context": parallel.context_size,
        "peak_flops": peak.flops,
        "mfu_is_against": peak.source,
        "torch": torch.__version__,
    }


def open_board(folder: Path, step: int) -> Board:
    """A writer of tensorboard's files; what an earlier run wrote from `step` on is hidden. ValueError without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard is not installed: pip install 'lumos-kernels[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=step or None)


class Board(Protocol):
    """torch.utils.tensorboard.SummaryWriter, as far as it is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


@dataclass(frozen=True)
class Pending:
    """A step whose values are still on the device. batches: what finds its micro-batches again; own: tokens and useful
    FLOPs of this rank.
    """

    number: int
    lr: float
    waste: float
    batches: Sequence[Any]
    own: tuple[float, float]
    stats: StepStats


class RunLog:
    """Writes a line a step, `every` steps at a time and one window late: by then the device has the values.

    So no host waits for its device but in flush(), which brings the log up to the last step: before a checkpoint, and
    at the end. Every rank makes one and calls the same methods; only the main one's file is a real one.

    A line holds step, loss, frame_losses (None for a frame without targets), grad_norm (before clipping), lr, tokens,
    targets, tokens_per_s and seconds (of the step on a CPU, mean of the window on a GPU; over all ranks), mfu,
    peak_memory_gb (of the main rank), skipped (steps kept off the weights so far), waste (share of the token budgets
    that no document fills, so far).

    mfu: the model's useful FLOPs (LumosConfig.training_flops) over the time and the peak of all devices.
    bad: the first step of the last windows that was kept off the weights, None if there was none.
    """

    def __init__(
        self,
        model: LumosConfig,
        parallel: Parallel,
        every: int = 1,
        frozen: bool = False,
    ) -> None:
        self.model, self.parallel, self.every, self.frozen = model, parallel, every, frozen
        self.skipped = 0
        self.bad: Pending | None = None
        self._window: list[Pending] = []
        self._sent: _Window | None = None
        self._clock = _Clock(parallel.device)

    def open(self, peak: Peak, file: TextIO, board: Board | None = None) -> None:
        """Where lines go from now on, and what mfu is measured against."""
        self.peak, self.file, self.board = peak, file, board

    def begin_step(self) -> None:
        """Where the time of a step begins."""
        self._clock.begin()

    def end_step(
        self, number: int, lr: float, stats: StepStats, batches: Sequence[MicroBatch], waste: float, keep: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """Takes the values of a step; returns the lines that this brought to the file.

        batches: this rank's, on the CPU. keep: what finds them again, kept as Pending.batches until they are read.
        """
        tokens = sum(batch.num_tokens - batch.padding for batch in batches)
        flops = sum(self.model.training_flops(batch.layout, batch.num_targets, self.frozen) for batch in batches)
        # Nobody wants the padding; attention over it, in short documents, is too little to be taken off as well.
        padding = sum(batch.padding for batch in batches)
        flops -= (2 if self.frozen else 3) * self.model.forward_flops(padding, 0, 0)
        self._window.append(Pending(number, lr, waste, keep, (tokens, flops), stats))
        self._clock.end()
        if len(self._window) < self.every:
            return []
        lines = self._receive()
        self._send()
        return lines if self.parallel.device.type == "cuda" else lines + self._receive()

    def flush(self) -> list[dict[str, Any]]:
        """Writes the lines of all steps so far; waits for the device."""
        lines = self._receive()
        if self._window:
            self._send()
            lines += self._receive()
        return lines

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]

    def _send(self) -> None:
        """Starts the copy of the window's values to the host, in one piece."""
        device, steps = self.parallel.device, self._window
        own = torch.tensor([step.own for step in steps], dtype=torch.float64).flatten()
        # The ranks that share a stream count the same tokens.
        shared = self.parallel.sum(own.to(device, non_blocking=True)) / self.parallel.context_size
        stats = [step.stats for step in steps]
        scalars = [torch.stack([x.double() for x in (s.loss, s.grad_norm, s.targets, s.skipped)]) for s in stats]
        values = torch.cat([shared, *scalars, *(s.frame_losses.double() for s in stats)])
        self._sent = _Window(steps, values.to("cpu", non_blocking=True), self._clock.lap())
        self._window = []

    def _receive(self) -> list[dict[str, Any]]:
        if self._sent is None:
            return []
        sent, self._sent = self._sent, None
        seconds = self._clock.read(sent.lap)
        number = len(sent.steps)
        values = sent.values.tolist()
        own, scalars, frames = values[: 2 * number], values[2 * number : 6 * number], values[6 * number :]
        lines = []
        for place, step in enumerate(sent.steps):
            count = len(step.stats.frame_losses)
            line = self._line(step, seconds[place], own[2 * place :][:2], scalars[4 * place :][:4], frames[:count])
            frames = frames[count:]
            lines.append(line)
        for line in lines:
            self._write(line)
        self.file.flush()
        return lines

    def _line(
        self, step: Pending, seconds: float, own: list[float], scalars: list[float], frames: list[float]
    ) -> dict[str, Any]:
        (tokens, flops), (loss, grad_norm, targets, skipped) = own, scalars
        if skipped:
            self.skipped += 1
            self.bad = self.bad or step
        return {
            "step": step.number,
            "loss": _rounded(loss, 6),
            "frame_losses": [_rounded(x, 5) for x in frames],
            "grad_norm": _rounded(grad_norm, 5),
            "lr": step.lr,
            "tokens": int(tokens),
            "targets": int(targets),
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": round(seconds, 4),
            "mfu": float(f"{flops / (seconds * self.peak.flops * self.parallel.world_size):.4g}"),
            "peak_memory_gb": round(peak_memory_gb(self.parallel.device), 3),
            "skipped": self.skipped,
            "waste": round(step.waste, 5),
        }

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name == "frame_losses":
                    for frame, loss in enumerate(value):
                        if loss is not None:
                            self.board.add_scalar(f"frame_losses/{frame}", loss, line["step"])
                elif name != "step" and value is not None:
                    self.board.add_scalar(name, value, line["step"])


@dataclass(frozen=True)
class _Window:
    steps: list[Pending]
    values: Tensor
    lap: list[Any]


class _Clock:
    """Seconds of each step: measured one by one on a CPU; on a GPU between events at the ends of a window."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._begin: Any = None
        self._times: list[float] = []

    def begin(self) -> None:
        if not self._gpu:
            self._begin = time.perf_counter()
        elif not self._times:
            self._begin = self._event()

    def end(self) -> None:
        self._times.append(0.0 if self._gpu else time.perf_counter() - self._begin)

    def lap(self) -> list[Any]:
        """What read() turns into the seconds of the steps since the last lap."""
        times, self._times = self._times, []
        return [self._begin, self._event(), len(times)] if self._gpu else times

    def read(self, lap: list[Any]) -> list[float]:
        if not self._gpu:
            return lap
        begin, end, number = lap
        end.synchronize()
        return [begin.elapsed_time(end) / 1e3 / number] * number

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _rounded(value: float, digits: int) -> float | None:
    """None for what is not finite: JSON has no word for it."""
    return round(value, digits) if math.isfinite(value) else None
