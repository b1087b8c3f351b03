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

from filelock import FileLock

logger = logging.getLogger("lumos_kernels")


def folder() -> Path:
    """Return LUMOS_CACHE_DIR, by default the folder lumos_kernels in the user's cache folder. It need not exist."""
    chosen = os.environ.get("LUMOS_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lumos_kernels"


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
    """Let one process at a time into the block. Where no lock file can be made, every process enters."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # the latter: a file system without locks
            folder().mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder() / f"{name}.lock"))
        yield
