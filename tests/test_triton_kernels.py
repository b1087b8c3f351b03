"""Runs each file of tests/triton_kernels in a process with Triton's interpreter (triton_kernels/conftest.py says why).

On a machine with a GPU those files run there natively, collected like any other, and the interpreter does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

FILES = sorted((Path(__file__).parent / "triton_kernels").glob("test_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the files run on it")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file, request):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    if request.config.getoption("--all"):
        command.append("--all")
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
