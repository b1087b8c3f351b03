"""tube_masked_loss in C++: every instruction set this CPU runs, around its tiles, blocks and chunks.

What every implementation owes is in test_tube_masked_loss.py. Here the blocks are small: a few classes cross them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from eager_draws import channel_draws, loss_draws

from bench import memory, registry
from lumos_kernels import library, tube_masked_loss
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference, is_few
from lumos_kernels.token_ids import VISUAL_CLASSES
from lumos_kernels.tube_masked_loss import native
from lumos_kernels.tube_masked_loss.contract import Inputs, Wanted

pytestmark = [
    pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal())),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIRST = 5  # classes before the slice
NAMES = ("nll", "lse", "dhidden", "dweight")


@pytest.fixture(params=library.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("LUMOS_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(native, "BLOCK_CLASSES", 96)
    monkeypatch.setattr(native, "MAX_ROWS", 16)


def problem(rows=37, width=24, classes=200, dtype=torch.bfloat16, weight_dtype=None, every=2):
    """hidden, weight and labels: every second row a target; 3 classes beyond the slice."""
    hidden = torch.randn(rows * every, width).to(dtype)
    weight = torch.randn(FIRST + classes + 3, width).to(weight_dtype or dtype)
    labels = torch.full((rows * every,), -100)
    labels[::every] = torch.randint(FIRST, FIRST + classes, (rows,))
    return hidden, weight, labels


def run(problem, impl="native", dtype=None, reduction="none", trained=(True, True), upstream=None, **options):
    """nll, lse, and the gradients of hidden and weight (None where not trained), then `correct`."""
    hidden, weight, labels = problem
    dtype = dtype or hidden.dtype
    leaves = [x.detach().to(dtype if dtype == torch.float64 else x.dtype) for x in (hidden, weight)]
    leaves = [x.requires_grad_(t) for x, t in zip(leaves, trained, strict=True)]
    classes = (FIRST, len(weight) - 3)
    loss, stats = tube_masked_loss(
        *leaves, labels, classes=classes, reduction=reduction, impl=impl, return_stats=True, **options
    )
    if any(trained):
        loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return stats.nll.detach(), stats.lse.detach(), leaves[0].grad, leaves[1].grad, stats.correct


def eager_draws(problem, **options) -> list[tuple]:
    """For each of NAMES the reference's results with its sums in several orders."""

    def eager(*case):
        return None, *run(case, "reference", **options)[:4]

    weight = problem[1]
    return list(zip(*loss_draws(eager, *problem, (FIRST, len(weight) - 3)), strict=True))[1:]


def check(problem, **options):
    """Native against the reference, by the rule of testing.py; gradients of the sum and of the rows."""
    results = []
    for reduction in ("sum", "none"):
        upstream = torch.randn(len(problem[2])) if reduction == "none" else torch.tensor(1.3)
        options = options | {"reduction": reduction, "upstream": upstream}
        actual, low = run(problem, **options), run(problem, "reference", **options)
        high = run(problem, "reference", torch.float64, **options)
        draws = eager_draws(problem, **options) if any(map(is_few, high[:4])) else [()] * 4
        for name, a, lo, hi, others in zip(NAMES, actual, low, high, draws, strict=False):
            assert_close_to_reference(a, (lo, *others), hi, f"{reduction} {name}")
        results.append(actual)
    return results


def assert_same_bits(actual, expected):
    for name, a, b in zip((*NAMES, "correct"), actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert_bitwise_equal(
                a.to(torch.int8) if a.dtype == torch.bool else a, b.to(torch.int8) if b.dtype == torch.bool else b, name
            )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 15, 31, 32, 33, 63, 64, 65, 95, 96, 97, 192, 193, 300])
def test_classes_around_tiles_and_blocks(isa, dtype, classes):
    check(problem(dtype=dtype, classes=classes), z_loss_weight=0.05, token_weight=torch.rand(74))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 15, 16, 17, 33])
