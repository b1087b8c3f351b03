"""Print what this machine and installation can run: `python -m lumos_kernels.env`.

Versions, CPU and GPU, the instruction sets of the compiled library, the implementations of every op with the reason why
one does not run, and the verdicts of the self-check on this GPU. A bug report should begin with it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import cache, dispatch, library, self_check
from .version import __version__, versions

PACKAGES = ("torch", "triton", "numpy", *self_check.PACKAGES[1:])


def cpu_model() -> str:
    """Return the CPU's model as the system names it, "AMD EPYC 9R14" for instance."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts() -> Iterator[tuple[str, str]]:
    """Yield what is known of the installation and the machine: (name, value)."""
    yield "lumos-kernels", __version__
    yield "packages", ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items())
    yield "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU", f"{cpu_model()}, {cores} cores, {torch.get_num_threads()} threads of torch"
    yield "CPU library", library.refusal() or f"instruction sets {', '.join(library.isas())}; uses {library.isa()}"
    if not torch.cuda.is_available():
        yield "GPU", "none that this torch can use"
    for number in range(torch.cuda.device_count()):
        gpu = self_check.gpu_facts(number)
        yield f"GPU {number}", f"{gpu['gpu']}, {gpu['arch']}, driver {gpu['driver']}, CUDA {torch.version.cuda}"
    yield "cache folder", str(cache.folder())
    for name in sorted(name for name in os.environ if name.startswith("LUMOS_")):
        yield name, os.environ[name]


def verdicts() -> Iterator[str]:
    """Yield a line for each verdict on the GPUs of this machine."""
    for number in range(torch.cuda.device_count()):
        kept = cache.read(self_check.file_name(number)).get("verdicts")
        for name, entry in sorted(kept.items()) if isinstance(kept, dict) else ():
            if isinstance(entry, dict):
                outcome = "passed" if entry.get("passed") else f"FAILED: {entry.get('error')}"
                yield f"GPU {number}: {name}: {outcome} ({entry.get('date')})"


def env() -> None:
    """Print everything."""
    for name, value in facts():
        print(f"{name + ':':15}{value}")
    print()
    dispatch.backends()
    found = list(verdicts())
    if torch.cuda.is_available():
        print("\nself-checks on this machine:" if found else "\nno self-check was made on this machine yet")
    for line in found:
        print(f"  {line}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m lumos_kernels.env", description=summary, epilog=rest)
    parser.parse_args(arguments)
    env()
    return 0


if __name__ == "__main__":
    sys.exit(main())
