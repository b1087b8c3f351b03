"""tube_masked_loss's Triton kernels under wrong target rows, which a GPU cannot refuse without a host sync.

conftest.py says where they run. A row whose target is no class gives zeros, and nothing is read or written at the index
of such a target.
"""

from __future__ import annotations

import os

import pytest
import torch

from lumos_kernels import tube_masked_loss
from lumos_kernels.launch import RowConfig
from lumos_kernels.testing import assert_bitwise_equal
from lumos_kernels.tube_masked_loss import target_rows
from lumos_kernels.tube_masked_loss import triton as kernels
from lumos_kernels.tube_masked_loss.contract import Inputs, RowLoss, StatisticGradients, Wanted

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]

CLASSES, TOKENS, WIDTH = 150, 20, 24
BAD_TARGETS = (-1, 160, -100, 2**31, 2**32, 2**32 + 7, -(2**32) + 5, 2**62, -(2**63))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several blocks in a row, and several chunks of rows."""
    for table in ("LOSS", "GRADIENT"):
        monkeypatch.setattr(kernels, table, dict.fromkeys((2, 4), RowConfig(block=64, num_warps=1)))
    monkeypatch.setattr(kernels, "ROW_MULTIPLE", 4)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 8 * (CLASSES + WIDTH) * 4)


def bad_rows() -> torch.Tensor:
    return (torch.arange(TOKENS) % 2 == 1) & (torch.arange(TOKENS) < 2 * len(BAD_TARGETS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [CLASSES, CLASSES + 10], ids=lambda n: f"K{n}")
def test_rows_whose_target_is_no_class_are_zeros(dtype, classes, device, guarded_allocations):
    """Direct calls, in guarded memory: a target that was used as an index would read or write a guard."""
    hidden, weight = (torch.randn(n, WIDTH).to(device, dtype) for n in (TOKENS, classes))
    bad, targets = bad_rows(), torch.arange(TOKENS) * 7
    hidden[bad] *= 100  # exponentials of these logits overflow without their maximum
    targets[bad] = torch.tensor(BAD_TARGETS)
    rows, targets, factor = torch.arange(TOKENS).to(device), targets.to(device), torch.rand(TOKENS).to(device)
    grads = StatisticGradients(*torch.rand(2, TOKENS).to(device))

    def results(targets):
        inputs = Inputs(hidden, weight, targets, rows)
        with guarded_allocations():
            sums = [torch.empty(weight.shape, dtype=torch.float32, device=device) for _ in range(2)]
            outputs = kernels.forward(inputs, RowLoss(factor, 0.1), Wanted(True, sums[0]))
            dhidden = kernels.backward(inputs, outputs.lse, grads, Wanted(True, sums[1]))
        return *outputs, dhidden, *sums

    results_bad = results(targets)
    *per_row, first_sums, second_sums = results_bad
    *all_good, _, _ = results(torch.where(bad.to(device), 0, targets))
    for x, expected in zip(per_row, all_good, strict=True):
        assert not x[bad].any()
        assert expected[bad].any() or x.dtype == torch.bool
        assert_bitwise_equal(*(y[~bad].float() for y in (x, expected)))
    hidden[bad] = 0  # dweight has no part of a bad row, whatever its hidden states are
    for sums, expected in zip((first_sums, second_sums), results(targets)[-2:], strict=True):
        assert sums.any()
        assert_bitwise_equal(sums, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [(-1, 0, 2, 99), range(TOKENS), (0, 0, 1), (2**31 - 1, -(2**31)), ()], ids=str)
def test_wrong_rows_give_numbers(rows, reduction, device, monkeypatch):
    """Through the public function, on the way that a GPU takes."""
    monkeypatch.setattr(target_rows, "CHECKED_DEVICES", ())
    first, last = 5, 5 + CLASSES
    leaves = [torch.randn(n, WIDTH).to(device).requires_grad_() for n in (TOKENS, last + 3)]
    labels = torch.tensor([first, -100, last, first - 1]).repeat(TOKENS)[:TOKENS].to(device)
    given = torch.tensor(rows, dtype=torch.int32).to(device)
    loss, stats = tube_masked_loss(
        *leaves,
        labels,
        classes=(first, last),
        rows=given,
        reduction=reduction,
        z_loss_weight=0.1,
        return_stats=True,
        impl="triton",
    )
    dhidden, dweight = torch.autograd.grad(loss.sum(), leaves)
    idle = labels != first
    for x in (loss, stats.nll, stats.lse, dhidden, dweight):
        assert x.isfinite().all()
    for x in (*stats, dhidden):
        assert not x[idle].any()
    if len(rows) == TOKENS:
        assert stats.lse[~idle].all()
