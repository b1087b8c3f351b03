"""The compiled CPU library. It is loaded at first use and never at import; its absence is a reason, not an error."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

OPS_FILE = Path(__file__).with_name("_ops.so")
BUILD_NOTE = Path(__file__).with_name("build_note.txt")  # written by setup.py where it builds the Python part alone


@functools.cache
def refusal() -> str | None:
    """Load the library once. Return None when its ops are ready, else one line that says why they are not."""
    if not OPS_FILE.exists():
        why = BUILD_NOTE.read_text(encoding="utf-8").strip() if BUILD_NOTE.exists() else "it was not built"
        return f"the compiled library is not installed: {why}"
    try:
        from . import _host  # noqa: F401
    except ImportError as error:
        return f"the compiled host module does not load: {error}"
    try:
        torch.ops.load_library(str(OPS_FILE))
    except OSError as error:
        return f"the compiled library does not load: {str(error).splitlines()[0]}"
    return None


@functools.cache
def isas() -> tuple[str, ...]:
    """Return the instruction sets that the library has code for and this CPU runs, best first: ("avx512", "avx2", ...).

    "amx" may still be refused by the op that has code for it (frame_attention/native.py).
    """
    if refusal() is not None:
        return ()
    from . import _host

    return tuple(_host.supported_isas())


def models() -> tuple[str, ...]:
    """Return the instruction sets that run in software, e.g. ("amx_model",).

    They are slow, are there for tests, and run only where LUMOS_CPU_ISA asks for them.
    """
    if refusal() is not None:
        return ()
    from . import _host

    return tuple(_host.supported_models())


def isa_is_forced() -> bool:
    """Return whether LUMOS_CPU_ISA chooses the instruction set."""
    return bool(os.environ.get("LUMOS_CPU_ISA"))


def isa() -> str:
    """Return the instruction set that the CPU kernels use: LUMOS_CPU_ISA if set, else the best one."""
    wanted, able = os.environ.get("LUMOS_CPU_ISA"), isas()
    if wanted and wanted not in (*able, *models()):
        raise ValueError(f"LUMOS_CPU_ISA={wanted} is not one of {', '.join(able)}, which this CPU and build support")
    return wanted or able[0]


def isa_value(name: str | None = None) -> int:
    """Return the number by which the compiled ops know an instruction set, by default the one of isa()."""
    return _isa_values()[name or isa()]


@functools.cache
def _isa_values() -> dict[str, int]:
    from . import _host

    return _host.ISA_VALUES
