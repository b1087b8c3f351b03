"""The compiled ops refuse tensors that do not fit, whoever calls them, and touch no memory outside."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lumos_kernels import library

SCRIPT = Path(__file__).with_name("compiled_calls.py")


@pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
def test_tensors_that_do_not_fit_are_refused():
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"{last} ended with {done.returncode}\n{done.stderr[-3000:]}"
    counts = ast.literal_eval(last)
    assert counts["refused"] > 3 * counts["computed"] > 0  # strides and sizes of some arguments are free
