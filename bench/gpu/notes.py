"""A plugin of pytest (-p bench.gpu.notes) that puts every test's outcome on file when it is known, in any process.

LUMOS_GPU_TESTS, a JSON object, says how:

    outcomes   file to which a line of JSON is appended when a test starts and when it ends: what is known of a run
               that a broken kernel takes down
    done       file with the node ids that are not run again
    patience   seconds that a test may take: a kernel that hangs ends its process and not the run

A test that loses the device ends its process too, because every later test in it would fail for nothing. pytest-xdist
starts another process for those that remain; without xdist the session stops, and whoever started it goes on behind.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

LOST = re.compile(r"illegal memory access|device-side assert|unspecified launch failure|misaligned address")
LAST = ("last_exc", "last_type", "last_value", "last_traceback")  # of sys
EXIT = 9  # status of a process that ends itself
GONE = pytest.StashKey[bool]()


def settings() -> dict[str, Any]:
    return json.loads(os.environ.get("LUMOS_GPU_TESTS", "{}"))


def note(**line: Any) -> None:
    """Append a line in one write: the lines of several processes never mix, and one that was cut off harms no other."""
    if "outcomes" in settings():
        file = os.open(settings()["outcomes"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, ("\n" + json.dumps(line) + "\n").encode())
        os.close(file)


def pair(item: pytest.Item) -> list[str] | None:
    """Return [op, implementation] of a test, None where there is none to test."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if isinstance(params.get("impl"), str):
        return [params["op"], params["impl"]]
    op, kernels, _ = item.path.stem.removeprefix("test_").partition("_triton")
    return [op, "triton"] if kernels else None


@pytest.hookimpl(tryfirst=True)  # before the markers deselect
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    done = set(Path(settings()["done"]).read_text().split("\n")) if "done" in settings() else set()
    items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    note(test=item.nodeid, outcome="started", pair=pair(item))
    start = time.perf_counter()
    watch = threading.Timer(settings().get("patience", 1e6), os._exit, [EXIT])
    watch.daemon = True
    watch.start()
    yield
    watch.cancel()
    note(test=item.nodeid, seconds=round(time.perf_counter() - start, 3))
    for name in LAST:  # they hold the tensors of a test that failed
        sys.__dict__.pop(name, None)
    if item.stash.get(GONE, False):
        if hasattr(item.config, "workerinput"):  # a process of xdist's
            os._exit(EXIT)
        item.session.shouldstop = "the device is lost"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    outcome = yield
    report = outcome.get_result()
    item.stash[GONE] = (report.failed and bool(LOST.search(str(report.longrepr)))) or item.stash.get(GONE, False)
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        note(test=item.nodeid, outcome=report.outcome, reason=reason[-1500:], lost=item.stash[GONE])
