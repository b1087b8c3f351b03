"""Which bits of the native tube_masked_loss depend on the number of threads: those of torch's products alone."""

from __future__ import annotations

import pytest
import torch

from lumos_kernels import library, tube_masked_loss
from lumos_kernels.packed_matmul import pack_bf16
from lumos_kernels.testing import assert_bitwise_equal

pytestmark = [
    pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal())),
    pytest.mark.usefixtures("one_thread"),
]

FIRST, LAST = 5, 1405  # two blocks of classes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=library.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("LUMOS_CPU_ISA", request.param)
    return request.param


def run(problem, reduction):
    """nll, lse, correct, and the gradients of weight and hidden."""
    hidden, weight = (x.detach().requires_grad_() for x in problem[:2])
    options = {"classes": (FIRST, LAST), "reduction": reduction, "return_stats": True, "impl": "native"}
    loss, stats = tube_masked_loss(hidden, weight, problem[2], **options)
    dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    return [stats.nll.detach(), stats.lse.detach(), stats.correct.float(), dweight, dhidden]


def problem(dtype):
    return torch.randn(150, 130).to(dtype), torch.randn(LAST + 3, 130).to(dtype), torch.randint(FIRST, LAST, (150,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_runs_with_as_many_threads_give_the_same_bits(isa, dtype, reduction):
    case = problem(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        expected = run(case, reduction)
        for a, b in zip(run(case, reduction), expected, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_threads_change_no_bit_of_what_bf16_products_of_our_own_make(isa, reduction):
    """Everything but the gradient of hidden, on CPUs with AVX512-BF16."""
    if pack_bf16(torch.zeros(1, 2).bfloat16(), library.isa_value(isa)) is None:
        assert isa in ("avx512", "avx2", "base")  # these go through torch's products: nothing is promised
        return
    case = problem(torch.bfloat16)
    expected = run(case, reduction)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        for a, b in zip(run(case, reduction)[:-1], expected[:-1], strict=True):
            assert_bitwise_equal(a, b)
