"""tube_masked_loss where no label lies in the class slice: a loss of 0 if that can be meant, an error if it cannot."""

from __future__ import annotations

import re

import pytest
import torch

from lumos_kernels import dispatch, tube_masked_loss
from lumos_kernels.dispatch import Problem
from lumos_kernels.token_ids import NEW_LINE

OP = dispatch.ops()["tube_masked_loss"]
IMPLS = [n for n in OP.implementations if n != "triton" and OP.refusal(n, Problem("cpu", torch.float32)) is None]
CLASSES = (9000, 9050)


def call(labels, **options):
    hidden = torch.randn(len(labels), 8, requires_grad=True)
    loss = tube_masked_loss(
        hidden, torch.randn(9060, 8), torch.tensor(labels, dtype=torch.int64), classes=CLASSES, **options
    )
    return loss, hidden


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("labels", "count", "smallest", "largest"),
    [
        ([0, 49, 7, -100], 3, 0, 49),  # counted from the first class
        ([CLASSES[1], -100], 1, 9050, 9050),
        ([NEW_LINE, CLASSES[0] - 1, NEW_LINE], 1, 8999, 8999),
        ([-1, -100], 1, -1, -1),  # padding of another kind
    ],
)
def test_labels_without_a_target_are_named(labels, count, smallest, largest, reduction, impl):
    message = f"^labels must be ids of the whole vocabulary, .*{re.escape(str(CLASSES))}.*"
    with pytest.raises(ValueError, match=message + f"{count} other labels from {smallest} to {largest}"):
        call(labels, reduction=reduction, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", [[-100] * 4, [NEW_LINE] * 4, [-100, NEW_LINE], []])
def test_ignored_labels_and_new_lines_alone_give_0(labels, reduction, impl):
    loss, hidden = call(labels, reduction=reduction, impl=impl)
    loss.sum().backward()
    assert not loss.any()
    assert not hidden.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_beside_a_target_any_label_is_ignored(impl):
    loss, _ = call([0, 49, -1, CLASSES[0] + 3], impl=impl)
    assert loss > 0


def test_empty_rows_say_that_there_is_no_target():
    loss, _ = call([0, 49, 7], rows=torch.empty(0, dtype=torch.int32))
    assert loss == 0
    with pytest.raises(ValueError, match=r"^rows must be exactly the 1 target rows .* 1 are missing"):
        call([0, CLASSES[0]], rows=torch.empty(0, dtype=torch.int32))


def test_the_statistics_count_the_rows_in_the_loss():
    (_, stats), _ = call([CLASSES[0], 3, CLASSES[0] + 4, -100], return_stats=True)
    assert stats.lse.count_nonzero() == 2
