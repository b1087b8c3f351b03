"""The parts of the suite, in order of value: what each finds out. run_part runs one in this process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import environment, registry, timing
from bench.environment import ROOT
from bench.gpu import tests, whole_model
from bench.gpu.cases import SHARED
from bench.gpu.suite import Part, Recorder, read_json, run_bounded, tail
from lumos_kernels import dispatch
from lumos_kernels.dispatch import Problem

PARTS = (
    Part("environment", 10),
    Part("build", 20),
    Part("tests", 160),
    Part("sanitizer", 45),
    Part("ceilings", 10),
    Part("ops", 125),
    Part("model", 75),
    Part("launches", 20),
    Part("tune", 30),
    Part("generate", 30),
    Part("profile", 30),
)

# What the ops are timed at, by value: every second of the budget goes to the first ones first.
OP_CASES = (
    "frame_attention/3B-256p-7f/bf16/forward",
    "frame_attention/3B-256p-7f/bf16/forward+backward",
    "frame_attention/1B-256p-7f/bf16/forward",
    "mm_rope/1B-256p-7f/bf16/forward",
    "mm_rope/1B-256p-7f/bf16/forward+backward",
    "tube_masked_loss/1B-384p-7f/bf16/forward+backward",
    "masked_sample/1B-256p-1f/bf16/forward",
    "frame_attention/1B-256p-7f/bf16/forward+backward",
    "frame_attention/3B-384p-7f/bf16/forward",
    "frame_attention/3B-384p-7f/bf16/forward+backward",
    "frame_attention/1B-384p-7f/bf16/forward",
    "frame_attention/1B-384p-7f/bf16/forward+backward",
    "tube_masked_loss/3B-384p-7f/bf16/forward+backward",
    "tube_masked_loss/1B-256p-7f/bf16/forward+backward",
    "mm_rope/3B-256p-7f/bf16/forward",
    "mm_rope/3B-256p-7f/bf16/forward+backward",
)
TUNER_START = 10  # seconds of a tuner's share for its start and the candidate that is under way at its end
COPY_BYTES, MATMUL_SIZE = 2**31, 8192


class Run:
    """What a part is given: where to write, how long it may take, and on what device.

    record: the part's findings, on file after each change. folder: of the parts' files.
    """

    def __init__(self, record: Recorder, folder: Path, seconds: float, dry_run: bool) -> None:
        self.record, self.folder, self.dry_run = record, folder, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def run_part(name: str, folder: Path, seconds: float, dry_run: bool) -> None:
    record = Recorder(folder / f"{name}.json")
    record.save()
    FUNCTIONS[name](Run(record, folder, seconds, dry_run))


def describe_environment(run: Run) -> None:
    run.record["environment"] = environment.record(run.device, torch.get_num_threads())
    run.record["cudnn"] = torch.backends.cudnn.version()
    run.record["backends"] = [asdict(row) for row in dispatch.table()]
    run.record["missing_rivals"] = {
        f"{name}: {rival.name}": reason
        for name, op in registry.ops().items()
        for rival in op.rivals
        if (reason := rival.missing())
    }
    if not run.dry_run:
        run.record["arch"] = Problem.of(torch.empty(0, device="cuda")).arch
        run.record["nvidia_smi"] = _output("nvidia-smi")


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout


def build(run: Run) -> None:
    """Compiles what is for CUDA. Triton kernels are compiled when the tests call them."""
    sources = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc").glob("*/*.cu"))
    run.record["sources"] = sources
    if not sources:
        run.record["result"] = "there is no CUDA source to build"
        return
    log = run.folder / "build_command.log"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    jobs = str(min(16, os.cpu_count() or 1))
    run.record["result"] = run_bounded(command, run.left(), log, LUMOS_BUILD="cuda", MAX_JOBS=jobs)
    run.record["log"] = tail(log)
    if run.record["result"] != "ok":
        raise SystemExit(f"the build {run.record['result']}")


def sanitizer(run: Run) -> None:
    """compute-sanitizer's tools on small shapes of every GPU implementation: tools/sanitize.py."""
    out = run.folder / "sanitizer_result.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "tools/sanitize.py", "--out", str(out), "--seconds", f"{run.left():.0f}"]
    log = run.folder / "sanitizer_command.log"
    run.record["status"] = run_bounded(command + (["--dry-run"] if run.dry_run else []), run.left() + 5, log)
    run.record["runs"] = (read_json(out) or {}).get("runs", [])
    run.record["log"] = tail(log)


