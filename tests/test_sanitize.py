"""tools/sanitize.py reads compute-sanitizer's output: what it prints for a clean run, errors, races and no device."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CLEAN = """========= COMPUTE-SANITIZER
lumos: all calls returned
========= ERROR SUMMARY: 0 errors
"""

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at unaligned_kernel()+0x160 in memcheck_demo.cu:32
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f6510c00001 is misaligned
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x2774ec] in libcuda.so.1
=========     and is inside the nearest allocation at 0x7f6510c00000 of size 4 bytes
=========
========= Program hit cudaErrorMisalignedAddress (error 716) due to "misaligned address" on CUDA API call.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: cudaDeviceSynchronize [0x4a7cd] in memcheck_demo
=========
Traceback (most recent call last):
  File "x.py", line 1, in <module>
RuntimeError: CUDA error: misaligned address
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""

RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sumKernel(int *, int *)+0x100 in block_error.cu:15
=========     and Read access at sumKernel(int *, int *)+0x4f0 in block_error.cu:19 [508 hazards]
=========
lumos: all calls returned
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""

RACE_WARNINGS = """========= COMPUTE-SANITIZER
========= Warning: Race reported between Read access at kernel()+0x50 in a.cu:9
=========     and Write access at kernel()+0x90 in a.cu:12 [16 hazards]
=========
lumos: all calls returned
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""

BARRIER = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp
=========     at myKernel()+0x60 in divergence.cu:9
=========     by thread (32,0,0) in block (0,0,0)
=========
lumos: all calls returned
========= ERROR SUMMARY: 16 errors
"""

NO_DEVICE = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the documentation
=========
========= ERROR SUMMARY: 1 error
"""

CRASHED = """========= COMPUTE-SANITIZER
Traceback (most recent call last):
ModuleNotFoundError: No module named 'triton'
========= Target application returned an error
========= ERROR SUMMARY: 0 errors
"""


@pytest.fixture(scope="module")
def sanitize():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("sanitize_tool", ROOT / "tools" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.mark.parametrize(
    ("output", "status", "errors"),
    [
        (CLEAN, "clean", 0),
        (CLEAN.replace("0 errors", "1 error"), "errors", 1),
        (MEMCHECK, "errors", 2),
        (RACES, "errors", 1),
        (RACE_WARNINGS, "clean", 0),
        (BARRIER, "errors", 16),
        (NO_DEVICE, "unavailable", 1),
        (CRASHED, "failed", 0),
        (CLEAN.replace("lumos: all calls returned\n", ""), "failed", 0),
        ("lumos: all calls returned\n", "failed", 0),  # the sanitizer never spoke
        ("", "failed", 0),
    ],
)
def test_status_and_number_of_errors(sanitize, output, status, errors):
    found = sanitize.parse(output)
    assert (found["status"], found["errors"]) == (status, errors)


def test_findings_keep_the_place(sanitize):
    first, second = sanitize.parse(MEMCHECK)["findings"]
    assert first[:3] == [
        "Invalid __global__ write of size 4 bytes",
        "at unaligned_kernel()+0x160 in memcheck_demo.cu:32",
        "by thread (0,0,0) in block (0,0,0)",
    ]
    assert second[0].startswith("Program hit cudaErrorMisalignedAddress")
    assert "[508 hazards]" in sanitize.parse(RACES)["findings"][0][1]
    assert sanitize.parse(RACE_WARNINGS)["findings"][0][0].startswith("Warning: Race")
    assert sanitize.parse(CLEAN)["findings"] == []


def test_without_the_tool_every_run_is_unavailable(sanitize, tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitize, "own_implementations", lambda: [("mm_rope", "triton"), ("masked_sample", "triton")])
    assert sanitize.main(["--out", str(tmp_path / "out.json")]) == 0
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [(run["op"], run["tool"]) for run in runs[:3]] == [
        ("mm_rope", "memcheck"),
        ("masked_sample", "memcheck"),
        ("mm_rope", "racecheck"),
    ]
    assert {run["status"] for run in runs} == {"unavailable"}


def test_errors_set_the_exit_status(sanitize, tmp_path, monkeypatch):
    """A stand-in for the sanitizer that prints what it prints."""
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(sanitize, "own_implementations", lambda: [("mm_rope", "triton")])
    printed = {"memcheck": MEMCHECK, "racecheck": RACES, "synccheck": CLEAN}

    def stand_in(op, impl, tool, dry_run):
        return [sys.executable, "-c", f"print({printed[tool]!r})"]

    monkeypatch.setattr(sanitize, "command", stand_in)
    assert sanitize.main(["--out", str(tmp_path / "out.json")]) == 1
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["errors", "errors", "clean"]
    printed["memcheck"] = CLEAN
    assert sanitize.main(["--out", str(tmp_path / "out.json")]) == 0, "a race alone advises"
    monkeypatch.setattr(sanitize, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    assert sanitize.main(["--out", str(tmp_path / "out.json"), "--tools", "memcheck", "--seconds", "2.2"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0]["status"] == "timeout"


def test_the_program_calls_forward_and_backward(sanitize, capsys):
    sanitize.program("mm_rope", "reference", "cpu")
    assert capsys.readouterr().out.strip() == sanitize.DONE
