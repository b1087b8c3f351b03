"""tube_masked_loss's Triton kernels against fp64, at the class counts, chunks and strides where they could go wrong.

conftest.py says where they run. Logits are rounded to the dtype of hidden, so the yardstick in bf16 and fp16 is the
eager loss in that dtype: a model's lm_head, then torch's cross entropy. What every implementation owes is in
tests/test_tube_masked_loss.py.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from eager_draws import loss_draws
from torch import Tensor

from lumos_kernels import tube_masked_loss
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference, awkward_gradients, is_few
from lumos_kernels.tube_masked_loss import triton as kernels
from lumos_kernels.tube_masked_loss.contract import Inputs, RowLoss, StatisticGradients, Wanted

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]

FIRST, BEHIND = 5, 3  # rows of weight before and behind the class slice
NAMES = ("loss", "nll", "lse", "dhidden", "dweight")


@dataclass(frozen=True)
class Problem:
    dtype: torch.dtype = torch.float32
    classes: int = 80
    targets: int = 5
    every: int = 2  # one row in so many is a target
    width: int = 24
    scale: float = 1.0  # of the logits
    weight_dtype: torch.dtype | None = None  # that of hidden where None

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-K{self.classes}-N{self.targets}"

    def make(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, weight, labels. Labels beside the slice are no targets."""
        tokens = self.targets * self.every
        hidden = torch.randn(tokens, self.width)
        weight = torch.randn(FIRST + self.classes + BEHIND, self.width) * self.scale / self.width**0.5
        labels = torch.tensor([-100, FIRST - 1, FIRST + self.classes]).repeat(tokens)[:tokens]
        labels[:: self.every] = torch.randint(FIRST, FIRST + self.classes, (self.targets,))
        return hidden.to(device, self.dtype), weight.to(device, self.weight_dtype or self.dtype), labels.to(device)


def class_slice(weight: Tensor) -> tuple[int, int]:
    return FIRST, len(weight) - BEHIND


def eager(hidden, weight, labels, reduction="sum", z_loss_weight=0.0, token_weight=None):
    """The loss as eager code computes it in hidden's dtype, and its statistics."""
    first, last = class_slice(weight)
    logits = F.linear(hidden, weight[first:last].to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_target = (labels >= first) & (labels < last)
    nll = F.cross_entropy(logits, torch.where(is_target, labels - first, -100), reduction="none")
    lse = torch.where(is_target, logits.logsumexp(-1), 0)
    loss = (nll if token_weight is None else nll * token_weight.to(nll.dtype)) + z_loss_weight * lse.square()
    return loss if reduction == "none" else loss.sum(), nll, lse, (logits.argmax(-1) == labels - first) & is_target


def ours(hidden, weight, labels, reduction="sum", impl="triton", **options):
    loss, stats = tube_masked_loss(
        hidden,
        weight,
        labels,
        classes=class_slice(weight),
        reduction=reduction,
        **options,
        impl=impl,
        return_stats=True,
    )
    return loss, *stats


def run(function, problem, upstream=None, trained=(True, True), dtype=None, **options) -> list:
    """loss, nll, lse, and the gradients of hidden and weight (None where not trained), then `correct`."""
    hidden, weight, labels = problem
    leaves = [x.detach().to(dtype or x.dtype) for x in (hidden, weight)]
    leaves = [x.requires_grad_(t) for x, t in zip(leaves, trained, strict=True)]
    loss, nll, lse, correct = function(*leaves, labels, **options)
    if any(trained):
        loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return [loss.detach(), nll.detach(), lse.detach(), leaves[0].grad, leaves[1].grad, correct]


def reference(hidden, weight, labels, reduction="sum", **options):
    return ours(hidden, weight, labels, reduction, impl="reference", **options)


def assert_matches_eager(problem, upstream=None, rival=eager, actual=None, **options):
    """actual: the results to judge, by default the kernels' on the problem as it is."""
    actual = run(ours, problem, upstream, **options) if actual is None else actual
    low = run(rival, problem, upstream, **options)
    high = run(eager, problem, upstream, dtype=torch.float64, **options)
    eager_run = functools.partial(run, rival, upstream=upstream, **options)
    draws = loss_draws(lambda *case: eager_run(case)[:5], *problem, class_slice(problem[1]))
    for name, a, lo, hi, others in zip(NAMES, actual, low, high, zip(*draws, strict=True), strict=False):
        assert a.dtype == lo.dtype
        assert_close_to_reference(a, (lo, *others) if is_few(hi) else lo, hi, name)
    return actual


def assert_same_bits(actual, expected, what=""):
    for name, a, b in zip((*NAMES, "correct"), actual, expected, strict=True):
        if b is not None:
            assert_bitwise_equal(*(x.to(torch.int8) if x.dtype == torch.bool else x for x in (a, b)), f"{what} {name}")
        else:
            assert a is None


@pytest.fixture
def small_blocks(monkeypatch):
    """128 classes at once, 32 in the narrow form; 64 and 16 where the gradient is written."""
    tables = [dict.fromkeys((2, 4), kernels.RowConfig(block=128, num_warps=1)) for _ in range(2)]
    monkeypatch.setattr(kernels, "LOSS", tables[0])
    monkeypatch.setattr(kernels, "GRADIENT", tables[1])


@pytest.fixture
def small_chunks(monkeypatch):
    """4 rows of at most 300 fp32 classes and 24 channels."""
    monkeypatch.setattr(kernels, "ROW_MULTIPLE", 4)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * (300 + 24) * 4)


