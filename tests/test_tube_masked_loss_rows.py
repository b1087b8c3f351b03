"""tube_masked_loss where the caller names the target rows: exactly those are taken, and wrong ones harm nothing."""

from __future__ import annotations

import pytest
import torch

from lumos_kernels import dispatch, library, tube_masked_loss
from lumos_kernels.dispatch import Problem
from lumos_kernels.testing import assert_bitwise_equal
from lumos_kernels.tube_masked_loss import target_rows
from lumos_kernels.tube_masked_loss.contract import Inputs, RowLoss, StatisticGradients, Wanted

OP = dispatch.ops()["tube_masked_loss"]
IMPLS = [n for n in OP.implementations if n != "triton" and OP.refusal(n, Problem("cpu", torch.float32)) is None]
FIRST, LAST = 5, 205
TOKENS = 24
REDUCTIONS = ("mean", "sum", "none")
GUARD = 64  # elements around a buffer that an op is given


def problem(dtype=torch.float32, width=16):
    """hidden and weight, leaves, and labels: every second row is a target, others have labels beside the classes."""
    hidden = torch.randn(TOKENS, width).to(dtype).requires_grad_()
    weight = (torch.randn(LAST + 3, width) / 4).to(dtype).requires_grad_()
    labels = torch.tensor([-100, FIRST - 1, LAST, LAST + 2]).repeat(TOKENS)[:TOKENS]
    labels[::2] = torch.randint(FIRST, LAST, (TOKENS // 2,))
    return hidden, weight, labels


WRONG = {
    "all rows": (range(TOKENS), r"12 of 24 are no targets, first rows\[1\] = 1 with label 4"),
    "rows of other labels": (range(1, TOKENS, 2), r"12 of 12 are no targets, first rows\[0\] = 1 with label 4"),
    "one missing": (range(0, TOKENS - 2, 2), "1 are missing, first row 22 with label"),
    "none": ((), "12 are missing, first row 0 with label"),
    "one twice": ((*range(0, TOKENS, 2), 4), "1 come more than once, first row 4, 2 times"),
    "one in the place of another": ((0, 0, *range(4, TOKENS, 2)), "1 come more than once, first row 0, 2 times"),
    "a negative one": ((-2, *range(2, TOKENS, 2)), r"1 of 12 lie outside 0\.\.23, first rows\[0\] = -2"),
    "one past the end": ((*range(0, TOKENS - 2, 2), TOKENS), r"1 of 12 lie outside 0\.\.23, first rows\[11\] = 24"),
    "far ones": ((2**31 - 1, *range(2, TOKENS, 2), -(2**31)), r"2 of 13 lie outside 0\.\.23"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", WRONG)
def test_rows_that_are_not_the_targets_are_refused_by_name(case, dtype, reduction, impl):
    rows, fault = WRONG[case]
    hidden, weight, labels = problem(torch.bfloat16)
    with pytest.raises(ValueError, match=rf"^rows must be exactly the 12 target rows .*{fault}"):
        tube_masked_loss(
            hidden,
            weight,
            labels,
            classes=(FIRST, LAST),
            rows=torch.tensor(rows, dtype=dtype),
            reduction=reduction,
            impl=impl,
        )


@pytest.mark.parametrize("case", WRONG)
def test_rows_are_checked_in_compiled_code(case):
    hidden, weight, labels = problem()
    compiled = torch.compile(tube_masked_loss, fullgraph=True, backend="aot_eager")
    rows = torch.tensor(WRONG[case][0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^rows must be exactly the 12 target rows"):
        compiled(hidden, weight, labels, classes=(FIRST, LAST), rows=rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", WRONG)
def test_the_ops_themselves_check_rows(case, impl):
    """Also backward, which is called alone here."""
    rows, fault = WRONG[case]
    hidden, weight, labels = (x.detach() for x in problem(torch.bfloat16))
    rows, per_row = torch.tensor(rows, dtype=torch.int32), torch.ones(3, TOKENS)
    tail = (FIRST, LAST, True, True, False, impl)
    ops = torch.ops.lumos_kernels
    with pytest.raises(ValueError, match=fault):
        ops.tube_masked_loss(hidden, weight, labels, rows, None, 0.0, *tail)
    with pytest.raises(ValueError, match=fault):
        ops.tube_masked_loss_backward(*per_row[:2], hidden, weight, labels, rows, per_row[2], *tail)


def test_no_rows_where_there_are_no_tokens():
    empty, labels = torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    loss = tube_masked_loss(empty, torch.zeros(LAST, 8), labels, classes=(FIRST, LAST), rows=labels.int())
    assert loss == 0
    with pytest.raises(ValueError, match=r"^rows .* lie outside"):
        tube_masked_loss(empty, torch.zeros(LAST, 8), labels, classes=(FIRST, LAST), rows=torch.tensor([0]))


def test_labels_that_change_after_the_rows_were_found_are_noticed():
    hidden, weight, labels = problem()
    rows = torch.arange(0, TOKENS, 2)
    loss = tube_masked_loss(hidden, weight, labels, classes=(FIRST, LAST), rows=rows, reduction="none")
    labels[4] = -100
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    with pytest.raises(ValueError, match=r"^rows .* 1 of 12 are no targets, first rows\[2\] = 4 with label -100"):
        tube_masked_loss(hidden, weight, labels, classes=(FIRST, LAST), rows=rows)


@pytest.fixture
def unchecked(monkeypatch):
    """The way of a GPU, where rows cannot be checked without a host sync, on the CPU."""
    monkeypatch.setattr(target_rows, "CHECKED_DEVICES", ())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WRONG)
def test_unchecked_rows_give_numbers(case, dtype, reduction, impl):
    """Rows without a target change nothing, unless an index outside takes the place of a target row."""
    hidden, weight, labels = problem(dtype)
    rows = torch.tensor(WRONG[case][0], dtype=torch.int32)
    options = {"classes": (FIRST, LAST), "reduction": reduction, "return_stats": True, "impl": impl}
    loss, stats = tube_masked_loss(hidden, weight, labels, rows=rows, z_loss_weight=0.1, **options)
    gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
    for x in (loss, *stats[:2], *gradients):
        assert x.isfinite().all()
    idle = ~target_rows.is_target(labels, FIRST, LAST)
    for x in (*stats, gradients[0]):
        assert not x[idle].any()
    if case == "all rows":  # the sums of dweight have more terms, zeros, and may round otherwise
        _, expected = tube_masked_loss(hidden, weight, labels, z_loss_weight=0.1, **options)
        for a, b in zip(stats, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("impl", IMPLS)
def test_unchecked_rows_that_are_right_are_the_checked_ones(impl, monkeypatch):
    hidden, weight, labels = problem()
    options = {"classes": (FIRST, LAST), "rows": torch.arange(0, TOKENS, 2).flip(0).int(), "impl": impl}
    results = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(target_rows, "CHECKED_DEVICES", devices)
        loss = tube_masked_loss(hidden, weight, labels, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*results, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.usefixtures("unchecked")
def test_unchecked_rows_without_tokens():
    none = torch.zeros(0, dtype=torch.int64)
    for rows in (none, torch.tensor([0, -1, 7])):
        found, targets = target_rows.target_rows(none, rows, FIRST, LAST)
        assert found.shape == targets.shape == (0,)


@pytest.mark.usefixtures("unchecked")
def test_unchecked_rows_outside_become_rows_without_a_target():
    labels = torch.arange(FIRST, FIRST + 4)
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([-1, 2, 4, -(2**31), 2**31 - 1, 0], dtype=dtype)
        found, targets = target_rows.target_rows(labels, rows, FIRST, LAST)
        assert found.tolist() == [0, 2, 3, 0, 3, 0]
        assert targets.tolist() == [-1, 2, -1, -1, -1, 0]


BAD_TARGETS = (-1, 200, -100, 2**31, 2**32, 2**32 + 7, 2**62, -(2**63), 2**63 - 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_implementations_skip_rows_whose_target_is_no_class(impl, dtype):
    """They give zeros exactly, whatever the hidden states of such a row make of its logits, and change no other."""
    implementation = OP.choose(impl, Problem("cpu", dtype))
    hidden, weight, _ = (x.detach() for x in problem(dtype))
    weight, rows = weight[FIRST:LAST], torch.arange(TOKENS)
    targets = torch.arange(TOKENS) * 7
    bad = torch.zeros(TOKENS, dtype=torch.bool)
    bad[1 : 1 + 2 * len(BAD_TARGETS) : 2] = True
    targets[bad] = torch.tensor(BAD_TARGETS)
    hidden[bad] *= 1000  # exponentials of these logits overflow
    factor, grad = torch.rand(TOKENS) + 0.5, torch.rand(2, TOKENS)

    def results(rows, targets):
        inputs, sums = Inputs(hidden, weight, targets, rows), [torch.full(weight.shape, torch.nan) for _ in range(2)]
        outputs = implementation.forward(inputs, RowLoss(factor[rows], 0.1), Wanted(True, sums[0]))
        grads = StatisticGradients(*grad[:, rows])
        return *outputs, implementation.backward(inputs, outputs.lse, grads, Wanted(True, sums[1])), *sums

    *every, first_sums, second_sums = results(rows, targets)
    *good, first_good, second_good = results(rows[~bad], targets[~bad])
    for name, x, expected in zip(("nll", "lse", "correct", "dhidden", "backward"), every, good, strict=True):
        assert not x[bad].any(), name
        expected = expected[~bad] if x.dim() == 2 else expected
        torch.testing.assert_close(x[~bad], expected, msg=lambda text, name=name: f"{name}: {text}")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(first_sums, first_good, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(second_sums, second_good, rtol=tolerance, atol=tolerance)


def guarded(shape, dtype, fill):
    """A tensor of `fill` between guards of the same, and the memory that holds it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * GUARD,), fill, dtype=dtype)
    return memory[GUARD : GUARD + size].view(shape), memory


@pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
@pytest.mark.parametrize("name", library.isas() if library.refusal() is None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_compiled_ops_take_any_target(name, dtype, gradients):
    """The ops of the library, called directly: nothing is written beside their buffers, and bad rows are zeros."""
    isa, ops = library.isa_value(name), torch.ops.lumos_native
    targets = torch.tensor([3, *BAD_TARGETS, 170])
    bad, rows, classes, size = slice(1, -1), len(targets), 200, 96
    logits = torch.randn(rows, classes)
    blocks = -(-classes // size)
    memories = []

    def buffer(*shape, dtype=torch.float32, fill=torch.nan):
        tensor, memory = guarded(shape, dtype, fill)
        memories.append((memory, memory.clone()))
        return tensor

    dlogits = buffer(rows, classes, dtype=dtype) if gradients else None
    stats = buffer(rows, blocks), buffer(rows, blocks), buffer(rows), buffer(rows, dtype=torch.bool, fill=True)
    for block, part in enumerate(logits.split(size, 1)):
        ops.tube_masked_loss_reduce(part.contiguous(), targets, block * size, block, *stats, dlogits, isa)
    nll, lse, correct = ops.tube_masked_loss_finish(targets, None, 0.1, classes, size, *stats, dlogits, isa)
    for x in (nll, lse, correct) + ((dlogits,) if gradients else ()):
        assert not x[bad].any()
        assert not x.isnan().any()
    torch.testing.assert_close(lse[[0, -1]], logits.logsumexp(1)[[0, -1]])

    if gradients:
        dlogits = buffer(rows, classes, dtype=dtype)
        for block, part in enumerate(logits.split(size, 1)):
            ones = (torch.ones(rows),) * 3
            ops.tube_masked_loss_gradient(part.contiguous(), targets, block * size, *ones, dlogits, isa)
        assert not dlogits[bad].any()
        assert not dlogits.isnan().any()
    for memory, before in memories:
        for edge in (slice(None, GUARD), slice(-GUARD, None)):
            assert torch.equal(memory[edge].view(torch.uint8), before[edge].view(torch.uint8))


@pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
def test_compiled_ops_refuse_buffers_of_other_sizes():
    isa, ops = library.isa_value(), torch.ops.lumos_native
    logits, targets = torch.randn(4, 32), torch.zeros(4, dtype=torch.int64)
    stats = torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    ones, dlogits = (torch.ones(4),) * 3, torch.zeros(4, 32)
    ops.tube_masked_loss_reduce(logits, targets, 0, 0, *stats, dlogits, isa)
    wrong = [
        lambda: ops.tube_masked_loss_reduce(logits, targets[:3], 0, 0, *stats, dlogits, isa),
        lambda: ops.tube_masked_loss_reduce(logits, targets, 0, 1, *stats, dlogits, isa),
        lambda: ops.tube_masked_loss_reduce(logits, targets, 1, 0, *stats, dlogits, isa),
        lambda: ops.tube_masked_loss_reduce(logits, targets, -1, 0, *stats, dlogits, isa),
        lambda: ops.tube_masked_loss_reduce(logits, targets, 0, 0, *stats[:2], stats[2][:3], stats[3], dlogits, isa),
        lambda: ops.tube_masked_loss_finish(targets, None, 0.0, 33, 32, *stats, dlogits, isa),
        lambda: ops.tube_masked_loss_finish(targets, ones[0][:3], 0.0, 32, 32, *stats, dlogits, isa),
        lambda: ops.tube_masked_loss_finish(targets, None, 0.0, 32, 32, *stats, dlogits[:, :31], isa),
        lambda: ops.tube_masked_loss_gradient(logits, targets, 0, ones[0][:3], *ones[1:], dlogits, isa),
        lambda: ops.tube_masked_loss_gradient(logits, targets, 0, *ones, dlogits[:3], isa),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError, match=r"must|no class|no block|blocks of"):
            call()
