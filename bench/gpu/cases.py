"""`python -m bench.gpu.cases KEY ... --out FILE`: measures registry cases in one process.

FILE holds {"cases": records so far, "running": [case, contestant]}: whoever starts it knows, if it dies, whom to leave
out. Contestants that raise, and rivals that are not installed, are rows with a reason.
"""

from __future__ import annotations

import argparse
import gc
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import measure, registry, report
from bench.gpu.suite import write_json
from bench.measure import Row
from lumos_kernels import dispatch

SHARED = ("reference", "timing")  # stretches that are no contestant's own


def contestants(case: registry.Case, device: str, excluded: Sequence[str]) -> list[registry.Contestant]:
    """All but the excluded. Our reference takes part where nothing else of ours does: on a GPU it is only slow."""
    able = registry.ops()[case.op].contestants(case, device)
    ours = [contestant.name for contestant in able if contestant.role == registry.OURS]
    without = set(excluded) | ({"lumos reference"} if len(ours) > 1 and device == "cuda" else set())
    return [contestant for contestant in able if contestant.name not in without]


def measure_one(case: registry.Case, device: str, seconds: float, excluded: Sequence[str], announce: Any) -> dict:
    """The case's record for a report, missing rivals included."""
    fighting = contestants(case, device, excluded)
    rows = measure.measure_case(
        case,
        device,
        seconds,
        with_memory=device == "cuda",  # on a CPU each peak takes a process of its own
        contestants=fighting,
        tolerant=True,
        announce=announce,
    )
    missing = registry.ops()[case.op].missing(case, device)
    rows += [Row(name, registry.RIVAL, "missing", reason) for name, reason in missing.items()]
    rows += [Row(name, registry.RIVAL, "failed", "it ended the process") for name in excluded if name not in missing]
    return report.case_record(case, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.cases", description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="+", metavar="KEY")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120.0, help="no case is begun after them")
    parser.add_argument("--each", type=float, default=1.5, help="seconds of timing a case")
    parser.add_argument("--exclude", action="append", default=[], metavar="CONTESTANT")
    parser.add_argument("--patience", type=int, default=60, help="seconds that a contestant may take before timing")
    options = parser.parse_args(arguments)

    end = time.monotonic() + options.seconds
    found: dict[str, Any] = {"cases": [], "running": None}
    slowest = 0.0
    for key in options.keys:
        if end - time.monotonic() < slowest:
            break
        case, begin = registry.find(key), time.monotonic()

        def announce(name: str, key: str = key) -> None:
            found["running"] = [key, name]
            write_json(options.out, found)
            # Who compiles or hangs for longer ends the process (SIGALRM) and is left out of the next one.
            signal.alarm(options.patience * (2 if name in SHARED else 1))

        announce("reference")
        excluded = [name for name in options.exclude if name in _names(case)]
        record = measure_one(case, options.device, options.each, excluded, announce)
        record["seconds"] = round(time.monotonic() - begin, 1)
        found["cases"].append(record)
        found["running"] = None
        signal.alarm(0)
        write_json(options.out, found)
        slowest = max(slowest, time.monotonic() - begin) / 2  # later cases are of the same order
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def _names(case: registry.Case) -> set[str]:
    bench = registry.ops()[case.op]
    return {rival.name for rival in bench.rivals} | {
        f"lumos {impl}" for impl in dispatch.ops()[case.op].implementations
    }


if __name__ == "__main__":
    main()
