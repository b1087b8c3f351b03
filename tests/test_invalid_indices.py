"""No index that a caller can pass makes an op read or write outside of its tensors: a thousand random invalid calls.

They run in a process of their own, since a fault ends a process. LUMOS_INVALID_CALLS sets how many there are, e.g.
10000. tools/asan.sh tests/test_invalid_indices.py runs them under the sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("invalid_calls.py")
COUNT = os.environ.get("LUMOS_INVALID_CALLS", "1000")
KINDS = ("attention_by_hand", "attention_from_kv", "layout", "loss", "rope", "sample")


def test_invalid_indices_are_refused_or_give_something_defined(tmp_path):
    log = tmp_path / "call"
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--calls", COUNT, "--only", *KINDS, "--log", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{log.read_text().strip()} ended with {done.returncode}\n{done.stderr[-3000:]}"
    assert done.stdout.startswith(f"{COUNT} calls")