PROBLEMS = [
    Problem(torch.float32, 300),
    Problem(torch.bfloat16, 304, targets=9),
    Problem(torch.float16, 301),
    Problem(torch.bfloat16, 128, targets=1),
    Problem(torch.float32, 256, targets=1, every=1),
    Problem(torch.bfloat16, 129, weight_dtype=torch.float32),
    Problem(torch.float16, 127, width=1),
]


@pytest.mark.usefixtures("small_blocks", "small_chunks")
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_matches_eager_across_blocks_and_chunks(problem, device):
    inputs = problem.make(device)
    weights = torch.linspace(0.2, 1.7, len(inputs[2]), device=device)
    assert_matches_eager(inputs, torch.tensor(1.3, device=device), z_loss_weight=0.05, token_weight=weights)
    assert_matches_eager(inputs, torch.randn(len(inputs[2]), device=device), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 4097, 20000])
def test_default_blocks(dtype, classes, device):
    inputs = Problem(dtype, classes, targets=2, width=9).make(device)
    assert_matches_eager(inputs, z_loss_weight=0.1)
    assert_matches_eager(inputs, torch.randn(len(inputs[2]), device=device), reduction="none", z_loss_weight=0.1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_shifted_by_100(dtype, device):
    hidden, weight, labels = Problem(dtype, 160, width=8).make(device)
    hidden[:, 0], weight[:, 0] = 10.0, 10.0
    actual = assert_matches_eager((hidden, weight, labels), z_loss_weight=0.001)
    assert actual[2].max() > 90
    # Backward knows of the statistics lse alone, rounded to fp32: as the reference does.
    rival = reference if dtype == torch.float32 else eager
    upstream = torch.randn(len(labels), device=device)
    assert_matches_eager((hidden, weight, labels), upstream, rival, reduction="none")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [0.0, 40.0])
def test_flat_and_extreme_logits(scale, device):
    inputs = Problem(torch.float32, 160, scale=scale).make(device)
    actual = assert_matches_eager(inputs, z_loss_weight=0.01)
    if scale == 0:  # all logits equal: the argmax is class 0
        assert torch.equal(actual[5], inputs[2] == FIRST)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("classes", [160, 157])
def test_the_first_of_equal_logits_is_the_argmax(classes, device):
    """Each target shares the largest logit with class 3, 40 or 150, which lies in another block or in the same."""
    hidden, weight, labels = Problem(torch.bfloat16, classes, targets=9, every=1).make(device)
    hidden[:], weight[:] = hidden[0], weight[0] / 8
    for twin, others in ((3, (3, 40, 150)), (40, (3, 41, 155)), (150, (149, 151, 150))):
        top = weight.clone()
        for place in (twin, *others):
            top[FIRST + place] = hidden[0]
        labels[:] = FIRST + torch.tensor((twin, *others, 0, 0, 0, 0, 0), device=device)
        (_, _, _, expected), got = eager(hidden, top, labels), ours(hidden, top, labels)
        assert torch.equal(got[3], expected)
        assert got[3].any()
        assert not got[3].all()


