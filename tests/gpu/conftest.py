"""Tests of the GPU implementations at the model's real sizes. Every implementation in dispatch joins by itself.

Without a CUDA device they are deselected like every test marked gpu. LUMOS_GPU_TESTS, a JSON object, changes a run:

    device     "cpu": the same tests at small sizes on the CPU implementations, to prove the tests (the dry run)
    ops        list of op names: only those
    impls      list of implementations instead of the device's own: ["triton"] with device "cpu" and TRITON_INTERPRET=1
               rehearses Triton's in its interpreter
    outcomes   file to which a JSON line is appended when a test starts and when it ends: what is known of a run that
               a broken kernel takes down
    done       file with the node ids that are not run again
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_settings import device, implementations, settings

from lumos_kernels import dispatch

HERE = Path(__file__).parent
if os.environ.get("TRITON_INTERPRET") == "1":  # bf16 is wrong in the stock interpreter
    sys.path.append(str(HERE.parent / "triton_kernels"))
    import interpreter_bf16

    interpreter_bf16.install()
# What an error says when the CUDA context is gone: every later test in the process would fail for nothing.
GONE = pytest.StashKey[bool]()
LOST = re.compile(r"illegal memory access|device-side assert|unspecified launch failure|misaligned address")


def pytest_generate_tests(metafunc):
    if {"op", "impl"} <= set(metafunc.fixturenames):
        only = metafunc.definition.get_closest_marker("ops")
        pairs = [pair for pair in implementations() if only is None or pair[0] in only.args]
        metafunc.parametrize(("op", "impl"), pairs, ids=[f"{op}-{impl}" for op, impl in pairs])


@pytest.hookimpl(tryfirst=True)  # before the markers deselect
def pytest_collection_modifyitems(config, items):
    done = set(Path(settings()["done"]).read_text().split("\n")) if "done" in settings() else set()
    for item in items:
        if HERE in item.path.parents and device() != "cpu":
            item.add_marker(pytest.mark.gpu)
    items[:] = [item for item in items if item.nodeid not in done]


def _note(**line: Any) -> None:
    if "outcomes" in settings():
        with open(settings()["outcomes"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    if HERE not in item.path.parents:
        yield
        return
    _note(test=item.nodeid, outcome="started", pair=_pair(item))
    start = time.perf_counter()
    yield
    _note(test=item.nodeid, seconds=round(time.perf_counter() - start, 3))
    if item.stash.get(GONE, False):
        item.session.shouldstop = "the device is lost"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    item.stash[GONE] = (report.failed and bool(LOST.search(str(report.longrepr)))) or item.stash.get(GONE, False)
    report.lost = item.stash[GONE]


def pytest_runtest_logreport(report):
    if "tests/gpu" in report.nodeid and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        _note(test=report.nodeid, outcome=report.outcome, reason=reason[-1500:], lost=report.lost)


def _pair(item) -> list[str] | None:
    """[op, implementation] of a test; None where there is none to test."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return [params["op"], params["impl"]] if isinstance(params.get("impl"), str) else None


@pytest.fixture(autouse=True)
def _able(request):
    """Skips, with dispatch's reason, what cannot run here; frees the device's memory afterwards."""
    if "impl" in request.fixturenames and _pair(request.node):
        op, impl = request.getfixturevalue("op"), request.getfixturevalue("impl")
        reason = dispatch.ops()[op].refusal(
            impl, dispatch.Problem.of(torch.empty(0, dtype=torch.bfloat16, device=device()), 64)
        )
        if reason:
            pytest.skip(f"{op}: {impl} {reason}")
    yield
    if device() == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(name="device")
def _device() -> str:
    return device()
