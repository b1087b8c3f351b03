"""frame_attention of rows in any order, of rows without keys anywhere, and of limits outside of the keys.

A tile of rows in order has its bounds in its first and last row, and pairs inside of these bounds that do not see each
other are few. Here they are most. tests/triton_kernels/test_frame_attention_triton_order.py does the same to Triton.
"""

from __future__ import annotations

import pytest
import torch
from eager_draws import assert_attention_close
from row_orders import NAMES, ORDERS, anything, dense, leaves_of, outside, shuffled_windows, spread, with_gradients

from lumos_kernels import RowLimits, frame_attention, library
from lumos_kernels.testing import (
    assert_bitwise_equal,
    eager_attention,
    poisoned_allocations,
)

NATIVE = () if library.refusal() else (*library.isas(), *library.models())
IMPLS = ("reference", *(f"native {isa}" for isa in NATIVE))
DTYPES = (torch.bfloat16, torch.float32)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """An implementation; the native one in each instruction set."""
    name, _, isa = request.param.partition(" ")
    if isa:
        monkeypatch.setenv("LUMOS_CPU_ISA", isa)
    return name


def attend(*arguments, **options):
    return frame_attention(*arguments, return_lse=True, **options)


def upstream_of(leaves):
    q = leaves[0]
    return [torch.randn_like(q), torch.randn(q.shape[1], q.shape[0])]


