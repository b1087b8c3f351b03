"""Where the time of a contestant goes: its kernels by torch's profiler, and ncu's report of the slowest."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity

from bench import measure, registry
from bench.gpu.processes import run_bounded, tail, write_text
from bench.registry import OURS

if TYPE_CHECKING:
    from bench.gpu.worker import Run

TOP = 12  # kernels listed
NCU_LAUNCHES = 4  # forward, then the three kernels of the deterministic backward
NCU_KEPT = 300_000  # characters


def _call(key: str, name: str, device: str) -> Any:
    case = registry.find(key)
    bench = registry.ops()[case.op]
    contestant = next(c for c in bench.contestants(case, device) if c.name == name)
    inputs = measure.prepared(contestant, bench.build(case, device, case.dtype))
    return lambda: measure.once(contestant, inputs)


def table(call: Callable[[], Any], device: str, top: int = TOP) -> list[dict[str, Any]]:
    """Return {"name", "calls", "us"} of the kernels of a call, the longest first; on a CPU, of its operators."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [{"name": e.key, "calls": e.count, "us": getattr(e, attribute)} for e in profile.key_averages()]
    return sorted((row for row in rows if row["us"] > 0), key=lambda row: -row["us"])[:top]


def finder(key: str) -> Callable[[Run], None]:
    """Return what an item does for a case: the kernels of ours, and ncu's report of them in ncu.txt."""

    def find(run: Run) -> None:
        case = registry.find(key)
        name = next(one.name for one in registry.ops()[case.op].contestants(case, run.device) if one.role == OURS)
        call = _call(key, name, run.device)
        call()
        run["case"], run["contestant"] = key, name
        run["kernels"] = table(call, run.device)
        log = run.work / "ncu.log"
        run["ncu"] = "a dry run has none" if run.dry_run else ncu(key, name, log, run.left() - 1)
        report = run.out / "ncu.txt"
        write_text(report, f"{tail(report, NCU_KEPT)}==== {key}, {name}: {run['ncu']}\n{tail(log, NCU_KEPT)}\n")

    return find


def ncu(key: str, name: str, log: Path, seconds: float) -> str:
    """Run ncu on the case's kernels after a warm-up and return its status. The clocks are left as they are."""
    if shutil.which("ncu") is None:
        return "ncu is not installed"
    command = ["ncu", "--set", "basic", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--launch-count", str(NCU_LAUNCHES), sys.executable, "-m", "bench.gpu.profiles", key, name]
    return run_bounded(command, seconds, log)


def main() -> None:
    """Run what ncu profiles: a warm-up, then one call between the profiler's start and stop."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profiles")
    parser.add_argument("case")
    parser.add_argument("contestant")
    options = parser.parse_args()
    call = _call(options.case, options.contestant, "cuda")
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
