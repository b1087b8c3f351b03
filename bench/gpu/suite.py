"""Runs parts in processes of their own within a budget of time, and keeps what they wrote whatever becomes of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import ROOT

SCHEMA = 1
PLANNED_SECONDS = 525.0  # of all parts together in the run they were planned for, 9 minutes less the start
SHORTEST = 5.0  # seconds: with less left, a part is not started
LOG_TAIL = 4000  # characters of a part's output that are kept in the result


@dataclass(frozen=True)
class Part:
    """One part of the suite.

    seconds: it may take in a run of nine minutes; shorter and longer runs scale it.
    grace: seconds beyond them after which it is killed; a part looks at its own deadline and ends before.
    """

    name: str
    seconds: float
    grace: float = 10.0


class Recorder:
    """What a part found so far, on file after every addition."""

    def __init__(self, file: Path) -> None:
        self.file, self.data = file, {}

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.save()

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def save(self) -> None:
        write_json(self.file, self.data)


def write_json(file: Path, value: Any) -> None:
    """Replaces the file in one step: a reader, or a process that is killed here, sees the old or the new one."""
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)


def read_json(file: Path) -> Any:
    """The file's value; None where there is no file or it holds no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_bounded(command: Sequence[str], seconds: float, log: Path, **environment: str) -> str:
    """ "ok", "failed (exit N)" or "timeout". Runs in a process group of its own, which is killed whole at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
    return "timeout" if code is None else "ok" if code == 0 else f"failed (exit {code})"


def _kill_group(process: subprocess.Popen) -> None:
    """A launcher that died may have left children that hold the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def code_digest() -> str:
    """Of the sources of both packages."""
    digest = hashlib.sha256()
    for file in sorted(file for package in ("lumos_kernels", "lumos") for file in (ROOT / package).rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def tail(log: Path, length: int = LOG_TAIL) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-length:] if log.exists() else ""


class Suite:
    """A run of the suite.

    out: folder of suite.json and suite.md; work: of the parts' own files. seconds: for all parts together.
    commit: of the code, where git cannot tell.
    """

    def __init__(self, out: Path, work: Path, seconds: float, dry_run: bool = False, commit: str | None = None) -> None:
        self.out, self.work, self.seconds, self.dry_run, self.commit = out, work, seconds, dry_run, commit
        self.start = time.monotonic()

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def run(self, parts: Sequence[Part], resume: bool = False) -> dict[str, Any]:
        """Runs the parts in order and returns the whole result, which is on file after each of them.

        resume: keep what an earlier run left in `work`, leave out the parts that it finished. Raises ValueError where
        the code has changed since: a result is of one state of the code.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        earlier = (read_json(self.work / "statuses.json") or {}) if resume else {}
        code = code_digest()
        if earlier.get("code", code) != code:
            raise ValueError(f"{self.work} holds parts of other code: run without --resume")
        statuses = earlier.get("parts", {})
        finished = {name for name, status in statuses.items() if status["status"] == "ok"}
        for part in parts:
            if part.name in finished:
                continue
            if self.left() < SHORTEST:
                statuses.setdefault(part.name, {"status": "not started", "wall_s": 0.0, "log": "no time was left"})
            else:
                statuses[part.name] = self._run(part)
            write_json(self.work / "statuses.json", {"code": code, "parts": statuses})
            result = self._write(statuses)
        return result if parts and not finished.issuperset(p.name for p in parts) else self._write(statuses)

    def _run(self, part: Part) -> dict[str, Any]:
        file, log = self.work / f"{part.name}.json", self.work / f"{part.name}.log"
        file.unlink(missing_ok=True)
        seconds = min(part.seconds * self.seconds / PLANNED_SECONDS, self.left())
        command = [sys.executable, "-m", "bench.gpu_suite", "--out", str(self.out), "--work", str(self.work)]
        command += ["--part", part.name, "--seconds", f"{seconds:.1f}", *(["--dry-run"] if self.dry_run else [])]
        print(f"{part.name}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
        begin = time.monotonic()
        status = run_bounded(command, min(seconds + part.grace, max(self.left(), SHORTEST)), log)
        wall = time.monotonic() - begin
        print(f"{part.name}: {status}, {wall:.1f} s", file=sys.stderr, flush=True)
        return {"status": status, "wall_s": round(wall, 1), "log": tail(log)}

    def _write(self, statuses: dict[str, Any]) -> dict[str, Any]:
        from bench.gpu import gates, proof, summary

        parts = {name: {**status, "data": read_json(self.work / f"{name}.json")} for name, status in statuses.items()}
        environment = (parts.get("environment", {}).get("data") or {}).get("environment")
        if environment and self.commit:
            environment["commit"] = self.commit
        result = {
            "schema": SCHEMA,
            "environment": environment,
            "settings": {"minutes": self.seconds / 60, "dry_run": self.dry_run},
            "parts": parts,
        }
        result["gates"] = gates.evaluate(result)
        result["verdicts"] = proof.verdicts(result)
        write_json(self.out / "suite.json", result)
        (self.out / "suite.md").write_text(summary.markdown(result), encoding="utf-8")
        return result
