"""`python -m bench.gpu.worker STAGE --record FILE ...`: runs the items of a stage in one process, in order of value.

FILE holds {"items": {name: item}, "running": {"name", "begun", "limit_s"} or None} and is replaced whenever an item
finds something: whoever started the process knows, if it dies, which item ended it and what that had found.
"""

from __future__ import annotations

import argparse
import gc
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu import results
from bench.gpu.machine import Clocks
from bench.gpu.processes import write_json

LOST = 3  # exit status of a process whose device is lost
SHORTEST = 1.0  # seconds: with less left for it, an item is not started


@dataclass(frozen=True)
class Item:
    """One thing to find out. seconds: its share; what earlier items leave over is its as well."""

    name: str
    seconds: float
    find: Callable[[Run], None]


class Overrun(BaseException):
    """The share of the item is over. It is no Exception, so that an item that tolerates failures still ends."""


class Run:
    """Everything an item is given.

    run[key] = value puts a finding on file. out: folder of the results; work: of scratch files; shared: what an item
    leaves for later ones of the same process, which must do without it after a restart.
    """

    def __init__(self, record: Path, out: Path, work: Path, dry_run: bool) -> None:
        self.record, self.out, self.work, self.dry_run = record, out, work, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.shared: dict[str, Any] = {}
        self.items: dict[str, dict[str, Any]] = {}
        self.running: dict[str, Any] | None = None
        self.end = time.monotonic()

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.save()

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    @property
    def data(self) -> dict[str, Any]:
        return self.items[self.running["name"]]["data"]

    def save(self) -> None:
        write_json(self.record, {"items": self.items, "running": self.running})

    def left(self) -> float:
        """Return the seconds that are left to the running item."""
        return self.end - time.monotonic()


def run_items(run: Run, todo: Sequence[Item], seconds: float, clocks: Clocks) -> None:
    """Run the items for so many seconds in all. Exit with LOST where an item lost the device.

    Each gets its share, and what is left over beyond the shares of those that follow. Where time is short, the last
    ones are not started.
    """
    end = time.monotonic() + seconds
    table = results.table_digest()
    for number, item in enumerate(todo):
        left = end - time.monotonic()
        later = sum(other.seconds for other in todo[number + 1 :])
        limit = max(min(item.seconds, left), left - later)
        if limit < SHORTEST:
            run.items[item.name] = {"status": "not started", "seconds": 0.0, "data": {}}
            run.save()
            continue
        _one(run, item, limit, table, clocks)


def _one(run: Run, item: Item, limit: float, table: str, clocks: Clocks) -> None:
    begun, start = time.time(), time.monotonic()
    found: dict[str, Any] = {
        "status": "running",
        "seconds": 0.0,
        "limit_s": round(limit, 1),
        "table": table,
        "data": {},
    }
    run.items[item.name], run.end = found, start + limit
    run.running = {"name": item.name, "begun": begun, "limit_s": limit}
    run.save()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    lost = False
    try:
        found["status"] = _bounded(item.find, run, limit)
    except Exception as error:
        traceback.print_exc()
        found["status"], found["log"] = "failed", f"{type(error).__name__}: {error}"[:2000]
        error.__traceback__ = None  # it holds the tensors of the item
    lost = _device_is_lost()
    found["seconds"] = round(time.monotonic() - start, 2)
    found |= _peaks(lost)
    found["clocks"] = clocks.since(start)
    print(f"{item.name}: {found['status']}, {found['seconds']} s", flush=True)
    if lost:  # run.running stays: whoever started this process goes on behind the item
        found["status"] = "ended the process"
        run.save()
        sys.exit(LOST)
    run.running = None
    run.save()


def _bounded(find: Callable[[Run], None], run: Run, limit: float) -> str:
    """Return "ok", or "overrun" where the item was interrupted at its limit."""
    armed = True

    def interrupt(signum: int, frame: object) -> None:
        if armed:
            raise Overrun

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit, 1.0)  # again each second: one may be lost in a callback
    try:
        find(run)
        return "ok"
    except Overrun:
        return "overrun"
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _device_is_lost() -> bool:
    """Free what the item left, and return whether the device still answers: after an illegal access it does not."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device is lost: {error}", flush=True)
        return True
    return False


def _peaks(lost: bool) -> dict[str, int | None]:
    """Return the largest bytes so far of this process and of its children, and of torch's allocator in the item."""
    own, children = (
        resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() and not lost else None
    return {"host_peak_bytes": own, "children_peak_bytes": children, "device_peak_bytes": on_device}


def main(arguments: Sequence[str] | None = None) -> None:
    from bench.gpu import stages

    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=list(stages.ITEMS))
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--done", action="append", default=[], help="items to leave out")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    run = Run(options.record, options.out, options.work, options.dry_run)
    todo = [item for item in stages.ITEMS[options.stage](options.dry_run) if item.name not in options.done]
    with Clocks(options.dry_run) as clocks:
        run_items(run, todo, options.seconds - (time.monotonic() - begin), clocks)


if __name__ == "__main__":
    main()
