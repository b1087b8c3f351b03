"""Items that prove: tests/gpu on many processes, tests/triton_kernels natively, compute-sanitizer on small shapes.

An illegal access spoils the process for every test after it. bench/gpu/notes.py then ends that process, pytest-xdist
starts another one, and pytest is started again where it was not xdist that lost a process. The tests that need tens of
gigabytes run afterwards, one at a time.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.gpu import results
from bench.gpu.processes import ROOT, run_bounded, tail
from lumos_kernels import dispatch

if TYPE_CHECKING:
    from bench.gpu.worker import Run

ENDED = "ended the process"
GPU_TESTS, KERNEL_TESTS = "tests/gpu", "tests/triton_kernels"
PROCESSES = 12
FINISHED = ("ok", "failed (exit 1)", "failed (exit 5)")  # of pytest: to the end, with failures, nothing was selected
MEMORY = re.compile(r"out of memory|ALLOC_FAILED|OutOfMemory")
PATIENCE = 40  # seconds a test may take; then it ends its process
LARGE_SECONDS = 25.0  # kept for the large tests, one at a time
DRY_RUN = {"device": "cpu", "ops": ["mm_rope"]}
DRY_RUN_TESTS = "left_alone or element_is_written or past_int32"


def gpu_implementations() -> list[tuple[str, str]]:
    """Return (op, implementation) of everything that is for a GPU."""
    return [
        (name, impl)
        for name, op in dispatch.ops().items()
        for impl in op.implementations
        if impl not in ("native", "reference")
    ]


def own_implementations() -> list[tuple[str, str]]:
    """Return those of gpu_implementations whose kernels are this project's: what has to be proven."""
    return [(op, impl) for op, impl in gpu_implementations() if impl != "flash"]


def find(run: Run) -> None:
    """Record {"tests": [{"test", "pair", "outcome", "seconds", "reason"}], "digests", "incomplete"}."""
    pairs = [("mm_rope", "reference")] if run.dry_run else own_implementations()
    run["digests"] = {f"{op} {impl}": results.digest(op, impl) for op, impl in pairs}
    run["tests"], run["incomplete"] = [], ["not finished"]
    settings = DRY_RUN if run.dry_run else {"impls": sorted({impl for _, impl in pairs})}
    session = Session(run, settings)
    if run.dry_run:
        problems = session.go([GPU_TESTS], run.left() - 1, 0)
    else:
        problems = session.go([GPU_TESTS, "-m", "not large"], run.left() - LARGE_SECONDS, PROCESSES)
        if session.forget(MEMORY):  # the processes share the memory: what had too little runs again, alone
            problems += session.go([GPU_TESTS, "-m", "not large"], run.left() - LARGE_SECONDS / 2, 0)
        problems += session.go([GPU_TESTS, "-m", "large"], run.left() - 1, 0)
    run["incomplete"] = problems
    if not run.dry_run and run.left() > 10:  # a bonus: the tests of the interpreter, on the GPU
        run["kernel_tests"] = session.go([KERNEL_TESTS], run.left() - 1, PROCESSES) or ["finished"]
    run["log"] = tail(session.log)


class Session:
    """Runs of pytest that share a file of outcomes, which the processes of a run write line by line."""

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        self.run, self.settings = run, settings
        self.file, self.done = run.work / "tests.jsonl", run.work / "tests.done"
        self.log = run.work / "pytest.log"
        self.file.unlink(missing_ok=True)

    def go(self, selection: list[str], seconds: float, processes: int) -> list[str]:
        """Run what is selected, again behind a test that took pytest down. Return why something was not run.

        processes: of pytest-xdist; with 0 the tests run in pytest's own.
        """
        end = self.run.end - (self.run.left() - seconds)
        while True:
            done = self.outcomes()
            self.done.write_text("\n".join(test["test"] for test in done))
            own = {"outcomes": str(self.file), "done": str(self.done), "patience": PATIENCE}
            environment = {
                "LUMOS_GPU_TESTS": json.dumps({**self.settings, **own}),
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            }
            left = end - (self.run.end - self.run.left())
            status = run_bounded(self.command(selection, processes), left, self.log, **environment)
            found = self.outcomes()
            self.run["tests"] = found
            new = found[len(done) :]
            if status == "timeout":
                return [f"{' '.join(selection)}: no time was left"]
            if not new and status not in (FINISHED[0], FINISHED[2]):
                return [f"{' '.join(selection)}: pytest {status}: {tail(self.log, 600)}"]
            restarts = any(test["outcome"] == ENDED or test.get("lost") for test in new)
            if status in FINISHED and (processes or not restarts):  # xdist started other processes itself
                return []

    def forget(self, reason: re.Pattern[str]) -> int:
        """Forget the tests that failed for this reason, so that the next run has them. Return how many there are."""
        failed = [test for test in self.outcomes() if test["outcome"] == "failed"]
        names = {test["test"] for test in failed if reason.search(test.get("reason", ""))}
        kept = [line for line in self._lines() if line["test"] not in names]
        self.file.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        return len(names)

    def command(self, selection: list[str], processes: int) -> list[str]:
        """Return the command of pytest."""
        command = [sys.executable, "-m", "pytest", *selection, "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.notes"]
        if self.run.dry_run:
            command += ["-k", DRY_RUN_TESTS]
        return [*command, "-n", str(processes), "--max-worker-restart", "100"] if processes else command

    def outcomes(self) -> list[dict[str, Any]]:
        """Return what is on file, in order. A test that started and did not end took its process down."""
        tests: dict[str, dict[str, Any]] = {}
        for note in self._lines():
            if note.get("outcome") == "started":
                tests[note["test"]] = {**note, "outcome": ENDED, "reason": ""}
            elif note["test"] in tests:
                tests[note["test"]].update(note)
        return list(tests.values())

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:  # an empty line, or one that was cut off by the end of its process
                continue


def sanitizer(run: Run) -> None:
    """Record memcheck, which decides, then racecheck and synccheck, which advise (tools/sanitize.py)."""
    sanitize = _sanitize()
    pairs = [("mm_rope", "reference")] if run.dry_run else own_implementations()
    run["runs"] = []
    for tools in (("memcheck",), () if run.dry_run else ("racecheck", "synccheck")):
        for found in sanitize.examine_all(pairs, tools, run.left() - 1, run.work, run.dry_run):
            run["runs"] = [*run["runs"], found]


def _sanitize() -> Any:
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "tools" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
