"""What has reached the disk, and who writes: syncs of files and folders, locks that end with their process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def sync(file: IO) -> None:
    """What was written to an open file, to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """A closed file, or the names in a folder, to the disk; nothing on Windows, which opens no folders."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(file: IO) -> bool:
    """Locks an open file for its process, until it is closed or the process ends; False where another one holds it.

    True as well where there are no such locks: on Windows, and on file systems without them.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
