"""tube_masked_loss: every implementation against torch's cross entropy, and the contracts of its public function.

An implementation that runs CPU tensors joins by being registered in dispatch; Triton has a file of its own.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from eager_draws import loss_draws
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lumos_kernels import dispatch, tube_masked_loss
from lumos_kernels.dispatch import Problem
from lumos_kernels.testing import (
    assert_bitwise_equal,
    assert_close_to_reference,
    awkward_gradients,
    eager_loss,
    is_few,
    poisoned_allocations,
)
from lumos_kernels.tube_masked_loss import ops as loss_ops
from lumos_kernels.tube_masked_loss import weight_gradient

OP = dispatch.ops()["tube_masked_loss"]


def runs(impl, dtype):
    return impl != "triton" and OP.refusal(impl, Problem("cpu", dtype)) is None


IMPLS = [impl for impl in OP.implementations if runs(impl, torch.float32)]
# The fp32 reference is the eager rival of the others: it has none of its own and is tested in fp64.
FINEST = [(impl, torch.float64 if impl == "reference" else torch.float32) for impl in IMPLS]
LOW = [(impl, dtype) for impl in IMPLS for dtype in (torch.bfloat16, torch.float16) if runs(impl, dtype)]
CASES = LOW + FINEST
EXACT = [impl for impl in IMPLS if runs(impl, torch.float64)]
CLASSES = (30, 75)  # of 80 rows of weight
SURROUNDED = torch.tensor([29, *range(30, 74, 4), 74, 75])  # some rows of the slice and its neighbours
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "z_loss": {"z_loss_weight": 0.01},
    "z_loss, none": {"z_loss_weight": 0.01, "reduction": "none"},
    "token_weight": {"token_weight": True},
    "token_weight, sum": {"token_weight": True, "reduction": "sum"},
    "all, none": {"token_weight": True, "z_loss_weight": 0.3, "reduction": "none"},
    "all, mean": {"token_weight": True, "z_loss_weight": 0.3},
    "rows": {"rows": torch.int32},
    "rows, all": {"rows": torch.int64, "token_weight": True, "z_loss_weight": 0.3},
}


def some_labels(tokens):
    """Targets, the ignored id, and ids just outside the classes on both sides."""
    labels = torch.randint(*CLASSES, (tokens,))
    labels[::3] = -100
    for index, label in enumerate((CLASSES[0] - 1, CLASSES[1], 0, 79, 129535, -1)):
        labels[1 + 3 * index :: 24] = label
    return labels


def problem(tokens=50, width=24, dtype=torch.float32, weight_dtype=None):
    """Leaves hidden and weight, and labels."""
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    return hidden, torch.randn(80, width).to(weight_dtype or dtype).requires_grad_(), some_labels(tokens)


def targets(labels):
    return (labels >= CLASSES[0]) & (labels < CLASSES[1])


def resolve(options, labels):
    """The options of a call: token weights, and the target rows in the dtype asked for, in any order."""
    options = dict(options)
    if options.get("token_weight") is True:
        options["token_weight"] = torch.linspace(0.2, 1.7, len(labels))
    if "rows" in options:
        options["rows"] = targets(labels).nonzero()[:, 0].flip(0).to(options["rows"])
    return options


def oracle(hidden, weight, labels, reduction="mean", z_loss_weight=0.0, token_weight=None, rows=None):
    """torch's cross entropy of the class slice, in hidden's precision; the statistics beside it."""
    first, last = CLASSES
    is_target = targets(labels)
    logits = F.linear(hidden, weight[first:last].to(hidden.dtype))
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
    nll = F.cross_entropy(logits, torch.where(is_target, labels - first, -100), reduction="none")
    lse = torch.where(is_target, logits.logsumexp(-1), 0)
    loss = nll if token_weight is None else nll * token_weight.to(nll.dtype)
    loss = loss + z_loss_weight * lse.square()
    if reduction != "none":
        loss = loss.sum() / (max(int(is_target.sum()), 1) if reduction == "mean" else 1)
    return loss, (nll, lse, (logits.argmax(-1) == labels - first) & is_target)


def ours(hidden, weight, labels, **options):
    return tube_masked_loss(hidden, weight, labels, classes=CLASSES, return_stats=True, **options)


def with_gradients(function, hidden, weight, labels, upstream=None, **options):
    """Loss, nll, lse, and the gradients of hidden and weight."""
    loss, (nll, lse, _) = function(hidden, weight, labels, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    gradients = torch.autograd.grad(loss, (hidden, weight), upstream)
    return [loss.detach(), nll.detach(), lse.detach(), *gradients]


def copies(leaves, dtype):
    return [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


def assert_as_close_as_eager(impl, leaves, labels, upstream=None, **options):
    actual = with_gradients(ours, *leaves, labels, upstream, impl=impl, **options)
    high = with_gradients(oracle, *copies(leaves, torch.float64), labels, upstream, **options)
    rival, extra = (oracle, {}) if impl == "reference" else (ours, {"impl": "reference"})
    eager = functools.partial(with_gradients, rival, upstream=upstream, **extra, **options)
    draws = zip(eager(*leaves, labels), *loss_draws(eager, *leaves, labels, CLASSES), strict=True)
    for name, a, hi, (lo, *others) in zip(
        ("loss", "nll", "lse", "dhidden", "dweight"), actual, high, draws, strict=True
    ):
        if a.dtype == torch.float64:  # sums of a few hundred terms in another order
            atol = 1000 * torch.finfo(torch.float64).eps * max([1.0, *hi.abs().flatten().tolist()])
            torch.testing.assert_close(a, hi, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert_close_to_reference(a, (lo, *others) if is_few(hi) else lo, hi, name)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("name", OPTIONS)
def test_error_is_within_twice_the_eager_one(impl, dtype, name):
    hidden, weight, labels = problem(dtype=dtype)
    options = resolve(OPTIONS[name], labels)
    upstream = torch.randn(50) if options.get("reduction") == "none" else torch.tensor(1.7)
    assert_as_close_as_eager(impl, (hidden, weight), labels, upstream, **options)


@pytest.mark.parametrize("impl", EXACT)
def test_fp64_equals_the_official_loss(impl):
    hidden, weight, labels = problem(dtype=torch.float64)
    actual = tube_masked_loss(hidden, weight, labels, classes=CLASSES, impl=impl)
    torch.testing.assert_close(actual, eager_loss(hidden, weight, labels, CLASSES))


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics(impl):
    hidden, weight, labels = problem()
    with torch.no_grad():
        hidden[1::4] = weight[labels[1::4].clamp(0, 79)] * 3  # rows whose target has the highest logit
    _, stats = ours(hidden, weight, labels, impl=impl)
    _, (_, _, correct) = oracle(hidden, weight, labels)
    assert torch.equal(stats.correct, correct)
    assert 0 < int(correct.sum()) < int(targets(labels).sum())
    assert not any(stat.requires_grad for stat in stats)
    for stat in stats:
        assert stat.shape == (50,)
        assert not stat[~targets(labels)].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_and_statistics_are_fp32_and_gradients_of_the_leaves_dtypes(impl):
    hidden, weight, labels = problem(dtype=torch.bfloat16, weight_dtype=torch.float32)
    loss, nll, lse, dhidden, dweight = with_gradients(ours, hidden, weight, labels, impl=impl)
    assert loss.dtype == nll.dtype == lse.dtype == dweight.dtype == torch.float32
    assert dhidden.dtype == torch.bfloat16


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(impl, name):
    labels = some_labels(9)
    options = resolve(OPTIONS[name], labels) | {"impl": impl}
    weight = torch.randn(80, 3).double()
    leaves = torch.randn(9, 3).double().requires_grad_(), weight[SURROUNDED].clone().requires_grad_()

    def function(hidden, some):
        return tube_masked_loss(hidden, weight.index_copy(0, SURROUNDED, some), labels, classes=CLASSES, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", EXACT)
def test_gradcheck_of_the_row_statistics(impl):
    """Any function of nll and lse is a loss."""
    labels = some_labels(9)
    leaves = torch.randn(9, 3).double().requires_grad_(), torch.randn(80, 3).double().requires_grad_()

    def focal_and_more(hidden, weight):
        _, stats = tube_masked_loss(
            hidden, weight, labels, classes=CLASSES, reduction="none", z_loss_weight=0.1, return_stats=True, impl=impl
        )
        return (1 - torch.exp(-stats.nll)).square() * stats.nll, stats.lse.sin()

    assert torch.autograd.gradcheck(focal_and_more, leaves)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 511, 512, 513, 1025])
def test_lengths_around_tile_multiples(impl, dtype, tokens):
    """Every row a target, so that tokens counts rows of work."""
    hidden, weight, _ = problem(tokens, 16, dtype)
    assert_as_close_as_eager(impl, (hidden, weight), torch.randint(*CLASSES, (tokens,)), z_loss_weight=0.1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("rows", [None, torch.int32])
def test_no_target_rows(impl, reduction, tokens, rows):
    hidden, weight, _ = problem(tokens)
    labels = torch.full((tokens,), -100)
    options = {} if rows is None else {"rows": torch.empty(0, dtype=rows)}
    results = with_gradients(ours, hidden, weight, labels, reduction=reduction, z_loss_weight=0.1, impl=impl, **options)
    assert results[0].shape == ((tokens,) if reduction == "none" else ())
    for result in results:
        assert not result.any()  # a NaN is not zero


class Casts(TorchDispatchMode):
    """The shapes of the tensors that are cast inside."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("impl", IMPLS)
