"""frame_attention in Triton of rows in any order, of rows without keys anywhere, and of limits outside of the keys."""

from __future__ import annotations

import pytest
import torch
from frame_attention_cases import FP32, as_on, assert_same_bits, check, run, upstream_of
from row_orders import anything, falling, leaves_of, outside, shuffled_windows, spread

from lumos_kernels import RowLimits
from lumos_kernels.testing import assert_bitwise_equal

# Small ones, because the interpreter is slow.
ORDERS = {
    "shuffled windows": shuffled_windows(200, 60),
    "anything": anything(150, 200),
    "spread": spread(),
    "falling": falling(150),
}

BOTH = pytest.mark.parametrize("fused", [False, True], ids=["deterministic", "fused"])


def on(device, leaves):
    return [leaf.to(device) for leaf in leaves]


@pytest.mark.parametrize("order", ORDERS)
@BOTH
def test_rows_may_come_in_any_order(order, fused, device):
    limits = ORDERS[order]
    leaves = on(device, leaves_of(limits, (2, 1), 64, FP32))
    with as_on(fused=fused):
        check(leaves, limits, upstream_of(leaves, lse=True))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@BOTH
def test_rows_in_any_order_in_every_configuration(arch, fused, device):
    limits = anything(90, 100)
    leaves = on(device, leaves_of(limits, (2, 1), 64, torch.float16))
    with as_on(arch, fused=fused):
        check(leaves, limits, upstream_of(leaves, lse=True))


@pytest.mark.parametrize("order", ["shuffled windows", "spread"])
@BOTH
def test_what_a_row_does_not_see_changes_no_bit(order, fused, device):
    """Large finite values in every key that none of some rows sees, and in every other row."""
    limits = ORDERS[order]
    kept = (torch.rand(limits.num_queries) < 0.05).to(device)
    watched = limits.dense_mask().to(device)[kept].any(0)
    leaves = on(device, leaves_of(limits, (2, 1), dtype=torch.float16))
    of_o, of_lse = upstream_of(leaves, lse=True)
    upstream = [of_o * kept[:, None, None], of_lse * kept]
    with as_on(fused=fused):
        o, lse, dq, dk, dv = run(leaves, limits, upstream)
        assert not any(x.any() for x in (dq[~kept], dk[~watched], dv[~watched]))
        for leaf, rows in zip(leaves, (~kept, ~watched, ~watched), strict=True):
            leaf[rows] = 20 * leaf[rows].sign()
        changed = run(leaves, limits, upstream)
    same = [changed[0][kept], changed[1][:, kept], *changed[2:]]
    if fused and device != "cpu":  # its atomics add in any order
        same[2] = dq
    assert_same_bits(same, [o[kept], lse[:, kept], dq, dk, dv])


@BOTH
def test_limits_outside_of_the_keys_mean_the_nearest_ones(fused, device, guarded_allocations):
    """The bounds of the queries are right here. Those that are wrong give other gradients, and read nothing outside."""
    limits = outside()
    start, end = (x.clamp(0, limits.num_keys) for x in (limits.kv_start, limits.kv_end))
    inside = RowLimits.from_kv(start, torch.maximum(start, end), limits.num_keys)
    leaves = on(device, leaves_of(limits, (2, 1)))
    upstream = upstream_of(leaves, lse=True)
    expected = run(leaves, inside, upstream)
    with as_on(fused=fused):
        check(leaves, inside, upstream)
        q_start = torch.where(inside.q_start == 0, -(2**31), inside.q_start.long()).int()
        right = RowLimits(limits.kv_start, limits.kv_end, q_start, inside.q_end)
        actual = run(leaves, right, upstream)
        with guarded_allocations():
            o, lse, *gradients = run(leaves, limits, upstream)
    if not fused:
        assert_same_bits(actual, expected)
    assert_bitwise_equal(o, expected[0], "o")
    assert_bitwise_equal(lse, expected[1], "lse")
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("head_dim", [20, 80])
@BOTH
def test_other_head_sizes_are_padded(head_dim, fused, device):
    limits = anything(100, 90)
    leaves = on(device, leaves_of(limits, (4, 2), head_dim, torch.float16))
    with as_on(fused=fused):
        check(leaves, limits, upstream_of(leaves, lse=True))


def test_the_backward_op_takes_o_and_lse_of_any_strides(device):
    """Hooks on saved tensors may give back other strides. The kernels walk over lse as over a contiguous one."""
    limits = anything(90, 100).to(device)
    rows = limits.kv_start, limits.kv_end, limits.q_start, limits.q_end
    q, k, v = on(device, leaves_of(limits, (2, 1), 32, FP32))
    o, lse = torch.ops.lumos_kernels.frame_attention(q, k, v, *rows, 0.2, "triton")

    def gradients(o, lse):
        return torch.ops.lumos_kernels.frame_attention_backward(
            torch.ones_like(q), None, q, k, v, *rows, 0.2, o, lse, True, "triton"
        )

    turned = gradients(o.mT.contiguous().mT, lse.mT.contiguous().mT)
    for name, a, b in zip(("dq", "dk", "dv"), turned, gradients(o, lse), strict=True):
        assert_bitwise_equal(a, b, name)
