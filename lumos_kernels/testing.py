"""Public tools that prove an implementation right. CONTRIBUTING.md, "How a kernel is proven", has the rules.

The tolerance is computed, not typed in. An implementation may be at most twice as far from the fp64 reference as the
same mathematics run eagerly in the same precision, plus one rounding of the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import RowLimits

DRAWS = 8  # the least number of eager results by which few elements are judged
FEW = 32  # elements whose largest error is a matter of luck


def assert_close_to_reference(
    actual: Tensor, low: Tensor | Sequence[Tensor], high: Tensor, name: str = "output"
) -> None:
    """Raise AssertionError unless |actual - high| <= 2 * max|low - high| + one rounding of the element.

    actual: the implementation's result. low: the result of the eager reference in the same dtype. high: the result of
    the fp64 reference on the same (rounded) inputs. All have one shape. Infinities must agree exactly and NaN must not
    occur.

    A result with fewer than FEW elements that are finite and not 0 needs several draws as `low`, at least DRAWS: eager
    results of one computation with its sums in several orders. A single one may be exact by luck, and the test would
    then fail on the next CPU. Of several draws the one that is farthest from `high` counts.
    """
    draws = [low] if isinstance(low, Tensor) else list(low)
    if not actual.shape == draws[0].shape == high.shape:
        raise AssertionError(
            f"{name}: shapes {list(actual.shape)}, {list(draws[0].shape)} and {list(high.shape)} differ"
        )
    if actual.numel() == 0:
        return
    if is_few(high) and len(draws) < DRAWS:
        raise ValueError(
            f"{name} has fewer than {FEW} elements: low must be at least {DRAWS} eager results with their sums in "
            f"several orders; got {len(draws)}"
        )
    finite = high.double().isfinite()
    if not torch.equal(actual.double().where(~finite, 0.0), high.double().where(~finite, 0.0)):
        raise AssertionError(f"{name}: infinities differ from the reference's")
    ours_error, eager_error, budget = errors_and_budget(
        actual, farthest(draws, high) if len(draws) > 1 else draws[0], high
    )
    excess = ours_error - budget
    if not (excess <= 0).all():  # a NaN fails too
        worst = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
        raise AssertionError(
            f"{name}: {int((~(excess <= 0)).sum())} of {actual.numel()} elements out of tolerance; worst at {index}: "
            f"{float(actual[index]):.9g} against {float(high[index]):.9g}, error {float(ours_error[index]):.3e}, "
            f"allowed {float(budget[index]):.3e}; largest eager error {float(eager_error):.3e}"
        )


def is_few(high: Tensor) -> bool:
    """Return whether a result has so few elements that the largest error among them is a matter of luck."""
    return 0 < int((high.isfinite() & (high != 0)).sum()) < FEW


def errors_and_budget(actual: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return |actual - high| and what it may be, element by element, and between them the largest |low - high|.

    Elements at which `high` is infinite count as equal. The arguments are those of assert_close_to_reference. Where the
    elements are few, the eager error is at least half a unit in the last place of the largest: an eager result that is
    nearer has been rounded by luck.
    """
    exact, ours, eager = high.double(), actual.double(), low.double()
    finite = exact.isfinite()
    ours_error = (ours - exact).where(finite, 0.0).abs()
    eager_error = (eager - exact).where(finite, 0.0).abs().max()
    eps = torch.finfo(actual.dtype).eps
    if is_few(high):
        eager_error = eager_error.clamp_min(eps / 2 * float(exact.where(finite, 0.0).abs().max()))
    return ours_error, eager_error, 2 * eager_error + eps / 2 * exact.where(finite, 0.0).abs()


def farthest(draws: Iterable[Tensor], high: Tensor) -> Tensor:
    """Return the draw that is farthest from `high`, to be the `low` of assert_close_to_reference.

    draws: the eager reference's results of one computation with its sums in several orders. The error of a single
        result with few independent elements is a matter of luck, and may be zero.
    """
    return max(draws, key=lambda draw: float((draw.double() - high.double()).nan_to_num().abs().max()))


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "output") -> None:
    """Raise AssertionError unless both tensors hold the same bits (NaN equals NaN, -0 differs from 0)."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{name}: {actual.dtype} {list(actual.shape)} against {expected.dtype} {list(expected.shape)}"
        )
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, b = (t.contiguous().view(integer) for t in (actual, expected))
    different = (a != b).nonzero()
    if len(different):
        index = tuple(different[0].tolist())
        raise AssertionError(
            f"{name}: {len(different)} of {actual.numel()} elements differ, first at {index}: "
            f"{float(actual[index])!r} against {float(expected[index])!r}"
        )


def awkward_gradients(
    shape: Sequence[int], dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Yield upstream gradients as autograd really delivers them: (name, tensor of `shape`) for each kind of stride.

    gradcheck and opcheck both pass a backward that ignores the strides of its gradient; these do not.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device=device, dtype=dtype)

    *outer, last = shape
    yield "dense", rand(*shape)
    yield "expanded from one element", rand(1).expand(*shape)
    yield "expanded over the first dimension", rand(1, *shape[1:]).expand(*shape)
    yield "expanded over the last dimension", rand(*outer, 1).expand(*shape)
    yield "slice of a concatenation", rand(*outer, 2 * last + 3)[..., last : 2 * last]
    yield "transposed", rand(*reversed(shape)).permute(*reversed(range(len(shape))))
    yield "every second row", rand(2 * shape[0], *shape[1:])[::2]


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN or the largest integer, so that unwritten elements show."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (torch, "empty_strided")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def eager_attention(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float | None = None) -> Tensor:
    """Return what a user would compute without this package: SDPA with the dense mask. Shapes as in frame_attention.

    It is the low-precision yardstick of the tests and a rival in the benchmarks. A row without keys gives 0.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=limits.dense_mask(), scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def eager_loss(hidden: Tensor, weight: Tensor, labels: Tensor, classes: tuple[int, int]) -> Tensor:
    """Return the official loss: full-vocabulary logits in fp32, then the target rows and visual columns, their mean.

    Shapes as in tube_masked_loss. fp64 inputs stay fp64.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first, last = classes
    targets = (labels >= first) & (labels < last)
    return F.cross_entropy(logits[targets][:, first:last], labels[targets] - first)