def test_no_target_rows_cast_no_weight(impl):
    """The class slice of an fp32 lm_head is copied for bf16 hidden states only where there is a target."""
    hidden, weight, labels = (x.detach() for x in problem(dtype=torch.bfloat16, weight_dtype=torch.float32))
    class_slice = CLASSES[1] - CLASSES[0], weight.shape[1]
    for given, expected in ((torch.full_like(labels, -100), False), (labels, True)):
        with Casts() as casts:
            loss_ops._forward(hidden, weight, given, None, None, 0.0, *CLASSES, True, True, True, impl)
        assert (class_slice in casts.shapes) == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_give_the_same_bits_as_finding_them(impl):
    hidden, weight, labels = problem()
    rows = targets(labels).nonzero()[:, 0]
    for reduction in ("mean", "none"):
        found = with_gradients(ours, hidden, weight, labels, reduction=reduction, impl=impl)
        for dtype in (torch.int32, torch.int64):
            given = with_gradients(ours, hidden, weight, labels, reduction=reduction, rows=rows.to(dtype), impl=impl)
            for a, b in zip(given, found, strict=True):
                assert_bitwise_equal(a, b)


@pytest.mark.parametrize(("impl", "dtype"), LOW + [(impl, torch.float32) for impl in IMPLS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_and_other_classes_do_not_matter(impl, dtype, reduction):
    hidden, weight, labels = problem(dtype=dtype)
    is_target, in_slice = targets(labels), torch.zeros(80, dtype=torch.bool)
    in_slice[slice(*CLASSES)] = True
    upstream = torch.randn(50) if reduction == "none" else None
    results = with_gradients(ours, hidden, weight, labels, upstream, reduction=reduction, impl=impl)
    assert not results[3][~is_target].any()
    assert not results[4][~in_slice].any()
    assert results[3].any()
    assert results[4].any()

    changed_hidden, changed_weight = copies((hidden, weight), dtype)
    changed_hidden.data[~is_target] = 1e4
    changed_weight.data[~in_slice] = -1e4
    changed_labels = torch.where(is_target, labels, 10**6)
    changed = with_gradients(
        ours, changed_hidden, changed_weight, changed_labels, upstream, reduction=reduction, impl=impl
    )
    for a, b in zip(changed, results, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_logits_shifted_by_100(impl, dtype):
    """A constant column adds 100 to every logit: exponentials of the raw logits would overflow."""
    hidden, weight, labels = problem(dtype=dtype)
    with torch.no_grad():
        hidden[:, -1], weight[:, -1] = 10, 10
    assert_as_close_as_eager(impl, (hidden, weight), labels)
    with torch.no_grad():
        weight[:, -1] = -10
    assert_as_close_as_eager(impl, (hidden, weight), labels)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_extreme_values(impl, dtype):
    hidden, weight, labels = problem(dtype=dtype)
    with torch.no_grad():
        hidden.mul_(5)
        weight.mul_(3)
    assert_as_close_as_eager(impl, (hidden, weight), labels)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_awkward_gradients_of_the_row_losses(impl, dtype):
    hidden, weight, labels = problem(dtype=dtype)
    for _, grad in awkward_gradients((50,), torch.float32):
        assert_as_close_as_eager(impl, (hidden, weight), labels, grad, reduction="none", z_loss_weight=0.1)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_strides(impl, dtype, reduction):
    """hidden as a slice and transposed, weight transposed, labels with a stride."""
    hidden, weight, labels = problem(dtype=dtype)
    labels = torch.stack([labels, labels], -1)[:, 0]
    for strided in (
        (hidden.detach().T.contiguous().T, weight.detach().T.contiguous().T),
        (torch.cat([hidden.detach()] * 2, -1)[:, :24], torch.cat([weight.detach()] * 2, -1)[:, 24:]),
    ):
        assert not any(tensor.is_contiguous() for tensor in strided)
        leaves = [tensor.requires_grad_() for tensor in strided]
        assert_as_close_as_eager(impl, leaves, labels, reduction=reduction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_backward_passes_give_the_same_gradients(impl, reduction):
    hidden, weight, labels = problem()
    loss = tube_masked_loss(hidden, weight, labels, classes=CLASSES, reduction=reduction, impl=impl)
    upstream = torch.randn_like(loss)
    first = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
    half = torch.autograd.grad(loss, (hidden, weight), upstream / 2, retain_graph=True)
    for a, b, c in zip(torch.autograd.grad(loss, (hidden, weight), upstream), first, half, strict=True):
        assert_bitwise_equal(a, b)
        assert_bitwise_equal(2 * c, b)


@pytest.mark.parametrize(("impl", "dtype"), LOW)
def test_gradients_of_weight_accumulated_over_8_steps(impl, dtype):
    _, weight, labels = problem(dtype=dtype)
    steps = [torch.randn(50, 24).to(dtype) for _ in range(8)]

    def accumulate(function, dtype, **options):
        (leaf,) = copies([weight], dtype)
        for hidden in steps:
            function(hidden.to(dtype), leaf, labels, **options)[0].backward()
        return leaf.grad

    low = accumulate(oracle, dtype) if impl == "reference" else accumulate(ours, dtype, impl="reference")
    assert_close_to_reference(accumulate(ours, dtype, impl=impl), low, accumulate(oracle, torch.float64), "dweight")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient_and_change_no_other(impl, reduction, frozen):
    hidden, weight, labels = problem()
    leaves = [hidden, weight]
    upstream = torch.randn(50) if reduction == "none" else torch.tensor(1.0)
    loss, _, _, *every = with_gradients(ours, *leaves, labels, upstream, reduction=reduction, impl=impl)
    leaves[frozen].requires_grad_(False)
    again = tube_masked_loss(*leaves, labels, classes=CLASSES, reduction=reduction, impl=impl)
    again.backward(upstream)
    assert_bitwise_equal(again.detach(), loss)
    assert leaves[frozen].grad is None
    assert_bitwise_equal(leaves[1 - frozen].grad, every[1 - frozen])
    leaves[1 - frozen].requires_grad_(False)
    assert not tube_masked_loss(*leaves, labels, classes=CLASSES, reduction=reduction, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_gradient_flows_to_token_weight(impl, reduction):
    hidden, weight, labels = problem()
    token_weight = torch.ones(50, requires_grad=True)
    loss = tube_masked_loss(
        hidden, weight, labels, classes=CLASSES, reduction=reduction, token_weight=token_weight, impl=impl
    )
    loss.sum().backward()
    assert token_weight.grad is None
    assert hidden.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_mean_divides_by_the_number_of_targets_whatever_their_weights(impl):
    hidden, weight, labels = problem()
    options = {"token_weight": torch.full((50,), 0.5), "impl": impl}
    total = tube_masked_loss(hidden, weight, labels, classes=CLASSES, reduction="sum", **options)
    mean = tube_masked_loss(hidden, weight, labels, classes=CLASSES, reduction="mean", **options)
    assert_bitwise_equal(mean.detach(), total.detach() / targets(labels).sum())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_are_left_alone(impl, reduction):
    hidden, weight, labels = problem()
    before = hidden.detach().clone(), weight.detach().clone(), labels.clone()
    with_gradients(ours, hidden, weight, labels, reduction=reduction, z_loss_weight=0.1, impl=impl)
    for tensor, copy in zip((hidden, weight, labels), before, strict=True):
        assert_bitwise_equal(tensor.detach(), copy)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_output_element_is_written(impl, reduction):
    hidden, weight, labels = problem()
    expected = with_gradients(ours, hidden, weight, labels, reduction=reduction, impl=impl)
    with poisoned_allocations():
        poisoned = with_gradients(ours, hidden, weight, labels, reduction=reduction, impl=impl)
    for a, b in zip(poisoned, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fifty_runs_give_the_same_bits(impl, reduction):
    hidden, weight, labels = problem()
    first = with_gradients(ours, hidden, weight, labels, reduction=reduction, impl=impl)
    for _ in range(50):
        again = with_gradients(ours, hidden, weight, labels, reduction=reduction, impl=impl)
        for a, b in zip(again, first, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(impl, reduction, dtype):
    hidden, weight, labels = problem(dtype=dtype)
    expected = with_gradients(ours, hidden, weight, labels, reduction=reduction, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        result = with_gradients(ours, hidden, weight, labels, reduction=reduction, impl=impl)
    for a, b in zip(result, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(impl, reentrant):
    hidden, weight, labels = problem()
    *_, dhidden, dweight = with_gradients(ours, hidden, weight, labels, impl=impl)
    loss = checkpoint(
        lambda *leaves: tube_masked_loss(*leaves, labels, classes=CLASSES, impl=impl),
        hidden,
        weight,
        use_reentrant=reentrant,
    )
    loss.backward()
    assert_bitwise_equal(hidden.grad, dhidden)
    assert_bitwise_equal(weight.grad, dweight)


WEIGHTS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [(0, 40), (0, 41), (3, 41), (30, 41), (20, 33), (7, 8)], ids=str)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_whole_gradient_in_the_memory_of_the_sums(monkeypatch, weight_dtype, hidden_dtype, classes, width):
    """Wherever the class slice lies, and in blocks of any size: no row lands on sums that are still to be read."""
    hidden, weight = torch.empty(2, width, dtype=hidden_dtype), torch.empty(41, width, dtype=weight_dtype)
    if not weight_gradient.can_share(hidden, weight):
        assert weight_dtype == torch.float64 != hidden_dtype
        return
    values = torch.randn(classes[1] - classes[0], width, dtype=torch.promote_types(hidden_dtype, torch.float32))
    scale = torch.rand((), dtype=values.dtype)
    for floats in (1, 2 * width, 5 * width, 1000):
        monkeypatch.setattr(weight_gradient, "SCALED_FLOATS", floats)
        with poisoned_allocations():
            sums = weight_gradient.class_sums(hidden, weight, *classes, shared=True)
        assert (sums.shape, sums.dtype) == (values.shape, values.dtype)
        sums.copy_(values)
        memory = sums.untyped_storage().nbytes()
        assert memory <= max(weight.nbytes, sums.nbytes + (41 - classes[1]) * width * weight.itemsize) + 8
        expected = weight_gradient.whole_weight(values, scale, weight, *classes)
        assert_bitwise_equal(weight_gradient.whole_weight_in_place(sums, scale, weight, *classes), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("room", [False, True])
def test_opcheck(impl, need, ignored, room):
    hidden, weight, labels = (tensor.detach() for tensor in problem())
    hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    labels = torch.full_like(labels, -100) if ignored else labels
    rows = targets(labels).nonzero()[:, 0].int()
    ops = torch.ops.lumos_kernels
    for rows_, token_weight in ((None, None), (rows, torch.rand(50))):
        tail = (0.1, *CLASSES, *need, room, impl)
        opcheck(ops.tube_masked_loss.default, (hidden, weight, labels, rows_, token_weight, *tail))
        grads, lse = (torch.rand(1).expand(50), torch.rand(100)[::2]), torch.rand(50)
        tail = (*CLASSES, *need, room, impl)
        opcheck(ops.tube_masked_loss_backward.default, (*grads, hidden, weight, labels, rows_, lse, *tail))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [False, True])
def test_compiles_whole_and_takes_a_second_length(impl, reduction, rows):
    def function(hidden, weight, labels, rows):
        return tube_masked_loss(
            2 * hidden, weight, labels, classes=CLASSES, reduction=reduction, rows=rows, z_loss_weight=0.1, impl=impl
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(tokens):
        hidden, weight, labels = problem(tokens)
        indices = targets(labels).nonzero()[:, 0] if rows else None
        results = []
        for f in (compiled, function):
            loss = f(hidden, weight, labels, indices)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))))
        for a, b in zip(*results, strict=True):
            assert_bitwise_equal(a, b)

    check(50)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(71)


def good():
    return {
        "hidden": torch.zeros(6, 8),
        "weight": torch.zeros(80, 8),
        "labels": torch.full((6,), 40),
        "classes": CLASSES,
    }


BAD = {
    "hidden of three dimensions": ("hidden", {"hidden": torch.zeros(1, 6, 8)}),
    "hidden of integers": ("hidden", {"hidden": torch.zeros(6, 8).int()}),
    "weight of another width": ("weight", {"weight": torch.zeros(80, 9)}),
    "weight of integers": ("weight", {"weight": torch.zeros(80, 8).int()}),
    "weight elsewhere": ("weight", {"weight": torch.zeros(80, 8, device="meta")}),
    "labels of other tokens": ("labels", {"labels": torch.zeros(5, dtype=torch.int64)}),
    "labels of int32": ("labels", {"labels": torch.zeros(6, dtype=torch.int32)}),
    "labels elsewhere": ("labels", {"labels": torch.zeros(6, dtype=torch.int64, device="meta")}),
    "classes beyond weight": ("classes", {"classes": (30, 81)}),
    "classes below zero": ("classes", {"classes": (-1, 40)}),
    "no classes": ("classes", {"classes": (40, 40)}),
    "default classes": ("classes", {"classes": (65536, 129536)}),
    "unknown reduction": ("reduction", {"reduction": "average"}),
    "token_weight of other tokens": ("token_weight", {"token_weight": torch.zeros(5)}),
    "token_weight of integers": ("token_weight", {"token_weight": torch.zeros(6).int()}),
    "token_weight elsewhere": ("token_weight", {"token_weight": torch.zeros(6, device="meta")}),
    "rows of two dimensions": ("rows", {"rows": torch.zeros(6, 1).int()}),
    "rows as a mask": ("rows", {"rows": torch.ones(6, dtype=torch.bool)}),
    "rows elsewhere": ("rows", {"rows": torch.zeros(6, device="meta").int()}),
    "unknown implementation": ("impl='fastest'", {"impl": "fastest"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case):
    name, change = BAD[case]
    tube_masked_loss(**good(), impl="reference")
    with pytest.raises(ValueError, match=rf"(^|: ){name} "):
        tube_masked_loss(**(good() | change))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_ignored_rows_do_not_matter(reduction):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels = torch.tensor([12, -100, 19, 3, 10, -100])
    results = []
    for ignored in (1.0, torch.inf, torch.nan):
        token_weight = torch.where((labels >= 10) & (labels < 20), 0.5, ignored)
        loss = tube_masked_loss(
            hidden, weight, labels, classes=(10, 20), reduction=reduction, z_loss_weight=0.1, token_weight=token_weight
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)
