"""The part "tests": runs tests/gpu, one process an op at the same time, and survives what a broken kernel does.

An illegal access spoils the process for every test after it: the test that met it is failed, and a new process goes on
behind it. The tests that need tens of gigabytes run last, by themselves.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import sys
import threading
import time
import tokenize
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.environment import ROOT
from bench.gpu.suite import run_bounded, tail
from lumos_kernels import dispatch

ENDED = "ended the process"
KERNEL_FILES = ROOT / "tests" / "triton_kernels"
LARGE_SHARE = 0.3  # of the time, for the large tests


def gpu_implementations() -> list[tuple[str, str]]:
    return [
        (name, impl)
        for name, op in dispatch.ops().items()
        for impl in op.implementations
        if impl not in ("native", "reference")
    ]


def run(run: Any) -> None:
    """Records {"tests": [{"test", "pair", "outcome", "seconds", "reason"}], "digests", "incomplete"}."""
    pairs = [(name, "reference") for name in ("mm_rope", "frame_attention", "tube_masked_loss", "masked_sample")]
    pairs = pairs if run.dry_run else gpu_implementations()
    run.record["digests"] = {f"{op} {impl}": digest(op, impl) for op, impl in pairs}
    groups: list[Group | KernelFile] = [Group(run, op) for op in dict.fromkeys(op for op, _ in pairs)]
    groups += [] if run.dry_run else [KernelFile(run, file) for file in kernel_files()]
    _together(run, groups, groups, "not large", run.left() * (1 - LARGE_SHARE))
    # Attention past 2^31 elements takes 50 GB; the others fit beside each other.
    by_op = [group for group in groups if isinstance(group, Group)]
    alone = [group for group in by_op if group.op == "frame_attention"]
    _together(run, groups, [group for group in by_op if group not in alone], "large", run.left() * 0.6)
    _together(run, groups, alone, "large", run.left())
    run.record["incomplete"] = {
        op: [problem for group in groups if group.op == op for problem in group.problems]
        for op in {group.op for group in groups if group.problems}
    }
    run.record["logs"] = {group.log.stem: tail(group.log, 1500) for group in groups}


def _together(run: Any, groups: list, running: list, marker: str, seconds: float) -> None:
    """Runs groups at the same time; what all of them found so far is on file meanwhile."""
    threads = [threading.Thread(target=group.go, args=(marker, seconds)) for group in running]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        run.record["tests"] = [test for group in groups for test in group.outcomes()]
    run.record["tests"] = [test for group in groups for test in group.outcomes()]


class Group:
    """The tests of one op."""

    def __init__(self, run: Any, op: str) -> None:
        self.op, self.dry_run = op, run.dry_run
        self.file, self.done = run.folder / f"tests_{op}.jsonl", run.folder / f"tests_{op}.done"
        self.log = run.folder / f"tests_{op}.log"
        self.file.unlink(missing_ok=True)
        self.problems: list[str] = []

    def go(self, marker: str, seconds: float) -> None:
        """Runs those of the marker, again and again behind each test that took the process down."""
        end, settled = time.monotonic() + seconds, False
        while not settled:
            done = self.outcomes()
            self.done.write_text("\n".join(test["test"] for test in done))
            settings = {"ops": [self.op], "outcomes": str(self.file), "done": str(self.done)}
            settings |= {"device": "cpu"} if self.dry_run else {}
            command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-m", marker, "-p", "no:cacheprovider"]
            status = run_bounded(command, end - time.monotonic(), self.log, LUMOS_GPU_TESTS=json.dumps(settings))
            new = self.outcomes()[len(done) :]
            lost = [test for test in new if test["outcome"] == ENDED]
            if status == "timeout":
                self.problems.append(f"{marker}: no time was left")
            elif not new and status != "ok" and "exit 5" not in status:  # 5: no test was selected
                self.problems.append(f"{marker}: pytest {status}: {tail(self.log, 600)}")
            settled = status == "timeout" or not (lost or any(spoiled(test) for test in new))

    def outcomes(self) -> list[dict[str, Any]]:
        """What is on file, in order. A test that started and did not end took the process down."""
        tests: dict[str, dict[str, Any]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            try:
                note = json.loads(line)
            except ValueError:  # cut off by the end of the process
                continue
            if note.get("outcome") == "started":
                tests[note["test"]] = {**note, "outcome": ENDED, "reason": ""}
            else:
                tests[note["test"]].update(note)
        return list(tests.values())


def kernel_files() -> list[Path]:
    return sorted(KERNEL_FILES.glob("test_*_triton*.py"))


class KernelFile:
    """A file of tests/triton_kernels, which without a GPU runs in Triton's interpreter: here it runs natively."""

    def __init__(self, run: Any, file: Path) -> None:
        self.file, self.problems = file, []
        folder = file.stem.removeprefix("test_").split("_triton")[0]
        named = [name for name, op in dispatch.ops().items() if op.package.endswith(f".{folder}")]
        self.op = named[0] if named else folder
        self.log, self.report = run.folder / f"tests_{file.stem}.log", run.folder / f"tests_{file.stem}.xml"

    def go(self, marker: str, seconds: float) -> None:
        self.report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", str(self.file), "-q", "-p", "no:cacheprovider"]
        status = run_bounded([*command, f"--junitxml={self.report}"], seconds, self.log)
        if not self.report.exists():
            self.problems.append(f"{self.file.name}: pytest {status}: {tail(self.log, 600)}")

    def outcomes(self) -> list[dict[str, Any]]:
        """What the file's report says; nothing before the file is through."""
        try:
            cases = ElementTree.parse(self.report).iter("testcase")
        except (OSError, ElementTree.ParseError):
            return []
        return [self._outcome(case) for case in cases]

    def _outcome(self, case: ElementTree.Element) -> dict[str, Any]:
        outcome, reason = "passed", ""
        for kind, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            found = case.find(kind)
            if found is not None:
                outcome, reason = name, f"{found.get('message') or ''}\n{found.text or ''}"[-1500:]
        test = f"{self.file.relative_to(ROOT).as_posix()}::{case.get('name')}"
        seconds = float(case.get("time") or 0)
        return {"test": test, "pair": [self.op, "triton"], "outcome": outcome, "seconds": seconds, "reason": reason}


def spoiled(test: dict[str, Any]) -> bool:
    """Whether the test lost the device: tests/gpu/conftest.py then ended the process behind it."""
    return test["outcome"] == "failed" and test.get("lost", False)


def digest(op: str, impl: str) -> str:
    """Of an implementation's source without comments, docstrings, blank lines and the spaces inside lines: what a
    result proves, it proves of this code. The same on every version of Python.
    """
    base = ROOT / Path(*dispatch.ops()[op].package.split(".")) / impl
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    code = hashlib.sha256()
    for file in files:
        code.update(file.relative_to(base.parent).as_posix().encode())
        code.update(bare(file.read_text(encoding="utf-8")).encode())
    return code.hexdigest()[:16]


def bare(source: str) -> str:
    """Python source reduced to what runs: indentation and the characters of each line that are no space."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            first = body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    kept = ((len(line) - len(line.lstrip()), "".join(line.split())) for line in lines if line.strip())
    return "\n".join(f"{indent} {text}" for indent, text in kept)
