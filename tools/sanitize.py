"""Run compute-sanitizer over every GPU implementation at small shapes and writes what it found as JSON.

    python tools/sanitize.py --out FILE [--seconds S] [--tools memcheck,racecheck,synccheck]

Each (op, implementation, tool) is a process of its own: forward and backward on small inputs whose lengths do not fit
the tiles. FILE holds {"runs": [{"op", "impl", "tool", "status", "errors", "findings", "seconds"}]} and is rewritten
after each; status is "clean", "errors", "failed" (the program ended before it was done), "timeout" or "unavailable".
Some run at a time; memcheck of every implementation comes first. memcheck decides; racecheck and synccheck advise.
`--dry-run` calls the CPU implementations without the sanitizer.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]

from bench.gpu.processes import run_bounded, write_json  # noqa: E402
from bench.gpu.tests import own_implementations  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck")
ADVISORY = (
    "racecheck",
    "synccheck",
)  # they may report false hazards where kernels wait on mbarriers of the copy engine
JOBS = 6
MARK = "========= "
DONE = "lumos: all calls returned"  # the program's last line
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
RACES = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
NO_DEVICE = re.compile(r"Device not supported|No supported gpu devices|Unable to find injection library", re.IGNORECASE)
FINDINGS = 12  # kept of each run, LINES of each
LINES = 6


def parse(output: str) -> dict[str, Any]:
    """{"status", "errors", "findings"} of compute-sanitizer's output together with the program's.

    Lines of the sanitizer begin with "========= "; a finding is its first line and the indented ones below it.
    """
    said = [line[len(MARK) :] for line in output.splitlines() if line.startswith(MARK)]
    findings: list[list[str]] = []
    for line in said:
        if line.startswith((" ", "\t")):
            if findings:
                findings[-1].append(line.strip())
        elif line and not line.startswith(
            ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "Target application")
        ):
            findings.append([line.strip()])
    text = "\n".join(said)
    summaries = [int(count) for count in SUMMARY.findall(text)] + [int(e) for _, e, _ in RACES.findall(text)]
    errors = sum(summaries)
    if NO_DEVICE.search(text):
        status = "unavailable"
    elif errors:
        status = "errors"
    elif not summaries or DONE not in output:
        status = "failed"
    else:
        status = "clean"
    if status == "clean":  # what remains are remarks, such as a warning of racecheck
        findings = [finding for finding in findings if finding[0].startswith(("Error", "Warning"))]
    return {"status": status, "errors": errors, "findings": [found[:LINES] for found in findings[:FINDINGS]]}


def program(op: str, impl: str, device: str) -> None:
    """Run forward and backward at two small sizes: the program under the sanitizer."""
    from gpu_examples import SMALL, SMALL_WIDE, example

    for size in (SMALL, SMALL_WIDE):
        example(op, size, device).with_gradients(impl)
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    print(DONE)


def command(op: str, impl: str, tool: str, dry_run: bool) -> list[str]:
    """memcheck also checks that what was allocated is freed no twice; a finding makes the exit status 9."""
    own = [sys.executable, str(Path(__file__).resolve()), "--program", op, impl, "cpu" if dry_run else "cuda"]
    return own if dry_run else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *own]


def examine(op: str, impl: str, tool: str, seconds: float, log: Path, dry_run: bool) -> dict[str, Any]:
    start = time.monotonic()
    status = run_bounded(
        command(op, impl, tool, dry_run),
        seconds,
        log,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # each tensor is an allocation of its own, so memcheck sees its bounds
    )
    output = log.read_text(encoding="utf-8", errors="replace")
    found = parse(output + (f"\n{MARK}ERROR SUMMARY: 0 errors" if dry_run and status == "ok" else ""))
    if status == "timeout":
        found["status"] = "timeout"
    found["tail"] = "" if found["status"] == "clean" else output[-1500:]
    return {"op": op, "impl": impl, "tool": tool, **found, "seconds": round(time.monotonic() - start, 1)}


def examine_all(
    pairs: Sequence[tuple[str, str]], tools: Sequence[str], seconds: float, logs: Path, dry_run: bool, jobs: int = JOBS
) -> Iterator[dict[str, Any]]:
    """Yield what each tool says of each (op, implementation), tool by tool, some processes at a time.

    seconds: for all of them. logs: folder of their outputs.
    """
    end = time.monotonic() + seconds
    absent = None if dry_run or shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"

    def one(job: tuple[str, str, str]) -> dict[str, Any]:
        blank = dict(zip(("op", "impl", "tool"), job, strict=True)) | {"errors": 0, "findings": [], "seconds": 0.0}
        if absent:
            return {**blank, "status": "unavailable", "tail": absent}
        left = end - time.monotonic()
        if left < 2:
            return {**blank, "status": "timeout", "tail": "not begun: no time was left"}
        return examine(*job, left, logs / f"sanitize_{'_'.join(job)}.log", dry_run)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, [(op, impl, tool) for tool in tools for op, impl in pairs])


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where a tool found an error that is not advisory."""
    parser = argparse.ArgumentParser(prog="tools/sanitize.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all runs together")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes at a time")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--program", nargs=3, metavar=("OP", "IMPL", "DEVICE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.program:
        program(*options.program)
        return 0
    if options.out is None:
        parser.error("--out FILE is where the result goes")
    pairs = [("mm_rope", "reference")] if options.dry_run else own_implementations()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tools = options.tools.split(",")
        for run in examine_all(pairs, tools, options.seconds, Path(folder), options.dry_run, options.jobs):
            runs.append(run)
            write_json(options.out, {"runs": runs})
            print(f"{run['op']} {run['impl']} {run['tool']}: {run['status']}, {run['errors']} errors", flush=True)
    return int(any(run["status"] == "errors" and run["tool"] not in ADVISORY for run in runs))


if __name__ == "__main__":
    sys.exit(main())
