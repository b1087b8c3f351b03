"""Every configuration of every Triton kernel compiles for sm_80, sm_90 and sm_100 within its budget of registers,
spills and shared memory, and with the memory accesses it was designed for. compile_triton.py does the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_triton.py"
ARCHS = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict]]:
    """Every kernel's resources by architecture; the architectures are compiled side by side."""
    processes = {
        arch: subprocess.Popen(
            [sys.executable, str(SCRIPT), "--json", "--arch", str(arch)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        )
        for arch in ARCHS
    }
    results = {}
    for arch, process in processes.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        results[arch] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_keep_their_budgets(arch, compiled):
    assert compiled[arch]
    outside = [
        f"{found['case']}, {found['kernel']}: {failure}" for found in compiled[arch] for failure in found["failures"]
    ]
    assert not outside, "\n".join(outside)


def test_a_kernel_compiled_once_serves_every_length():
    done = subprocess.run([sys.executable, str(SCRIPT), "--variants", "--arch", "90"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [found.pop("op") for found in kernels] == [
        "frame_attention", "frame_attention fused", "frame_attention with a gradient of lse", "mm_rope",
    ]  # fmt: skip
    for found in kernels:
        assert len(found) >= 3
        assert set(found.values()) == {1}, found
