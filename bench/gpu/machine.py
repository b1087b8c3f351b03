"""The machine: its versions, the clocks while it works, and what copying and multiplying reach on it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from bench import environment, timing
from bench.gpu.tests import own_implementations
from lumos_kernels import dispatch, examples, self_check
from lumos_kernels.dispatch import Problem

if TYPE_CHECKING:
    from bench.gpu.worker import Run

HEAD_DIMS = (64, 128)  # of the 1B and the 3B model
COPY_BYTES, MATMUL_SIZE = 2**31, 8192
# Name in a result -> field of nvidia-smi. The units are MHz, W, degrees Celsius and MiB.
FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watt": "power.draw",
    "celsius": "temperature.gpu",
    "used_mib": "memory.used",
}
QUERY = ("nvidia-smi", f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits", "-lms", "500")


class Clocks:
    """Samples of the GPU's clocks, power, temperature and memory, twice a second while the context is open."""

    def __init__(self, dry_run: bool = False, query: Sequence[str] = QUERY) -> None:
        self.query = None if dry_run or shutil.which(query[0]) is None else query
        self.samples: list[tuple[float, list[str]]] = []

    def __enter__(self) -> Clocks:
        self.process = None
        if self.query:
            self.process = subprocess.Popen(self.query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            self.samples.append((time.monotonic(), [cell.strip() for cell in line.split(",")]))

    def since(self, start: float) -> dict[str, list[float]] | None:
        """Return {name of FIELDS: [smallest, median, largest]} since a time.monotonic(), None without a sample.

        The last sample before it counts too, so that a short item has one.
        """
        first = max((n for n, (at, _) in enumerate(self.samples) if at < start), default=0)
        columns = list(zip(*(cells for _, cells in self.samples[first:] if len(cells) == len(FIELDS)), strict=True))
        found = {}
        for name, column in zip(FIELDS, columns, strict=False):
            values = [float(cell) for cell in column if _is_number(cell)]
            if values:
                found[name] = [min(values), statistics.median(values), max(values)]
        return found or None


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).isdigit()


def describe(run: Run) -> None:
    """Record the machine and its software."""
    run["environment"] = environment.record(run.device, torch.get_num_threads())
    run["cudnn"] = torch.backends.cudnn.version()
    run["arch"] = None if run.dry_run else Problem.of(torch.empty(0, device="cuda")).arch
    run["nvidia_smi"] = _output("nvidia-smi")


def check(run: Run) -> None:
    """Record the self-checks of our kernels at the models' head sizes, then what "auto" takes. Until its self-check has
    passed, the fused backward does not serve a public call, whatever the tuned table prefers.
    """
    run["verdicts"] = {}
    for name, impl in [] if run.dry_run else own_implementations():  # a CPU has no verdicts
        op = dispatch.ops()[name]
        for head_dim in HEAD_DIMS:
            problem = Problem.of(torch.empty(0, dtype=torch.bfloat16, device=run.device), head_dim)
            self_check.verdict(op, impl, problem)
            for kind in examples.kinds(op, impl):
                found = self_check.stored(op, impl, problem, kind)
                title = self_check.title(op, impl, problem, kind)
                run["verdicts"] = {**run["verdicts"], title: found and found._asdict()}
    run["backends"] = [asdict(row) for row in dispatch.table()]


def _output(*command: str) -> str | None:
    """Return what a command prints, None where there is no such command."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout


def ceilings(run: Run) -> None:
    """Record what the device reaches: copying two gigabytes, and a large bf16 matmul on random data."""
    count, size = (2**18, 128) if run.dry_run else (COPY_BYTES // 2, MATMUL_SIZE)
    source = torch.randn(count, device=run.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=run.device).to(torch.bfloat16)
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    samples = timing.interleave(calls, 0.05 if run.dry_run else 2.0, timing.clock_for(run.device))
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    run["copy"] = {"seconds": seconds["copy"], "GB/s": 4 * count / seconds["copy"] / 1e9}
    run["matmul"] = {"seconds": seconds["matmul"], "TFLOP/s": 2 * size**3 / seconds["matmul"] / 1e12}
