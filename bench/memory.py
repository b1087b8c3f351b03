"""Peak memory of a call. On a CPU in a process of its own, because memory freed earlier would hide in the heap.

Linux keeps the largest resident size of a process (VmHWM) and resets it on request, so the peak of one call is exact,
without sampling. `python -m bench.memory CASE CONTESTANT` is the child.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.environment import ROOT

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(call: Callable[[], Any], device: str) -> tuple[int, int] | None:
    """(bytes before, largest bytes during the call); None where the system cannot tell (not Linux).

    CPU: resident bytes of the process. cuda: bytes that torch's allocator handed out. Call it twice and take the
    second: the first call of a kernel also loads code and starts threads.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: freed memory goes back to the system
    if trim is not None:
        trim(0)
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")  # sets VmHWM to VmRSS
    except OSError:  # not Linux, or a sandbox forbids it
        return None
    before = _status_bytes("VmRSS")
    call()
    return before, _status_bytes("VmHWM")


def run_child(module: str, arguments: Sequence[str]) -> Any:
    """`python -m module arguments` in a fresh process of this checkout; returns the JSON of its last line.

    Raises RuntimeError with the child's last words where it fails.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        killed = " (killed: out of memory?)" if done.returncode == -9 else ""
        raise RuntimeError(f"{module} {' '.join(arguments)} failed{killed}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def contestant_peak(case_key: str, contestant: str, device: str, threads: int) -> int | None:
    """Bytes a contestant needs at its peak beyond the case's inputs, outputs and gradients included."""
    return run_child("bench.memory", [case_key, contestant, "--device", device, "--threads", str(threads)])


def cuda_peak(call: Callable[[], Any]) -> int:
    """Bytes a call needs at its peak on the GPU, in this process: torch counts what its allocator hands out."""
    before, highest = [peak_of(call, "cuda") for _ in range(2)][-1]
    return highest - before


def _status_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))[1])


def main(arguments: Sequence[str] | None = None) -> None:
    from bench import measure, registry

    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Peak extra bytes of one contestant.")
    parser.add_argument("case")
    parser.add_argument("contestant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    case = registry.find(options.case)
    bench = registry.ops()[case.op]
    contestant = next(c for c in bench.contestants(case, options.device) if c.name == options.contestant)
    inputs = measure.prepared(contestant, bench.build(case, options.device, case.dtype))
    peaks = [peak_of(lambda: measure.once(contestant, inputs), options.device) for _ in range(2)]
    print(json.dumps(None if peaks[-1] is None else peaks[-1][1] - peaks[-1][0]))


if __name__ == "__main__":
    main()
