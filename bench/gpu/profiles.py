"""Where the time of a contestant goes: its kernels by torch's profiler, and ncu's report of the slowest."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench import measure, registry
from bench.gpu.suite import run_bounded, tail

TOP = 12  # kernels listed
NCU_LAUNCHES = 3


def _call(key: str, name: str, device: str) -> Any:
    case = registry.find(key)
    bench = registry.ops()[case.op]
    contestant = next(c for c in bench.contestants(case, device) if c.name == name)
    inputs = measure.prepared(contestant, bench.build(case, device, case.dtype))
    return lambda: measure.once(contestant, inputs)


def kernels(key: str, name: str, device: str) -> dict[str, Any]:
    """{"case", "contestant", "kernels": [{"name", "calls", "us"}]}, the slowest first; on a CPU, operators."""
    call = _call(key, name, device)
    call()
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [{"name": e.key, "calls": e.count, "us": getattr(e, attribute)} for e in profile.key_averages()]
    rows = sorted((row for row in rows if row["us"] > 0), key=lambda row: -row["us"])
    return {"case": key, "contestant": name, "kernels": rows[:TOP]}


def ncu(key: str, name: str, log: Path, seconds: float) -> dict[str, Any]:
    """ncu's basic sections of the case's kernels after a warm-up; clocks are left as they are."""
    if shutil.which("ncu") is None:
        return {"status": "ncu is not installed"}
    command = ["ncu", "--set", "basic", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--launch-count", str(NCU_LAUNCHES), sys.executable, "-m", "bench.gpu.profiles", key, name]
    status = run_bounded(command, seconds, log)
    return {"status": status, "report": tail(log, 12000)}


def main() -> None:
    """What ncu runs: a warm-up, then one call between the profiler's start and stop."""
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