def test_no_targets_no_tokens(device):
    hidden, weight, labels = Problem(torch.bfloat16, 80).make(device)
    for inputs in ((hidden, weight, labels.fill_(-100)), (hidden[:0], weight, labels[:0])):
        for reduction in ("sum", "mean", "none"):
            loss, nll, lse, dhidden, dweight, correct = run(ours, inputs, reduction=reduction)
            for x in (loss, nll, lse, dhidden, dweight, correct):
                assert not x.any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_give_the_same_bits_as_finding_them(reduction, device):
    inputs = Problem(torch.bfloat16, 80).make(device)
    rows = torch.arange(0, 10, 2, dtype=torch.int32, device=device)
    assert_same_bits(run(ours, inputs, reduction=reduction, rows=rows), run(ours, inputs, reduction=reduction))


@pytest.mark.usefixtures("small_blocks", "small_chunks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_is_no_target_and_no_class_may_hold_anything(reduction, device):
    hidden, weight, labels = Problem(torch.bfloat16, 150).make(device)
    expected = run(ours, (hidden, weight, labels), reduction=reduction)
    ignored = torch.arange(len(labels), device=device) % 2 == 1
    outside = torch.ones(len(weight), dtype=torch.bool, device=device)
    outside[FIRST:-BEHIND] = False
    for poison in (torch.nan, 1e30):
        poisoned = hidden.masked_fill(ignored[:, None], poison), weight.masked_fill(outside[:, None], poison), labels
        assert_same_bits(run(ours, poisoned, reduction=reduction), expected)
    assert not expected[3][ignored].any()
    assert not expected[4][outside].any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's numpy
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nan_stays_in_its_row(reduction, device):
    hidden, weight, labels = Problem(torch.bfloat16, 150).make(device)
    hidden[4, 3] = torch.nan
    _, nll, lse, dhidden, dweight, correct = run(ours, (hidden, weight, labels), reduction=reduction)
    poisoned = torch.arange(len(labels), device=device) == 4
    for x in (nll, lse, dhidden[:, 0], dhidden[:, -1]):
        assert torch.equal(x.isnan(), poisoned)
    assert dweight[FIRST:-BEHIND].isnan().all()
    assert not correct[4]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("layout", ["transposed", "every second", "shifted by one"])
def test_any_strides(layout, reduction, device):
    dense = Problem(torch.float16, 80).make(device)
    strided = []
    for x in dense:
        if layout == "transposed":
            x = x.t().contiguous().t()
        elif layout == "every second":
            x = x.repeat_interleave(2, dim=0)[::2]
        else:
            x = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        strided.append(x)
    # Not bit for bit: a matmul of other strides may round otherwise.
    assert_matches_eager(dense, actual=run(ours, strided, reduction=reduction), reduction=reduction)


@pytest.mark.usefixtures("small_blocks")
def test_awkward_gradients_of_the_row_losses(device):
    inputs = Problem(torch.bfloat16, 80).make(device)
    for kind, upstream in awkward_gradients((len(inputs[2]),), torch.float32):
        upstream = upstream.to(device)
        expected = run(ours, inputs, upstream.clone(memory_format=torch.contiguous_format), reduction="none")
        assert_same_bits(run(ours, inputs, upstream, reduction="none"), expected, kind)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_two_backward_passes_give_the_same_gradients(reduction, device):
    hidden, weight, labels = Problem(torch.bfloat16, 80).make(device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = tube_masked_loss(*leaves, labels, classes=class_slice(weight), reduction=reduction, impl="triton").sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.usefixtures("small_blocks", "small_chunks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_frozen_inputs_do_not_change_the_other_gradient(reduction, device):
    inputs = Problem(torch.bfloat16, 150).make(device)
    full = run(ours, inputs, reduction=reduction)
    for trained in ((True, False), (False, True)):
        expected = [x if i not in (3, 4) or trained[i - 3] else None for i, x in enumerate(full)]
        assert_same_bits(run(ours, inputs, reduction=reduction, trained=trained), expected)
    assert_same_bits(
        run(ours, inputs, reduction=reduction, trained=(False, False)), [*full[:3], None, None, full[5]], "frozen"
    )


def direct(problem, row_weight=None, need=(True, True)) -> list[Tensor]:
    """Everything that the implementation returns and writes, called without torch.library between."""
    hidden, weight, labels = problem
    classes = weight[FIRST:-BEHIND].contiguous()
    rows = ((labels >= FIRST) & (labels < len(weight) - BEHIND)).nonzero()[:, 0]
    per_row = torch.rand(2, len(rows), device=hidden.device)
    targets = labels[rows] - FIRST
    options = {"dtype": torch.float32, "device": hidden.device}
    sums = [torch.empty(classes.shape, **options) if need[1] else None for _ in range(2)]
    inputs = Inputs(hidden, classes, targets, rows)
    outputs = kernels.forward(inputs, RowLoss(row_weight, 0.1), Wanted(need[0], sums[0]))
    dhidden = kernels.backward(inputs, outputs.lse, StatisticGradients(*per_row), Wanted(need[0], sums[1]))
    return [*outputs, sums[0], dhidden, sums[1]]


@pytest.mark.usefixtures("small_blocks", "small_chunks")
@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[4], PROBLEMS[6]], ids=str)
@pytest.mark.parametrize("need", [(True, True), (False, True), (False, False)], ids=str)
def test_writes_every_element_and_nothing_around(problem, need, device, guarded_allocations):
    inputs = problem.make(device)
    with guarded_allocations():
        results = direct(inputs, None, need)
    assert [x is not None for x in results] == [True, True, True, *need, *need]
    assert all(x.is_contiguous() and not x.float().isnan().any() for x in results if x is not None)


@pytest.mark.usefixtures("small_blocks", "small_chunks")
def test_deterministic(device):
    inputs = Problem(torch.bfloat16, 150, targets=6).make(device)
    for a, b in zip(*([x.float() for x in seeded(inputs)] for _ in range(2)), strict=True):
        assert_bitwise_equal(a, b)


def seeded(inputs) -> list[Tensor]:
    torch.manual_seed(1)
    return direct(inputs, torch.ones(6, device=inputs[0].device))


def test_chunks_are_equal_and_bounded():
    wide = (64000 + 2048) * 2
    assert kernels.chunk_rows(28224, wide) == 4096  # 6 of 4,096 rows and one of 3,648
    assert kernels.chunk_rows(8781, wide) == 2944  # 3 chunks, not 2 of 4,352 and one of 77
    assert kernels.chunk_rows(28224, 2 * wide) == 2176
    assert kernels.chunk_rows(1, wide) == 128
    assert kernels.chunk_rows(0, 4) == 128
    assert kernels.chunk_rows(1, 1 << 40) == 128
    for rows in (1, 127, 128, 129, 4095, 4096, 4097, 8781, 12544, 19757, 28224, 90000, 10**9):
        for row_bytes in (2 * (320 + 2048), wide, 2 * (64000 + 3072), 2 * wide):
            size = kernels.chunk_rows(rows, row_bytes)
            assert size % 128 == 0
            assert size * row_bytes <= kernels.CHUNK_BYTES < 0.6e9


def test_rows_beyond_two_to_the_31_elements(device):
    """The third row of logits begins 2^31 elements behind the first. Memory that nobody touches costs nothing."""
    classes, stride = 48, 2**30
    memory = torch.empty(2 * stride + classes, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((3, classes), (stride, 1)).copy_(torch.randn(3, classes))
    near = logits.clone()
    targets, lse, grad = (x.to(device) for x in (torch.tensor([3, 40, 7]), torch.zeros(3), torch.rand(3)))
    results = []
    for x in (logits, near):
        stats = [torch.empty(3, dtype=dtype, device=device) for dtype in (torch.float32, torch.float32, torch.uint8)]
        options = {"BLOCK": 64, "VECTOR": 8}
        kernels._loss_kernel[(3,)](x, targets, None, *stats, x.stride(0), classes, 0.1, WITH_GRADIENT=True, **options)
        kernels._gradient_kernel[(3, 1)](x, targets, lse, grad, grad, x.stride(0), classes, **options)
        results.append((*stats, x.clone()))
    for far, expected in zip(*results, strict=True):
        assert torch.equal(far, expected)
