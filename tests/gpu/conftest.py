"""Tests of the GPU implementations at the model's real sizes. Every implementation in dispatch joins by itself.

Without a CUDA device they are deselected like every test marked gpu. LUMOS_GPU_TESTS, a JSON object, changes a run:

    device     "cpu": the same tests at small sizes on the CPU implementations, to prove the tests (the dry run)
    ops        list of op names: only those
    impls      list of implementations instead of the device's own: ["triton"] with device "cpu" and TRITON_INTERPRET=1
               rehearses Triton's in its interpreter

bench/gpu/notes.py, a plugin, keeps the outcomes of a run on file and has settings of its own in the same variable.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from gpu_settings import device, implementations

from lumos_kernels import dispatch

HERE = Path(__file__).parent
if os.environ.get("TRITON_INTERPRET") == "1":  # bf16 is wrong in the stock interpreter
    sys.path.append(str(HERE.parent / "triton_kernels"))
    import interpreter_bf16

    interpreter_bf16.install()


def pytest_generate_tests(metafunc):
    if {"op", "impl"} <= set(metafunc.fixturenames):
        only = metafunc.definition.get_closest_marker("ops")
        pairs = [pair for pair in implementations() if only is None or pair[0] in only.args]
        metafunc.parametrize(("op", "impl"), pairs, ids=[f"{op}-{impl}" for op, impl in pairs])


@pytest.hookimpl(tryfirst=True)  # before the markers deselect
def pytest_collection_modifyitems(config, items):
    for item in items:
        if HERE in item.path.parents and device() != "cpu":
            item.add_marker(pytest.mark.gpu)


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
