"""Large results of the compiled ops ask the system for huge pages, in their own memory alone."""

import mmap
from pathlib import Path

import pytest
import torch

from lumos_kernels import library, mm_rope, tube_masked_loss

MIB = 2**20
SUPPORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal())),
    pytest.mark.skipif(not SUPPORT.exists(), reason="this system knows no huge pages"),
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


def last_full_page(tensor: torch.Tensor) -> int:
    return (tensor.data_ptr() + tensor.nbytes) // (2 * MIB) * (2 * MIB) - 1


def mapped() -> torch.Tensor:
    """Bytes of a fresh mapping, from the start of a huge page on."""
    memory = torch.frombuffer(mmap.mmap(-1, 66 * MIB), dtype=torch.uint8)
    return memory[-memory.data_ptr() % (2 * MIB) :][: 64 * MIB]


def test_large_results_are_advised():
    q, k, positions = torch.ones(4096, 40, 128), torch.ones(4096, 1, 128), torch.zeros(3, 4096, dtype=torch.int32)
    q_out, _ = mm_rope(q, k, positions, impl="native")
    assert q_out.nbytes >= 32 * MIB
    assert advised(q_out.data_ptr() + 2 * MIB)
    assert advised(last_full_page(q_out))


def test_gradients_of_the_loss_are_advised():
    weight = torch.zeros(2**18, 64, dtype=torch.bfloat16, requires_grad=True)
    hidden, labels = torch.ones(3, 64, dtype=torch.bfloat16), torch.tensor([1, 2, 3])
    tube_masked_loss(hidden, weight, labels, classes=(0, 2**18), impl="native").backward()
    assert weight.grad.nbytes >= 32 * MIB
    assert advised(last_full_page(weight.grad))


def test_memory_around_a_result_is_not():
    part = mapped()[MIB:][: 8 * MIB]  # from the middle of one huge page to the middle of another
    torch.ops.lumos_native.advise_huge_pages(part)
    assert advised(part.data_ptr() + MIB)
    assert advised(last_full_page(part))
    assert not advised(part.data_ptr())
    assert not advised(part.data_ptr() + part.nbytes - 1)


@pytest.mark.parametrize("size", [0, 1, 4 * MIB - 1])
def test_small_tensors_are_left_alone(size):
    memory = mapped()
    torch.ops.lumos_native.advise_huge_pages(memory[:size])
    assert not any(advised(memory.data_ptr() + offset) for offset in range(0, memory.nbytes, 2 * MIB))