def check(impl, leaves, limits, upstream, **options):
    """Against the dense softmax in fp64. The yardstick of the native one is the reference in the leaves' dtype."""
    if impl == "reference":
        leaves, upstream = [x.double() for x in leaves], [u.double() for u in upstream]
    actual = with_gradients(attend, leaves, limits, upstream, impl=impl, **options)
    high = with_gradients(dense, [x.double() for x in leaves], limits, [u.double() for u in upstream], **options)
    if impl == "reference":
        for name, a, hi in zip(NAMES, actual, high, strict=True):
            torch.testing.assert_close(a, hi, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        return actual

    def rival(leaves, upstream):
        return with_gradients(attend, leaves, limits, upstream, impl="reference", **options)

    assert_attention_close(actual, rival, high, leaves, upstream)
    return actual


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_come_in_any_order(impl, order, dtype):
    limits = ORDERS[order]()
    leaves = leaves_of(limits, (8, 2) if order == "few" else (4, 2), 64, dtype)
    check(impl, leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize("seed", range(6))
def test_random_ranges(impl, seed):
    limits = anything(230 + 37 * seed, 500 - 41 * seed, seed + 1)
    leaves = leaves_of(limits, (3, 3))
    check(impl, leaves, limits, upstream_of(leaves), scale=(-0.3, 0.2)[seed % 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shuffled_rows_give_the_shuffled_results(impl, dtype):
    """The rows of a video, out of order: the very attention of the video, with o and dq out of order."""
    row = torch.arange(333)
    video = RowLimits.from_kv(torch.zeros_like(row), (row // 60 + 1) * 60, 360)
    order = torch.randperm(333)
    shuffled = RowLimits.from_kv(video.kv_start[order], video.kv_end[order], 360)
    q, k, v = leaves_of(video, dtype=dtype)
    of_o, of_lse = upstream_of([q])
    o, lse, dq, dk, dv = with_gradients(attend, [q, k, v], video, [of_o, of_lse], impl=impl)
    actual = check(impl, [q[order], k, v], shuffled, [of_o[order], of_lse[:, order]])
    for name, a, b in zip(NAMES, actual, (o[order], lse[:, order], dq[order], dk, dv), strict=True):
        size = float(b.double().nan_to_num(neginf=0).abs().max())
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=0.02 * size, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("order", ["shuffled windows", "anything", "spread"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_row_does_not_see_changes_no_bit(impl, order, dtype):
    """Rows here and there, and large finite values in every key that none of them sees and in every other row."""
    limits = ORDERS[order]()
    kept = torch.rand(limits.num_queries) < 0.05
    watched = limits.dense_mask()[kept].any(0)
    assert 0 < int(watched.sum()) < len(watched)
    leaves = leaves_of(limits, dtype=dtype)
    of_o, of_lse = upstream_of(leaves)
    upstream = [of_o * kept[:, None, None], of_lse * kept]
    o, lse, dq, dk, dv = with_gradients(attend, leaves, limits, upstream, impl=impl)
    assert not any(x.any() for x in (dq[~kept], dk[~watched], dv[~watched]))
    for leaf, rows in zip(leaves, (~kept, ~watched, ~watched), strict=True):
        leaf[rows] = 100 * leaf[rows].sign()
    changed = with_gradients(attend, leaves, limits, upstream, impl=impl)
    if impl == "reference":  # its matmuls are the library's, whose bits are its own affair
        return
    same = [changed[0][kept], changed[1][:, kept], *changed[2:]]
    for name, a, b in zip(NAMES, same, [o[kept], lse[:, kept], dq, dk, dv], strict=True):
        assert_bitwise_equal(a, b, name)


def test_rows_that_see_nothing_give_zero_and_pass_no_gradient(impl):
    limits = anything()
    nothing = limits.kv_start >= limits.kv_end
    assert 0 < int(nothing.sum()) < len(nothing)
    assert (limits.kv_start > limits.kv_end).any()
    leaves = leaves_of(limits)
    o, lse, dq, *_ = with_gradients(attend, leaves, limits, upstream_of(leaves), impl=impl)
    assert not o[nothing].any()
    assert not dq[nothing].any()
    assert (lse[:, nothing] == -torch.inf).all()
    assert lse[:, ~nothing].isfinite().all()


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_nobody_sees_and_rows_without_keys_may_be_nan(isa, dtype, monkeypatch):
    """Also where keys that somebody sees lie on both sides of them. Only the C++ promises it."""
    monkeypatch.setenv("LUMOS_CPU_ISA", isa)
    impl = "native"
    for limits in (spread(), anything()):
        unseen, nothing = ~limits.dense_mask().any(0), limits.kv_start >= limits.kv_end
        leaves = leaves_of(limits, dtype=dtype)
        upstream = upstream_of(leaves)
        for tensor, rows in zip((*leaves, upstream[0]), (nothing, unseen, unseen, nothing), strict=True):
            tensor[rows] = 0
        expected = with_gradients(attend, leaves, limits, upstream, impl=impl)
        for tensor, rows in zip((*leaves, upstream[0]), (nothing, unseen, unseen, nothing), strict=True):
            tensor[rows] = torch.nan
        for name, a, b in zip(
            NAMES, with_gradients(attend, leaves, limits, upstream, impl=impl), expected, strict=True
        ):
            assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_outside_of_the_keys_mean_the_nearest_ones(impl, dtype):
    """Made by hand, with bounds of the queries that are wrong. The rows are right; nothing is read outside."""
    limits = outside()
    leaves = leaves_of(limits, dtype=dtype)
    check(impl, leaves, limits, upstream_of(leaves))
    start, end = (x.clamp(0, limits.num_keys) for x in (limits.kv_start, limits.kv_end))
    inside = RowLimits.from_kv(start, torch.maximum(start, end), limits.num_keys)
    upstream = upstream_of(leaves)
    with poisoned_allocations():
        actual = with_gradients(attend, leaves, limits, upstream, impl=impl)
    for name, a, b in zip(NAMES, actual, with_gradients(attend, leaves, inside, upstream, impl=impl), strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 6), (3, 0), (3, 6)])
@pytest.mark.parametrize("values", [(5, 10**6), (-5, 3), (-(10**6), -5), (-(2**31), 2**31 - 1), (2**31 - 1, -(2**31))])
def test_limits_outside_of_few_keys_or_none(impl, queries, keys, values):
    limits = RowLimits(*(torch.full((n,), value, dtype=torch.int32) for n in (queries, keys) for value in values))
    start, end = (x.clamp(0, keys) for x in (limits.kv_start, limits.kv_end))
    inside = RowLimits.from_kv(start, torch.maximum(start, end), keys)
    leaves = leaves_of(limits)
    upstream = upstream_of(leaves)
    o, lse, dq, dk, dv = actual = with_gradients(attend, leaves, limits, upstream, impl=impl)
    for name, a, b in zip(NAMES, actual, with_gradients(attend, leaves, inside, upstream, impl=impl), strict=True):
        assert_bitwise_equal(a, b, name)
    sees = bool(limits.dense_mask().any())  # all rows are the same
    assert bool(lse.isfinite().all()) == (sees or not queries)
    assert bool(o.any()) == bool(dv.any()) == (limits.visible_pairs() > 0) == sees
    assert all(x.isfinite().all() for x in (o, dq, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(impl, dtype):
    """Key tiles that skip tiles of queries wait for each other all the same."""
    limits = shuffled_windows(1000, 150)
    leaves = leaves_of(limits, dtype=dtype)
    upstream = upstream_of(leaves)
    expected = with_gradients(attend, leaves, limits, upstream, impl=impl)
    if impl == "reference":
        return
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, a, b in zip(
            NAMES, with_gradients(attend, leaves, limits, upstream, impl=impl), expected, strict=True
        ):
            assert_bitwise_equal(a, b, name)


@pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
@pytest.mark.parametrize("order", ["shuffled windows", "anything"])
def test_wrong_bounds_of_the_queries_change_no_native_result(order):
    """The C++ finds the queries of a key itself."""
    limits = ORDERS[order]()
    wrong = RowLimits(limits.kv_start, limits.kv_end, limits.q_end, limits.q_start)
    leaves = leaves_of(limits)
    upstream = upstream_of(leaves)
    for name, a, b in zip(
        NAMES,
        with_gradients(attend, leaves, wrong, upstream, impl="native"),
        with_gradients(attend, leaves, limits, upstream, impl="native"),
        strict=True,
    ):
        assert_bitwise_equal(a, b, name)


def test_the_eager_rival_takes_rows_without_keys_and_any_order():
    limits = anything(60, 80)
    leaves = [x.double() for x in leaves_of(limits)]
    o = eager_attention(*leaves, limits)
    torch.testing.assert_close(o, dense(*leaves, limits)[0])
    assert not o[limits.kv_start >= limits.kv_end].any()
