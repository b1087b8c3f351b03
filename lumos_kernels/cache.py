"""The folder that keeps between processes what was found out on this machine: verdicts and measured configurations.

Everything in it can be made again. A file that is missing, broken or read-only costs time and changes no result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger("lumos_kernels")

QUIET_WAIT, LONGEST_WAIT = 3.0, 300.0  # seconds


def folder() -> Path:
    """Return LUMOS_CACHE_DIR, by default the folder lumos_kernels in the user's cache folder. It need not exist.

    A user without a home has a folder of his own among the temporary files.
    """
    chosen = os.environ.get("LUMOS_CACHE_DIR")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lumos_kernels"
    try:
        return base.expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"lumos_kernels-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def read(name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the folder, {} where there is none or the file is broken."""
    try:
        value = json.loads((folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write(name: str, value: dict[str, Any]) -> bool:
    """Replace a file of the folder in one step. Return whether that was possible: a home may be read-only."""
    target = folder() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=1, sort_keys=True)
            os.chmod(scratch, 0o644)  # mkstemp's file is its owner's alone, and users may share a folder
            os.replace(scratch, target)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        logger.warning("%s cannot be written (%s); LUMOS_CACHE_DIR names another folder", target, error)
        return False
    return True


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time into the block.

    Every process enters where no lock file can be made, and where the one inside takes longer than LONGEST_WAIT.
    """
    file = folder() / f"{name}.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # the latter: a file system without locks
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file)
            try:
                lock.acquire(timeout=QUIET_WAIT)
            except Timeout:
                logger.warning("waiting for another process, up to %.0f s: it holds %s", LONGEST_WAIT, file)
                lock.acquire(timeout=LONGEST_WAIT)
            stack.callback(lock.release)
        yield
