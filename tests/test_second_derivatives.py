"""The ops have first derivatives alone. A second one is an error that names the op, and is never dropped silently."""

from __future__ import annotations

import pytest
import torch

from lumos_kernels import RowLimits, dispatch, frame_attention, mm_rope, tube_masked_loss
from lumos_kernels.dispatch import Problem
from lumos_kernels.testing import assert_bitwise_equal

T, HEADS, D = 12, 2, 32


def loss(hidden, weight, impl, **options):
    labels = torch.arange(T) % 7 + 3
    return tube_masked_loss(hidden, weight, labels, classes=(3, 20), impl=impl, **options)


def attention(q, k, v, impl, **options):
    ends = torch.arange(1, T + 1, dtype=torch.int32)
    return frame_attention(q, k, v, RowLimits.from_kv(torch.zeros_like(ends), ends, T), impl=impl, **options)


def rope(q, k, *norm, impl):
    positions = torch.arange(3 * T, dtype=torch.int32).view(3, T)
    q, k = mm_rope(q, k, positions, q_norm=norm[:2] or None, k_norm=norm[2:] or None, impl=impl)
    return q.sin().sum() + k.cos().sum()


HEAD = (T, HEADS, D)
# name -> op, function of the leaves, shapes of the leaves
CALLS = {
    "loss, mean": ("tube_masked_loss", loss, [(T, 8), (24, 8)]),
    "loss, sum": ("tube_masked_loss", lambda *a, **o: loss(*a, reduction="sum", **o), [(T, 8), (24, 8)]),
    "loss of rows": ("tube_masked_loss", lambda *a, **o: loss(*a, reduction="none", **o).sum(), [(T, 8), (24, 8)]),
    "attention": ("frame_attention", lambda *a, **o: attention(*a, **o).sum(), [HEAD] * 3),
    "attention, lse": ("frame_attention", lambda *a, **o: attention(*a, return_lse=True, **o)[1].sum(), [HEAD] * 3),
    "rope": ("mm_rope", rope, [HEAD] * 2),
    "rope with norms": ("mm_rope", rope, [HEAD, HEAD, *[(1, D)] * 4]),
}
OPS = dispatch.ops()
CASES = [
    (name, impl)
    for name, (op, _, _) in CALLS.items()
    for impl in OPS[op].implementations
    if impl in ("reference", "native") and OPS[op].refusal(impl, Problem("cpu", torch.float32, D)) is None
]


def made(name, impl):
    op, function, shapes = CALLS[name]
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    return op, leaves, function(*leaves, impl=impl)


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_a_second_derivative_is_an_error_that_names_the_op(name, impl):
    op, leaves, result = made(name, impl)
    gradients = torch.autograd.grad(result, leaves, create_graph=True, allow_unused=True)
    for gradient in (g for g in gradients if g is not None):
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=f"{op} has no second derivatives"):
            torch.autograd.grad(gradient.square().sum(), leaves, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_a_penalty_on_the_gradient_is_an_error(name, impl):
    """It reaches the op behind other code, and the loss itself has gradients beside it."""
    op, leaves, _ = made(name, impl)
    scale = torch.ones((), requires_grad=True)
    result = CALLS[name][1](leaves[0] * scale, *leaves[1:], impl=impl)
    (gradient,) = torch.autograd.grad(result, leaves[0], create_graph=True)
    for inputs in (leaves, [leaves[0]], [scale]):  # autograd.grad runs only what leads to its inputs
        with pytest.raises(RuntimeError, match=f"{op} has no second derivatives"):
            torch.autograd.grad(result + gradient.norm(), inputs, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=f"{op} has no second derivatives"):
        (result + gradient.norm()).backward()


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_create_graph_alone_changes_no_gradient(name, impl):
    _, leaves, result = made(name, impl)
    expected = torch.autograd.grad(result, leaves, retain_graph=True, allow_unused=True)
    recorded = torch.autograd.grad(result, leaves, retain_graph=True, create_graph=True, allow_unused=True)
    result.backward(create_graph=True)
    for leaf, a, b in zip(leaves, expected, recorded, strict=True):
        if a is None:
            assert b is None
            assert leaf.grad is None
        else:
            assert not a.requires_grad
            assert_bitwise_equal(b.detach(), a)
            assert_bitwise_equal(leaf.grad.detach(), a)


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_frozen_leaves_get_no_gradient_under_create_graph(name, impl):
    _, function, shapes = CALLS[name]
    leaves = [torch.randn(shape) for shape in shapes]
    leaves[0].requires_grad_()
    result = function(*leaves, impl=impl)
    result.backward(create_graph=True)
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


def second(function, leaves):
    gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    gradients[0].sum().backward()


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_compiled_code_has_the_gradients_and_no_second_ones_either(name, impl):
    torch._dynamo.reset()
    _, function, shapes = CALLS[name]
    compiled = torch.compile(lambda *a: function(*a, impl=impl), fullgraph=True, backend="aot_eager")
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    expected = torch.autograd.grad(function(*leaves, impl=impl), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):  # torch's own refusals
        second(compiled, leaves)
