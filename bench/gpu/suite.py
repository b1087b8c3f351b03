"""One call of the suite: starts its processes one after the other, restarts them behind an item that ended one, and
keeps what is known on file after every item. This process imports no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import rivals_site
from bench.gpu import gates, proof, results, summary
from bench.gpu.processes import kill_group, read_json, start, tail, write_json, write_text

SECONDS = 300.0  # of a call, for which the shares were planned
SHORTEST = 3.0  # seconds: with less left, no process is started
GRACE = 6.0  # seconds an item may take to leave after its limit; then its process is killed
POLL = 0.2
LOG_KEPT = 400_000  # characters of all processes' output


@dataclass(frozen=True)
class Stage:
    """One process of a call and the seconds that its items are planned for."""

    name: str
    seconds: float


# The first process compiles, checks and tunes, the second one imports the table that the tuner wrote. In call 2 the
# first one leads pytest and compute-sanitizer, the second one alone may import the rivals' libraries.
CALLS: Mapping[int, Sequence[Stage]] = {
    1: (Stage("prepare", 130.0), Stage("measure", 162.0)),
    2: (Stage("prove", 130.0), Stage("compare", 162.0)),
}


class Call:
    """A run of one call.

    out: folder of at most eight files: suite.json, suite.md, log.txt, tuned.py and ncu.txt.
    seconds: for everything. dry_run: on a CPU at small sizes. commit: of the code, where git cannot tell.
    before: folder of the other call's result on the same code; where there is none, the call runs alone.
    rivals_site: what `tools/rivals.py unpack` filled.
    """

    def __init__(
        self,
        number: int,
        out: Path,
        seconds: float = SECONDS,
        dry_run: bool = False,
        commit: str | None = None,
        before: Path | None = None,
        rivals_site: Path | None = None,
    ) -> None:
        self.start, self.number, self.out, self.seconds = time.monotonic(), number, out, seconds
        self.dry_run, self.commit, self.rivals_site = dry_run, commit, rivals_site
        self.code = results.code_digest()
        self.items: dict[str, Any] = {}
        self.processes = 0
        self.before: list[dict[str, Any]] = []
        self.alone: str | None = None
        try:
            self.before = [results.read(before)] if before else []
        except ValueError as error:  # the machine's time is worth more: bench.gpu.proof joins the results later
            self.alone, before = str(error), None
        if self.before and self.before[0]["code"] != self.code:
            raise ValueError(
                f"{before} is of other code ({self.before[0]['code']}, here {self.code}): run its call again"
            )
        if before and str(number) in self.before[0]["calls"]:
            raise ValueError(f"{before} holds call {number} already")
        out.mkdir(parents=True, exist_ok=True)
        if before and not dry_run:
            _put_in_place(before)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def run(self) -> dict[str, Any]:
        """Run the processes in order and return the whole result, which is on file after each item."""
        with tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as folder:
            stages = CALLS[self.number]
            for number, stage in enumerate(stages):
                later = sum(other.seconds for other in stages[number + 1 :]) * self.seconds / SECONDS
                share = max(min(stage.seconds * self.seconds / SECONDS, self.left()), self.left() - later)
                self._stage(stage, Path(folder), time.monotonic() + share)
            return self._write()

    def _stage(self, stage: Stage, work: Path, end: float) -> None:
        """Start the stage's process, and again behind each item that ended it."""
        record, log = work / f"{stage.name}.json", work / f"{stage.name}.log"
        while (left := end - time.monotonic()) > SHORTEST:
            record.unlink(missing_ok=True)
            done = [name for name in self.items if self.items[name]["stage"] == stage.name]
            command = [sys.executable, "-m", "bench.gpu.worker", stage.name, "--record", str(record)]
            command += ["--out", str(self.out), "--work", str(work), "--seconds", f"{left:.1f}"]
            command += [f"--done={name}" for name in done] + (["--dry-run"] if self.dry_run else [])
            log.unlink(missing_ok=True)
            self.processes += 1
            process = start(command, log, **self._environment(stage, work))
            try:
                killed = self._watch(process, stage, record, end)
            finally:
                kill_group(process)
            found = read_json(record) or {}
            self._take(stage, found)
            self._keep(log, stage)
            running = found.get("running")
            if running:
                why = "overrun" if killed else "ended the process"
                self._lost(stage, running, f"{why}\nexit {process.returncode}\n{tail(log)}")
            elif process.returncode and not killed:  # it died between items, as it would again
                self._lost(
                    stage, {"name": f"{stage.name}: start", "begun": time.time()}, f"ended the process\n{tail(log)}"
                )
                return
            else:
                return

    def _environment(self, stage: Stage, work: Path) -> dict[str, str]:
        """Return what the process is told: the user's own tables and interpreters play no part in what is measured."""
        own = {"LUMOS_CACHE_DIR": str(work / "cache"), "TRITON_INTERPRET": "0"}
        if self.rivals_site is None or stage.name != "compare":
            return own
        return {**own, **rivals_site.environment(self.rivals_site)}

    def _watch(self, process: subprocess.Popen, stage: Stage, record: Path, end: float) -> bool:
        """Return False when the process ended, True when it must be: it hangs beyond an item's limit or its own end."""
        seen = 0
        while process.poll() is None:
            time.sleep(POLL)
            stamp = record.stat().st_mtime_ns if record.exists() else 0
            if stamp != seen:
                seen = stamp
                self._take(stage, read_json(record) or {})
                self._write()
            running = (read_json(record) or {}).get("running")
            late = running and time.time() > running["begun"] + running["limit_s"] + GRACE
            if late or time.monotonic() > end + GRACE:
                return True
        return False

    def _take(self, stage: Stage, found: Mapping[str, Any]) -> None:
        for name, item in found.get("items", {}).items():
            self.items[name] = {**item, "stage": stage.name}

    def _lost(self, stage: Stage, running: Mapping[str, Any], said: str) -> None:
        """Note the item that was running when the process ended, with what it had found. said: status, then a log."""
        status, log = said.split("\n", 1)
        item = {"seconds": round(time.time() - running["begun"], 1), "data": {}, **self.items.get(running["name"], {})}
        self.items[running["name"]] = {**item, "status": status, "stage": stage.name, "log": log}
        self._write()

    def _keep(self, log: Path, stage: Stage) -> None:
        kept = tail(self.out / "log.txt", LOG_KEPT) + f"\n==== {stage.name}\n" + tail(log, LOG_KEPT)
        write_text(self.out / "log.txt", kept[-LOG_KEPT:])

    def _write(self) -> dict[str, Any]:
        environment = ((self.items.get("machine") or {}).get("data") or {}).get("environment")
        if environment and self.commit:
            environment["commit"] = self.commit
        settings = {"seconds": self.seconds, "dry_run": self.dry_run, "processes": self.processes}
        settings |= {"alone": self.alone} if self.alone else {}
        settings["spent_s"] = round(time.monotonic() - self.start, 1)
        call = {"environment": environment, "settings": settings, "items": self.items}
        own = {"schema": results.SCHEMA, "code": self.code, "calls": {str(self.number): call}}
        result = results.merged([*self.before, own])
        result |= {"gates": [], "verdicts": []}
        try:
            result["gates"] = gates.evaluate(result)
            result["verdicts"] = proof.verdicts(result)
            text = summary.markdown(result)
        except Exception:  # what is derived can be derived again: the call goes on, and the findings are kept
            text = f"The summary failed:\n\n{traceback.format_exc()}"
        write_json(self.out / "suite.json", result)
        write_text(self.out / "suite.md", text)
        return result


def _put_in_place(before: Path) -> None:
    """Copy the table that the earlier call tuned into the package: this call tests and measures the same tree."""
    table = (before if before.is_dir() else before.parent) / results.TABLE
    if table.exists() and os.path.abspath(table) != os.path.abspath(results.TUNED):
        shutil.copyfile(table, results.TUNED)
