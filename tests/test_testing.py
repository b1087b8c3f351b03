"""The test tools themselves: each passes what is right and fails what it is there to catch."""

import pytest
import torch

from lumos_kernels import Frame, FrameLayout, Text, testing
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference


def low_precision_product():
    """a @ b in bf16, its fp64 value, and the largest error of the former."""
    a, b = torch.randn(16, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    low, high = a @ b, a.double() @ b.double()
    return low, high, (low.double() - high).abs().max()


def test_close_passes_the_eager_result_and_the_rounded_exact_one():
    low, high, _ = low_precision_product()
    assert_close_to_reference(low, low, high)
    assert_close_to_reference(high.bfloat16(), high.bfloat16(), high)


def test_close_allows_twice_the_eager_error_and_one_rounding_and_no_more():
    low, high, error = low_precision_product()
    rounding = torch.finfo(torch.float32).eps / 2 * high.abs()
    assert_close_to_reference((high + 1.99 * error).float(), low, high)
    with pytest.raises(AssertionError, match="out of tolerance"):
        assert_close_to_reference((high + 2.01 * error + rounding).float(), low, high)


def test_close_names_the_worst_element_and_both_errors():
    low, high, error = low_precision_product()
    wrong = low.clone()
    wrong[1, 5] += 1 + 100 * error
    wrong[3, 7] += 100 + 100 * error
    with pytest.raises(
        AssertionError, match=r"dq: 2 of 256 elements .* worst at \(3, 7\): .* error .* allowed .* eager"
    ):
        assert_close_to_reference(wrong, low, high, "dq")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_close_fails_on_nan_and_on_infinities_that_should_be_finite(wrong):
    low, high, _ = low_precision_product()
    actual = low.clone()
    actual[0, 0] = wrong
    with pytest.raises(AssertionError, match=r"worst at \(0, 0\)"):
        assert_close_to_reference(actual, low, high)


def test_close_fails_when_the_eager_result_is_nan():
    low, high, _ = low_precision_product()
    broken = low.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(AssertionError):
        assert_close_to_reference(low, broken, high)


@pytest.mark.parametrize("wrong", [0.0, torch.inf, torch.nan, -1e30])
def test_close_wants_the_infinities_of_the_reference(wrong):
    high = torch.ones(40, dtype=torch.float64)
    high[7] = -torch.inf
    assert_close_to_reference(high.float(), high.float(), high)
    actual = high.float()
    actual[7] = wrong
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_close_to_reference(actual, high.float(), high)


def test_few_elements_need_many_eager_results_of_which_the_farthest_counts():
    """A single eager result of few numbers may be exact by luck."""
    high = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
    lucky, farther = high.float(), (high + 1e-6).float()
    with pytest.raises(ValueError, match=r"lse has fewer than 32 elements: .* at least 8 eager results .* got 1"):
        assert_close_to_reference(lucky, lucky, high, "lse")
    draws = [lucky] * 7 + [farther]
    assert_close_to_reference((high + 1.9e-6).float(), draws, high)
    with pytest.raises(AssertionError, match="out of tolerance"):
        assert_close_to_reference((high + 2.4e-6).float(), draws, high)


def test_few_eager_results_that_are_all_exact_still_allow_roundings():
    high = torch.tensor([1.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert_close_to_reference((high + eps).float(), [high.float()] * 8, high)
    with pytest.raises(AssertionError, match="out of tolerance"):
        assert_close_to_reference((high + 2 * eps).float(), [high.float()] * 8, high)


def test_close_fails_on_another_shape_even_one_that_broadcasts():
    with pytest.raises(AssertionError, match="shapes"):
        assert_close_to_reference(torch.zeros(1), torch.zeros(1), torch.zeros(3, dtype=torch.float64))
    assert_close_to_reference(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_bitwise_passes_equal_and_fails_one_different_element(dtype):
    a = torch.arange(12).view(3, 4).to(dtype)
    assert_bitwise_equal(a, a.clone())
    assert_bitwise_equal(a, a.T.clone().T)
    other = a.clone()
    other[1, 2] = 0
    with pytest.raises(AssertionError, match=r"dk: 1 of 12 elements differ, first at \(1, 2\)"):
        assert_bitwise_equal(a, other, "dk")


def test_bitwise_tells_signed_zeros_and_last_bits_apart_and_equates_nan():
    one = torch.tensor(1.0)
    for different in ((torch.tensor(0.0), torch.tensor(-0.0)), (one, torch.nextafter(one, torch.tensor(2.0)))):
        with pytest.raises(AssertionError, match="1 of 1 elements differ"):
            assert_bitwise_equal(*different)
    assert_bitwise_equal(torch.tensor([torch.nan]), torch.tensor([torch.nan]))


def test_bitwise_fails_on_another_shape_or_dtype():
    with pytest.raises(AssertionError, match="float32"):
        assert_bitwise_equal(torch.zeros(2), torch.zeros(1, 2))
    with pytest.raises(AssertionError, match="float64"):
        assert_bitwise_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


class IgnoresStrides(torch.autograd.Function):
    """The identity, with the bug that awkward gradients exist for: backward reads the gradient's memory as if dense."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        flat = torch.empty(0, dtype=grad.dtype).set_(grad.untyped_storage())
        dense = flat[grad.storage_offset() : grad.storage_offset() + grad.numel()]
        return torch.nn.functional.pad(dense, (0, grad.numel() - dense.numel())).view(grad.shape)


@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 8)])
def test_every_awkward_gradient_catches_a_backward_that_ignores_strides(shape):
    caught = {}
    for name, grad in testing.awkward_gradients(shape, torch.float32):
        assert grad.shape == shape
        leaf = torch.zeros(shape, requires_grad=True)
        IgnoresStrides.apply(leaf).backward(grad)
        caught[name] = not torch.equal(leaf.grad, grad)
    assert not caught.pop("dense")
    assert len(caught) == 6
    assert all(caught.values()), caught


def test_awkward_gradients_repeat_and_follow_the_seed():
    draws = [[grad for _, grad in testing.awkward_gradients((4, 6), torch.float16, seed)] for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))
    assert {grad.dtype for grad in draws[0]} == {torch.float16}


def test_poison_fills_every_kind_of_empty_tensor_and_then_leaves():
    like = torch.zeros(3)
    allocations = {
        "empty": lambda: torch.empty(3),
        "empty_like": lambda: torch.empty_like(like),
        "new_empty": lambda: like.new_empty(3),
        "empty_strided": lambda: torch.empty_strided((3,), (1,)),
    }
    originals = torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.empty_strided
    with testing.poisoned_allocations():
        for name, allocate in allocations.items():
            assert allocate().isnan().all(), name
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        assert torch.empty(3, dtype=torch.bool).shape == (3,)
        assert torch.empty(0).shape == (0,)
    assert originals == (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.empty_strided)


def test_poison_shows_an_element_that_is_never_written():
    def forgets_the_last(x):
        out = torch.empty_like(x)
        out[:-1] = x[:-1]
        return out

    with testing.poisoned_allocations():
        assert forgets_the_last(torch.ones(4)).isnan().tolist() == [False, False, False, True]


def test_eager_attention_sees_what_the_limits_allow_and_nothing_else():
    layout = FrameLayout.from_segments([[Text(3), Frame(4, 4)], [Text(2)]])
    q, k = torch.randn(29, 4, 8), torch.randn(29, 2, 8)
    seen = testing.eager_attention(q, k, torch.eye(29)[:, None].expand(29, 2, 29)[..., :8], layout.limits)
    assert torch.equal(seen[:, 0] > 0, layout.dense_mask()[:, :8])


def test_eager_loss_is_the_mean_over_the_target_rows():
    hidden, weight = torch.randn(6, 8).double(), torch.randn(20, 8).double()
    labels = torch.tensor([-100, 4, 5, 17, 18, 11])  # the classes are 5 .. 17
    logits = hidden @ weight[5:18].T
    nll = logits.logsumexp(-1) - logits[torch.arange(6), (labels - 5).clamp(0, 12)]
    expected = nll[[2, 3, 5]].mean()
    assert torch.allclose(testing.eager_loss(hidden, weight, labels, (5, 18)), expected)
