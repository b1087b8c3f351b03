"""Every configuration of every Triton kernel compiles for sm_80, sm_90 and sm_100 within its budget of registers,
spills and shared memory, with the memory accesses it was designed for and without serialised matrix instructions.
compile_triton.py does the work.

Triton's versions differ in what they spill. So frame_attention is also compiled for sm_90 by the Triton that CUDA
builds of torch 2.11 bring, where `make setup` has put it into OLDER.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_triton.py"
ARCHS = (80, 90, 100)
OLDER_VERSION = "3.6.0"
OLDER = Path(__file__).parents[1] / "build" / f"triton-{OLDER_VERSION}"


def start(*arguments: str, older: bool = False) -> subprocess.Popen:
    """compile_triton.py with the installed Triton, or with the older one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if older:
        env["PYTHONPATH"] = os.pathsep.join([str(OLDER), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def results_of(process: subprocess.Popen) -> list[dict]:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> dict[int | str, list[dict]]:
    """Every kernel's resources by architecture, or by "older"; all are compiled side by side."""
    processes = {arch: start("--json", "--arch", str(arch)) for arch in ARCHS}
    if (OLDER / "triton").is_dir():
        processes["older"] = start("--json", "--arch", "90", "--only", "frame_attention", older=True)
    return {key: results_of(process) for key, process in processes.items()}


def assert_within_budgets(compiled: list[dict], version: str) -> None:
    assert {found["triton"] for found in compiled} == {version}
    outside = [f"{found['case']}, {found['kernel']}: {failure}" for found in compiled for failure in found["failures"]]
    assert not outside, "\n".join(outside)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_keep_their_budgets(arch, compiled):
    assert_within_budgets(compiled[arch], triton.__version__)


def need_older_triton() -> None:
    """Skip where the older Triton is missing, and fail under CI."""
    if not (OLDER / "triton").is_dir():
        missing = f"{OLDER} is missing: `make setup` installs triton {OLDER_VERSION} there"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


def test_attention_keeps_its_budgets_on_the_older_triton(compiled):
    need_older_triton()
    assert len(compiled["older"]) > 15
    assert_within_budgets(compiled["older"], OLDER_VERSION)


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_what_the_tuner_tries_first_keeps_the_budgets(older):
    if older:
        need_older_triton()
    compiled = results_of(start("--json", "--arch", "90", "--vetted", older=older))
    assert_within_budgets(compiled, OLDER_VERSION if older else triton.__version__)


def test_budgets_find_serialised_wgmma_and_an_unset_fusion():
    (found,) = results_of(start("--json", "--arch", "90", "--wrong"))
    for failure in ("ptxas says C7511", "1.00 WARPGROUP.DEPBAR per HGMMA", "launched without enable_fp_fusion"):
        assert any(failure in text for text in found["failures"]), found["failures"]
    assert len(found["failures"]) == 3


def test_a_kernel_compiled_once_serves_every_length():
    kernels = results_of(start("--variants", "--arch", "90"))
    assert [found.pop("op") for found in kernels] == [
        "frame_attention", "frame_attention fused", "frame_attention with a gradient of lse", "mm_rope",
    ]  # fmt: skip
    for found in kernels:
        assert len(found) >= 3
        assert set(found.values()) == {1}, found
