"""Processes that end in time, and files that are replaced whole. Imports no torch, and so starts at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOG_TAIL = 4000  # characters of an output that are kept in a result


def write_json(file: Path, value: Any) -> None:
    """Replace the file in one step: a reader, or a process that is killed here, sees the old or the new one.

    What JSON has no type for is written as text: one such value must not keep the others from the file.
    """
    write_text(file, json.dumps(value, indent=1, default=str) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replace the file in one step, as write_json does."""
    scratch = file.with_suffix(file.suffix + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)


def read_json(file: Path) -> Any:
    """Return the file's value, or None where there is no file or it holds no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
    """Start a command in a process group of its own. Its output goes to the end of `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_bounded(command: Sequence[str], seconds: float, log: Path, **environment: str) -> str:
    """Return "ok", "failed (exit N)" or "timeout". The process group is killed whole at the end.

    log: a new file with the output of this command alone.
    """
    log.unlink(missing_ok=True)
    process = start(command, log, **environment)
    try:
        code = process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        kill_group(process)
    return "timeout" if code is None else "ok" if code == 0 else f"failed (exit {code})"


def kill_group(process: subprocess.Popen) -> None:
    """End a process and what it started: a launcher that died may have left children that hold the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, length: int = LOG_TAIL) -> str:
    """Return the end of a file, nothing where there is none."""
    return log.read_text(encoding="utf-8", errors="replace")[-length:] if log.exists() else ""