def test_rows_around_tiles_and_chunks(isa, dtype, rows):
    check(problem(rows=rows, dtype=dtype, classes=110))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 31, 32, 33, 255, 256, 257, 515])
def test_widths_around_pairs_and_panels(isa, dtype, width):
    hidden, weight, labels = problem(width=width, dtype=dtype, classes=110)
    check((hidden, (weight / width**0.5).to(dtype), labels))


def test_default_blocks(isa):
    check(problem(rows=5, width=9, classes=2 * native.BLOCK_CLASSES + 17))


def test_weight_of_another_dtype(isa):
    hidden, weight, labels = problem(weight_dtype=torch.float32)
    rounded = hidden, weight.bfloat16(), labels
    for a, b in zip(run((hidden, weight, labels)), run(rounded), strict=True):
        assert_bitwise_equal(a.to(b.dtype).float(), b.float())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_between_torchs_products_threads_change_no_bit(isa, dtype, reduction, monkeypatch):
    """The bits of torch's products depend on the threads, so these get one. Everything else gets all."""
    case, threads = problem(dtype=dtype, width=65), 1

    def alone(matmul):
        def call(*args, **kwargs):
            torch.set_num_threads(1)
            result = matmul(*args, **kwargs)
            torch.set_num_threads(threads)
            return result

        return call

    monkeypatch.setattr(torch, "mm", alone(torch.mm))
    monkeypatch.setattr(torch.Tensor, "addmm_", alone(torch.Tensor.addmm_))
    expected = run(case, reduction=reduction)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_same_bits(run(case, reduction=reduction), expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_is_no_target_and_no_class_may_hold_anything(isa, dtype, reduction):
    """NaN in ignored rows and in classes beside the slice changes no bit."""
    hidden, weight, labels = problem(dtype=dtype)
    expected = run((hidden, weight, labels), reduction=reduction)
    ignored, outside = labels < 0, torch.ones(len(weight), dtype=torch.bool)
    outside[FIRST:-3] = False
    for poison in (torch.nan, torch.inf, 1e4):
        poisoned = hidden.masked_fill(ignored[:, None], poison), weight.masked_fill(outside[:, None], poison), labels
        assert_same_bits(run(poisoned, reduction=reduction), expected)
    assert not expected[2][ignored].any()
    assert not expected[3][outside].any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(isa, dtype):
    hidden, weight, labels = problem(dtype=dtype)
    hidden[8, 3] = torch.nan
    poisoned = torch.arange(len(hidden)) == 8
    for reduction in ("sum", "none"):
        nll, lse, dhidden, dweight, correct = run((hidden, weight, labels), reduction=reduction)
        for stat in (nll, lse, dhidden[:, 0], dhidden[:, -1]):
            assert torch.equal(stat.isnan(), poisoned)
        assert dweight[FIRST:-3].isnan().any()
        assert not dweight[:FIRST].any()
        reference = run((hidden, weight, labels), "reference", reduction=reduction)
        assert torch.equal(correct, reference[4])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=hex)
def test_nan_of_any_payload_stays_nan_in_bf16(isa, bits):
    """Rounding up the bits of a NaN whose payload is all ones would make it -0 or 0."""
    upstream = torch.ones(74)
    upstream.view(torch.int32)[8] = bits
    dhidden = run(problem(), upstream=upstream)[2]
    assert torch.equal(dhidden.isnan().all(-1), torch.arange(74) == 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_ties_go_to_the_first_class(isa, dtype, scale):
    """Pairs of equal weights within a block, across blocks and at the edges, and (scale 0) all logits equal."""
    twins = [(3, 9), (2, 150), (95, 96), (0, 199), (40, 41), (64, 128)]
    hidden, weight, labels = problem(dtype=dtype)
    weight = weight.clone()
    for row, (a, b) in enumerate(twins * 2):
        direction = torch.linspace(-1, 1, 24).roll(row % len(twins) * 4).sign().to(dtype)
        hidden[2 * row] = direction * scale
        weight[FIRST + a] = weight[FIRST + b] = direction * 3
        labels[2 * row] = FIRST + (a if row < len(twins) else b)
    correct = run((hidden, weight, labels), trained=(False, False))[4]
    logits = F.linear(hidden.float(), weight[FIRST:-3].float())
    assert torch.equal(correct, (logits.argmax(-1) == labels - FIRST) & (labels >= 0))
    if scale:
        assert correct[: 2 * len(twins) : 2].all()
        assert not correct[2 * len(twins) : 4 * len(twins)].any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [100.0, -100.0, 3000.0])
