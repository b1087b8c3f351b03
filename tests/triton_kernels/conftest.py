"""Tests of the Triton kernels: in Triton's interpreter where there is no GPU, on the GPU where there is one.

The interpreter has to be chosen by TRITON_INTERPRET=1 before Triton is imported, changes what dispatch takes for CPU
tensors, and cannot compile. So it gets a process of its own: without the variable this folder is ignored on a machine
without a GPU, and tests/test_triton_kernels.py runs each of its files with it. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/triton_kernels
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import interpreter_bf16

    interpreter_bf16.install()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@contextlib.contextmanager
def _guarded_allocations(guard: int = 4096) -> Iterator[None]:
    allocate = torch.empty
    blocks = []

    def empty(shape, *, dtype, device):
        size = torch.Size(shape).numel()
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        block = allocate(size + 2 * guard, dtype=dtype, device=device).fill_(poison)
        blocks.append(block)
        return block[guard : guard + size].view(shape)

    def unwritten(values: torch.Tensor) -> torch.Tensor:
        return values.isnan() if values.is_floating_point() else values == torch.iinfo(values.dtype).max

    with mock.patch.object(torch, "empty", empty):
        yield
    assert blocks, "the implementation allocated nothing by torch.empty"
    for block in blocks:
        inside = unwritten(block[guard : block.numel() - guard])
        assert not inside.any(), f"{int(inside.sum())} of {inside.numel()} elements were not written"
        assert unwritten(block[:guard]).all(), "elements before a tensor were written"
        assert unwritten(block[block.numel() - guard :]).all(), "elements behind a tensor were written"


@pytest.fixture
def guarded_allocations():
    """A context in which torch.empty returns NaN (the largest integer) between guards of the same. On leaving, every
    element of every such tensor must have been written, and no guard. An implementation under test allocates what its
    kernels write by torch.empty alone.
    """
    return _guarded_allocations