def ceilings(run: Run) -> None:
    """What the device reaches: copying two gigabytes, and a large bf16 matmul on random data."""
    count, size = (2**20, 128) if run.dry_run else (COPY_BYTES // 2, MATMUL_SIZE)
    source = torch.randn(count, device=run.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=run.device).to(torch.bfloat16)
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    samples = timing.interleave(calls, 0.05 if run.dry_run else 2.0, timing.clock_for(run.device))
    seconds = {name: sorted(times)[len(times) // 2] for name, times in samples.items()}
    run.record["copy"] = {"seconds": seconds["copy"], "GB/s": 4 * count / seconds["copy"] / 1e9}
    run.record["matmul"] = {"seconds": seconds["matmul"], "TFLOP/s": 2 * size**3 / seconds["matmul"] / 1e12}


def op_cases(run: Run) -> list[str]:
    """Keys of the cases, those of ops that have no benchmark left out."""
    if run.dry_run:
        keys = [case.key for case in registry.select((), "*") if case.video.name == "smoke"]
        return [key for key in keys if "/bf16/" in key]
    known = {case.key for case in registry.select((), "*")}
    run.record["no_such_case"] = [key for key in OP_CASES if key not in known]
    return [key for key in OP_CASES if key in known]


def ops(run: Run) -> None:
    """Every case in one process (bench.gpu.cases); who takes it down is left out of the next one."""
    run.record["cases"], run.record["crashed"] = [], []
    todo, excluded = op_cases(run), []
    while todo and run.left() > 1:
        out, log = run.folder / "ops_cases.json", run.folder / "ops_command.log"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.gpu.cases", *todo, "--out", str(out), "--device", run.device]
        command += ["--seconds", f"{run.left():.1f}", *(f"--exclude={name}" for name in excluded)]
        command += ["--each", "0.05" if run.dry_run else "1.5"]
        status = run_bounded(command, run.left() + 5, log)
        found = read_json(out) or {"cases": [], "running": None}
        run.record["cases"] += found["cases"]
        done = {case["case"] for case in found["cases"]}
        todo = [key for key in todo if key not in done]
        run.record["status"], run.record["log"] = status, tail(log)
        if status in ("ok", "timeout") or not found["running"]:
            break
        key, name = found["running"]
        run.record["crashed"] += [{"case": key, "contestant": name, "log": tail(log, 1500)}]
        if name in excluded or name in SHARED:
            todo = [other for other in todo if other != key]
        else:
            excluded.append(name)
    run.record["not_measured"] = todo


def tune(run: Run) -> None:
    """Tries configurations where an implementation offers it: a module `tune` in its package, run as a command.

    The hook: `python -m <package>.<impl>.tune --minutes M --out FILE` measures for at most M minutes and writes a table
    to FILE, as text to put into the sources; `--dry-run` lists what it would try, on any machine.
    """
    tuners = [
        (op.name, impl, f"{op.package}.{impl}.tune")
        for op in dispatch.ops().values()
        for impl in op.implementations
        if registry.installed(f"{op.package}.{impl}") and _is_package(f"{op.package}.{impl}")
    ]
    tuners = [tuner for tuner in tuners if registry.installed(tuner[2])]
    run.record["tuners"] = {}
    for number, (op, impl, module) in enumerate(tuners):
        out, log = run.folder / f"tune_{op}_{impl}.py", run.folder / f"tune_{op}_{impl}.log"
        out.unlink(missing_ok=True)
        share = run.left() / (len(tuners) - number)
        options = ["--minutes", f"{max(share - TUNER_START, 1) / 60:.2f}", "--out", str(out)]
        command = [sys.executable, "-m", module, *(["--dry-run"] if run.dry_run else options)]
        found = {"status": run_bounded(command, share, log), "table": tail(out, 20000), "log": tail(log)}
        run.record["tuners"] = {**run.record["tuners"], f"{op} {impl}": found}


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def profile(run: Run) -> None:
    """The kernels of what missed its gate, and what ncu says of the slowest of them."""
    from bench.gpu import gates, profiles

    parts = {name: {"data": read_json(run.folder / f"{name}.json")} for name in ("ops", "tests")}
    missed = [gate for gate in gates.evaluate({"parts": parts}) if gate["status"] == "missed" and gate.get("case")]
    cases = list(dict.fromkeys((gate["case"], gate["contestant"]) for gate in missed))
    if run.dry_run:
        cases = [(op_cases(run)[0], "lumos reference")]
    run.record["profiles"] = []
    for key, contestant in cases:
        if run.left() < 3:
            break
        found = profiles.kernels(key, contestant, run.device)
        if not run.dry_run and run.left() > 15:
            found["ncu"] = profiles.ncu(key, contestant, run.folder / "ncu.log", min(20.0, run.left() - 3))
        run.record["profiles"] += [found]
    run.record["left_out"] = [list(case) for case in cases[len(run.record["profiles"]) :]]


FUNCTIONS: dict[str, Callable[[Run], Any]] = {
    "environment": describe_environment,
    "build": build,
    "tests": tests.run,
    "sanitizer": sanitizer,
    "ceilings": ceilings,
    "ops": ops,
    "model": whole_model.training,
    "launches": whole_model.launches,
    "tune": tune,
    "generate": whole_model.generation,
    "profile": profile,
}