def test_shifted_logits(isa, dtype, shift):
    """The same number in every logit; the largest one is beyond what exp takes."""
    hidden, weight, labels = problem(dtype=dtype)
    hidden[:, -1], weight[:, -1] = shift / 10, 10
    check((hidden, weight, labels))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_apart(isa, dtype):
    """Blocks whose exponentials vanish beside another's: hundreds apart."""
    hidden, weight, labels = problem(dtype=dtype)
    hidden[:, -1], weight[:, -1] = 10, torch.linspace(-40, 40, len(weight)).to(dtype)
    check((hidden, weight, labels))


def test_infinite_logits_have_the_statistics_of_logsumexp(isa):
    """As torch has them: one infinite logit makes lse infinite; -inf in a class leaves the others alone."""
    hidden, weight, labels = torch.ones(2, 1), torch.randn(3 * 32, 1), torch.tensor([FIRST, FIRST + 1])
    weight[FIRST + 40] = -torch.inf
    for value in (-torch.inf, torch.inf):
        weight[FIRST + 40] = value
        _, lse, *_ = run((hidden, weight, labels), trained=(False, False))
        expected = F.linear(hidden, weight[FIRST:-3]).logsumexp(-1)
        torch.testing.assert_close(lse, expected)


def test_exponential_over_its_range(isa):
    """The gradients of a row's other classes are probabilities, so e^x shows in them down to 1e-37."""
    steps = torch.linspace(0, 80, 20_001)
    weight = torch.cat([torch.zeros(FIRST), -steps, torch.zeros(3)])[:, None]
    _, lse, _, dweight, _ = run((torch.ones(1, 1), weight, torch.tensor([FIRST])))
    exact = torch.exp((-steps - lse).double())
    error = (dweight[FIRST:-3, 0].double() - exact)[1:] / exact[1:]
    assert error.abs().max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=str)
