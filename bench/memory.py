"""Peak memory of a call. On a CPU in a process of its own, because memory freed earlier would hide in the heap.

Linux keeps the largest resident size of a process (VmHWM) and resets it on request, so the peak of one call is exact,
without sampling. `python -m bench.memory CASE CONTESTANT ...` is the child, and forks for each contestant.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from bench.environment import ROOT

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
QUICK_CALL = 2.0  # seconds: a longer call is made once, and what libraries keep of it is little beside its peak


def peak_of(call: Callable[[], Any], device: str) -> tuple[int, int] | None:
    """(bytes before, largest bytes during the call); None where the system cannot tell (not Linux).

    CPU: resident bytes of the process. cuda: bytes that torch's allocator handed out. Run the call, or a small one like
    it, before: a first call also loads code and starts threads.
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


def contestant_peaks(case_key: str, contestants: Sequence[str], threads: int) -> dict[str, int | None]:
    """Bytes each contestant needs at its peak on the CPU beyond the case's inputs, outputs and gradients included."""
    return run_child("bench.memory", [case_key, *contestants, "--threads", str(threads)])


def cuda_peak(call: Callable[[], Any]) -> int:
    """Bytes a call needs at its peak on the GPU, in this process: torch counts what its allocator hands out."""
    before, highest = [peak_of(call, "cuda") for _ in range(2)][-1]
    return highest - before


def _status_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))[1])


def _contestant_peak(case_key: str, threads: int, name: str) -> int | None:
    from bench import measure, registry

    torch.set_num_threads(threads)
    case = registry.find(case_key)
    bench = registry.ops()[case.op]
    contestant = next(c for c in bench.contestants(case, "cpu") if c.name == name)
    for sized in (bench.smoke(case), case):  # the first call loads code and starts threads
        inputs = measure.prepared(contestant, bench.build(sized, "cpu", case.dtype))
        call, begin = functools.partial(measure.once, contestant, inputs), time.perf_counter()
        peak = peak_of(call, "cpu")
    if time.perf_counter() - begin < QUICK_CALL:  # the first of its size makes what libraries keep: 30 MB under SDPA
        peak = peak_of(call, "cpu")
    return None if peak is None else peak[1] - peak[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Peak extra bytes of contestants.")
    parser.add_argument("case")
    parser.add_argument("contestants", nargs="+", metavar="contestant")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args(arguments)
    peak, fork = functools.partial(_contestant_peak, options.case, options.threads), multiprocessing.get_context("fork")
    peaks = {}
    for name in options.contestants:  # this process has imported torch, which takes seconds, and run nothing yet
        with ProcessPoolExecutor(1, mp_context=fork) as process:
            try:
                peaks[name] = process.submit(peak, name).result()
            except BrokenProcessPool as error:
                raise RuntimeError(f"{name!r} was killed in {options.case} (out of memory?)") from error
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
