"""Where and with what a measurement was made: the record that goes with every figure."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from lumos_kernels import __version__, library
from lumos_kernels.env import cpu_model
from lumos_kernels.version import versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "nvidia-cudnn-frontend",
)


def record(device: str, threads: int) -> dict[str, Any]:
    """Return the machine, the software, the commit and the date, as plain values for JSON. device: "cpu" or "cuda"."""
    return {
        "device": device,
        "device_name": device_name(device),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isas": list(library.isas()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load_average": os.getloadavg()[0],
        "versions": {"lumos-kernels": __version__, **versions(PACKAGES), "cuda": torch.version.cuda},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def file_stem(environment: dict[str, Any]) -> str:
    """<device>_<date>_<sha>, the name of a result's files; "dirty" follows the sha of a changed checkout."""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device_name"].lower()).strip("-")
    if environment["device"] == "cpu":
        device += f"-{environment['threads']}t"
    sha = (environment["commit"] or "unknown")[:8] + ("dirty" if environment["dirty"] else "")
    return f"{device}_{environment['date'][:10]}_{sha}"


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's model."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def available_memory(device: str) -> int | None:
    """Free bytes on the device; None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else None


def _git(*command: str) -> str | None:
    """Output of git in this checkout; None outside of one."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
