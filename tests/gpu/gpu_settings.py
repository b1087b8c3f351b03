"""What a run of the GPU tests is told by LUMOS_GPU_TESTS (conftest.py lists the keys)."""

from __future__ import annotations

import json
import os
from typing import Any

from lumos_kernels import dispatch

CPU_IMPLEMENTATIONS = ("native", "reference")
WITHOUT_GPU_CODE = ("frame_layout",)  # CPU only: nothing to rehearse here


def settings() -> dict[str, Any]:
    return json.loads(os.environ.get("LUMOS_GPU_TESTS", "{}"))


def device() -> str:
    return settings().get("device", "cuda")


def implementations() -> list[tuple[str, str]]:
    """(op, implementation) under test: on a GPU all but the CPU's, in the dry run those, or the ones asked for."""
    wanted = settings().get("ops", list(dispatch.ops()))
    return [
        (name, impl)
        for name, op in dispatch.ops().items()
        for impl in op.implementations
        if name in wanted and _is_wanted(impl) and not (device() == "cpu" and name in WITHOUT_GPU_CODE)
    ]


def _is_wanted(impl: str) -> bool:
    if "impls" in settings():
        return impl in settings()["impls"]
    return (impl in CPU_IMPLEMENTATIONS) == (device() == "cpu")
