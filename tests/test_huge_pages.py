"""Large results of the compiled ops ask the system for huge pages, in their own memory alone."""

import os
from pathlib import Path

import pytest
import torch

from lumos_kernels import library, mm_rope

HUGE_PAGE = 2 * 2**20
SUPPORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal())),
    pytest.mark.skipif(not SUPPORT.exists(), reason="this system knows no huge pages"),
    pytest.mark.skipif(os.environ.get("THP_MEM_ALLOC_ENABLE") == "1", reason="torch asks for them itself"),
]


def advised(address: int) -> bool:
    """Whether the mapping around an address has the flag of MADV_HUGEPAGE."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(bound, 16) for bound in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return "hg" in rest
    raise AssertionError(f"no mapping holds {address:x}")


def test_huge_pages_are_asked_for_where_they_lie_in_the_result():
    # 80 MiB, which glibc maps apart, so that nothing else has asked for huge pages around it.
    q, k, positions = torch.ones(4096, 40, 128), torch.ones(4096, 1, 128), torch.zeros(3, 4096, dtype=torch.int32)
    out, _ = mm_rope(q, k, positions, impl="native")
    begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
    first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    assert all(advised(page) for page in range(first, last, HUGE_PAGE))
    assert not advised(begin)
    assert not advised(end - 1)