def test_frozen_inputs(isa, dtype, reduction, trained):
    case = problem(dtype=dtype)
    both, one = (run(case, reduction=reduction, trained=t) for t in ((True, True), trained))
    expected = [*both[:2], *(grad if t else None for grad, t in zip(both[2:4], trained, strict=True)), both[4]]
    assert_same_bits(one, expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_alone_are_the_same_bits(isa, dtype):
    case = problem(dtype=dtype)
    with_grads, alone = run(case, reduction="sum"), run(case, reduction="sum", trained=(False, False))
    for index in (0, 1, 4):
        assert torch.equal(alone[index], with_grads[index])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_backward_calls(isa, reduction):
    hidden, weight, labels = (x.clone() for x in problem())
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = tube_masked_loss(*leaves, labels, classes=(FIRST, len(weight) - 3), reduction=reduction, impl="native")
    grad = torch.randn_like(loss)
    first = torch.autograd.grad(loss, leaves, grad, retain_graph=True)
    tripled = torch.autograd.grad(loss, leaves, 4 * grad, retain_graph=True)
    for a, b, c in zip(first, torch.autograd.grad(loss, leaves, grad), tripled, strict=True):
        assert_bitwise_equal(a, b)
        assert_bitwise_equal(4 * a, c)


def test_without_gradients_nothing_grows_with_the_classes(monkeypatch):
    """Forward alone asks for no buffer [rows, K], and never for a matmul of backward."""
    sizes = []
    buffer = native._Work._buffer
    monkeypatch.setattr(native._Work, "_buffer", lambda *a: sizes.append(a[1:4]) or buffer(*a))
    monkeypatch.setattr(native._Work, "_dx", lambda *_: pytest.fail("dX"))
    monkeypatch.setattr(native._Work, "_add_dweight", lambda *_: pytest.fail("dW"))
    run(problem(classes=3000), trained=(False, False))
    assert {name for name, _, _ in sizes} == {"logits"}
    assert max(columns for _, _, columns in sizes) <= native.BLOCK_CLASSES


def test_workspace_is_bounded():
    """At any number of rows and at the widest model there is: what a chunk keeps, and the blocks beside it."""
    kept = native.DLOGITS_BYTES
    block = native.BLOCK_CLASSES * 4 * (3072 + native.DLOGITS_BYTES // (2 * 64_000))
    assert kept + block < 64 << 20
    rows = torch.arange(100_000)
    inputs = Inputs(torch.empty(0, 8), torch.empty(100_000, 8), rows, rows)
    (part, *_) = native._Work(inputs, Wanted(True, torch.empty(0))).chunks()
    assert (part.stop - part.start) * 100_000 * 4 <= kept


def test_peak_memory_of_a_step():
    """Of forward and backward in a process of its own: the gradients and 64 MB, no fp32 sums beside the weight's."""
    case = registry.find("tube_masked_loss/1Bq-256p-1f/bf16/forward+backward")
    tokens, width, last = case.video.tokens, case.model.hidden, VISUAL_CLASSES[1]
    gradients = 2 * tokens * width + 2 * last * width
    limit = gradients + (64 << 20) + (8 << 20)
    for _ in range(4):  # a heap with gaps takes up to 40 MB more than was asked for, now and then
        peak = memory.contestant_peaks(case.key, ["lumos native"], threads=1)["lumos native"]
        if peak is None:
            pytest.skip("this system does not tell a process its peak memory")
        if peak < limit:
            return
    pytest.fail(f"the step takes {peak / 2**20:.0f} MiB, allowed are {limit / 2**20:.0f}")


@pytest.mark.skipif("avx512_bf16" not in library.isas(), reason="needs AVX512_BF16")
@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 32, 32), (13, 33, 45), (100, 300, 200), (7, 515, 97), (25, 16, 129)])
def test_bf16_products_with_fp32_results(shape):
    """The matmuls of their own, within the error of fp32 sums; x, weight and dlogits with strides."""
    rows, width, classes = shape
    isa, ops = library.isa_value("avx512_bf16"), torch.ops.lumos_native
    x = torch.randn(rows, width + 3).bfloat16()[:, 1 : width + 1]
    weight = torch.randn(classes, width + 5).bfloat16()[:, 2 : width + 2]
    packed = ops.pack_rows_bf16(x, isa)
    assert packed.numel() > 0
    logits = torch.full((rows, classes), torch.nan)
    ops.packed_matmul_bf16(packed, weight, logits, isa)
    exact = x.double() @ weight.double().T
    eager = [a @ b.T for a, b in channel_draws(x.float(), weight.float())]
    assert_close_to_reference(logits, eager, exact, "logits")

    dlogits = torch.randn(rows, classes + 7).bfloat16()[:, :classes]
    start = torch.randn(classes, width)
    sums = start.clone()
    ops.add_outer_bf16(dlogits, x, sums, isa)
    exact = start.double() + dlogits.double().T @ x.double()
    eager = [start + a @ b.T for a, b in channel_draws(dlogits.float().T, x.float().T)]
    assert_close_to_reference(sums, eager, exact, "dweight")


def test_the_sets_of_instructions_agree_on_statistics_in_fp32(monkeypatch):
    case = problem(dtype=torch.float32)
    results = []
    for name in library.isas():
        monkeypatch.setenv("LUMOS_CPU_ISA", name)
        results.append(run(case))
    for result in results[1:]:
        assert_same_bits(result, results[0])
