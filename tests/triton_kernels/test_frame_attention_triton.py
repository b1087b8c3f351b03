"""frame_attention's Triton kernels against the fp64 reference, with every way of loading tiles and both backwards.

conftest.py says where they run. Programs are few and tiles large: the interpreter's time goes by tiles.
"""

from __future__ import annotations

import pytest
import torch
from frame_attention_cases import (
    BF16,
    DECODING,
    FP16,
    FP32,
    INTERPRETED,
    LARGE,
    NAMES,
    SMALL,
    VIDEO,
    WINDOW_OF_FRAMES,
    as_on,
    assert_same_bits,
    causal,
    check,
    keyless,
    leaves_of,
    limits_kv,
    limits_of,
    run,
    run_fused,
    sliding,
    upstream_of,
)
from torch import Tensor

from lumos_kernels import Frame, Text
from lumos_kernels.frame_attention import triton as kernels
from lumos_kernels.frame_attention.contract import Inputs, Outputs
from lumos_kernels.testing import (
    assert_bitwise_equal,
    awkward_gradients,
)

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


CASES = [
    (VIDEO, (6, 2), 64, BF16, "sm_90", False),
    (VIDEO, (6, 2), 64, BF16, "sm_80", False),
    (VIDEO, (6, 2), 64, BF16, "sm_90", True),
    (VIDEO, (3, 1), 64, BF16, "sm_80", True),
    (VIDEO, (4, 1), 64, FP16, "sm_100", False),
    (VIDEO, (2, 2), 128, BF16, "sm_90", False),
    (VIDEO, (8, 1), 128, FP16, "sm_80", False),
    (VIDEO, (3, 1), 128, BF16, "sm_100", True),
    (VIDEO, (3, 3), 96, BF16, "sm_90", False),
    (VIDEO, (2, 1), 96, FP16, "sm_80", False),
    (VIDEO, (2, 1), 96, BF16, "sm_90", True),
    (VIDEO, (5, 5), 32, BF16, "sm_90", False),
    (VIDEO, (4, 2), 32, FP16, "sm_80", True),
    (VIDEO, (2, 1), 64, FP32, "sm_90", False),
    (VIDEO, (1, 1), 96, FP32, "sm_90", True),
    (WINDOW_OF_FRAMES, (4, 1), 64, BF16, "sm_90", False),
    (WINDOW_OF_FRAMES, (3, 1), 128, BF16, "sm_80", True),
    (DECODING, (8, 2), 64, BF16, "sm_90", False),
    (DECODING, (3, 1), 128, BF16, "sm_80", False),
    (DECODING, (2, 2), 96, FP16, "sm_90", True),
    (sliding(300, 50), (2, 1), 64, BF16, "sm_90", False),
    (sliding(300, 200), (2, 1), 64, FP16, "sm_90", True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[1:])))
def test_error_is_within_twice_the_eager_one(case, device):
    limits, heads, head_dim, dtype, arch, fused = case
    leaves = leaves_of(limits, heads, head_dim, dtype, device)
    with as_on(arch, fused):
        check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize(("arch", "fused"), [("sm_90", False), ("sm_80", True)])
@pytest.mark.parametrize("limits", [VIDEO, DECODING], ids=["video", "decoding"])
def test_gradients_flow_through_lse(limits, arch, fused, device):
    """fp32: the reference in bf16 rounds nothing but its results, which no bf16 kernel can match within twice."""
    leaves = leaves_of(limits, (2, 1), 32, FP32, device)
    with as_on(arch, fused):
        check(leaves, limits, upstream_of(leaves, lse=True))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_fused_backward_by_its_name(arch, dtype, device):
    """Groups of 1, 3 and 4 query heads, lengths that are no multiple of a tile, more keys than queries."""
    for limits, heads, head_dim in ((causal(150, 21), (3, 1), 64), (VIDEO, (2, 2), 32), (DECODING, (4, 1), 128)):
        leaves = leaves_of(limits, heads, head_dim, dtype, device)
        upstream = upstream_of(leaves)
        with as_on(arch):
            check(leaves, limits, upstream, run_fused(leaves, limits, upstream))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_fused_backward_over_rows_without_keys(arch, device):
    limits = keyless()
    leaves = leaves_of(limits, (4, 2), 64, FP32, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(arch):
        _, _, dq, dk, dv = check(leaves, limits, upstream, run_fused(leaves, limits, upstream))
    assert not dq[limits.kv_start == limits.kv_end].any()
    unseen = ~limits.dense_mask().any(0)
    assert not dk[unseen].any()
    assert not dv[unseen].any()
    none = limits_kv([0, 0], [0, 0], 0)
    leaves = leaves_of(none, device=device)
    gradients = kernels.backward_fused(Inputs(*leaves, none, 1.0), Outputs(leaves[0], leaves[0]), upstream)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]
    assert not any(g.any() for g in gradients)


def test_one_token(device):
    """o is v, whatever the scores, and the gradients of q and k are the rounding of dp - delta, which are equal sums.
    Eager code may get exact zeros there, so it is no yardstick.
    """
    leaves = leaves_of(causal(1), (8, 2), 64, BF16, device)
    upstream = upstream_of(leaves)
    q, do = leaves[0].double(), upstream[0].double()
    k, v = (x.double().repeat_interleave(4, 1) for x in leaves[1:])

    def rounding(a: Tensor, b: Tensor) -> Tensor:
        """Of an fp32 sum of 64 products in any order, at most 64 * 2^-23 of their magnitudes, times the scale."""
        return (a * b).abs().sum(-1, keepdim=True) * 2**-17 / 8

    for arch, fused in (("sm_90", False), ("sm_90", True), ("sm_80", False)):
        with as_on(arch, fused):
            o, lse, dq, dk, dv = (x.double() for x in run(leaves, causal(1), upstream))
        assert torch.equal(o, v)
        assert ((lse.T - (q * k).sum(-1) / 8).abs() <= rounding(q, k)[..., 0]).all()
        assert (dq.abs() <= rounding(do, v) * k.abs()).all()
        assert (dk.abs() <= (rounding(do, v) * q.abs()).view(1, 2, 4, 64).sum(2)).all()
        torch.testing.assert_close(dv, do.view(1, 2, 4, 64).sum(2), rtol=2**-8, atol=2**-16)


@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 127, 128, 129, 255, 257])
def test_lengths_around_the_tiles(tokens, device):
    limits = causal(tokens)
    # Many heads where there are few tokens: of few elements the rival's largest error is a matter of luck.
    leaves = leaves_of(limits, (8, 2) if tokens < 16 else (2, 1), 64, BF16, device)
    with as_on("sm_90" if tokens % 2 else "sm_80", fused=tokens % 4 == 3):
        check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize("cached", [1, 63, 64, 65, 127, 128, 129])
def test_keys_before_the_queries(cached, device):
    limits = causal(20, cached)
    leaves = leaves_of(limits, (2, 2), 64, BF16, device)
    with as_on("sm_80" if cached % 2 else "sm_90", fused=cached == 65):
        check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
@pytest.mark.parametrize("fused", [False, True])
def test_scales(scale, fused, device):
    leaves = leaves_of(SMALL, (1, 1), 32, FP16, device)
    with as_on(fused=fused):
        check(leaves, SMALL, upstream_of(leaves), scale=scale)


def test_large_scores(device):
    """Scores of several hundred: the softmax is all but one-hot, and must not overflow."""
    leaves = leaves_of(VIDEO, (1, 1), 64, BF16, device)
    leaves[0].mul_(25)
    leaves[1].mul_(4).add_(10)
    check(leaves, VIDEO, upstream_of(leaves))


@pytest.mark.parametrize(("arch", "fused"), [("sm_90", False), ("sm_90", True), ("sm_80", True)])
def test_a_ragged_last_tile_of_keys_reaches_nothing(arch, fused, device):
    """All scores are near -300: for the zeros read past the last key, exp2(0 - lse) is infinite."""
    limits = limits_kv([0] * 150, [70] * 150, 70)  # whole tiles of queries see every key
    leaves = leaves_of(limits, (1, 1), 32, BF16, device)
    leaves[0].mul_(0.1).add_(9)
    leaves[1].mul_(0.1).sub_(6)
    with as_on(arch, fused):
        check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize(("arch", "fused"), [("sm_90", False), ("sm_90", True), ("sm_80", False)])
def test_rows_without_keys_give_zero_and_minus_infinity_and_pass_no_gradient(arch, fused, device):
    limits = keyless()
    empty, unseen = limits.kv_start == limits.kv_end, ~limits.dense_mask().any(0)
    assert int(empty.sum()) == 48
    assert int(unseen.sum()) == 20 + 70 + 30
    leaves = leaves_of(limits, (2, 1), 64, FP16, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(arch, fused):
        o, lse, dq, dk, dv = run(leaves, limits, upstream)
    high = run([x.double() for x in leaves], limits, [u.double() for u in upstream], "reference")
    for a, hi in zip((o, lse, dq, dk, dv), high, strict=True):
        a, hi = (x.double().nan_to_num(neginf=0.0) for x in (a, hi))
        assert (a - hi).norm() < 2e-3 * hi.norm()
    assert (lse[:, empty] == -torch.inf).all()
    assert lse[:, ~empty].isfinite().all()
    assert not any(x.any() for x in (o[empty], dq[empty], dk[unseen], dv[unseen]))


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 6), (3, 0), (3, 6)])
def test_nothing_to_see(queries, keys, device):
    none = torch.zeros(queries, dtype=torch.int32)
    limits = limits_kv(none, none, keys)
    leaves = leaves_of(limits, device=device)
    o, lse, *gradients = run(leaves, limits, upstream_of(leaves, lse=True))
    assert not o.any()
    assert (lse == -torch.inf).all()
    assert not any(g.any() for g in gradients)


def perturbed(leaves, limits, kept, **where) -> None:
    """Rows that are not `kept` become huge, as queries and as keys: what the kept ones give keeps every bit, and no
    gradient of theirs reaches the others.
    """
    of_o, of_lse = upstream_of(leaves, lse=True)
    mask = kept.to(of_o.device)
    upstream = [of_o * mask[:, None, None], of_lse * mask]
    with as_on(**where):
        o, lse, *gradients = run(leaves, limits, upstream)
        for leaf in leaves:
            leaf[~mask] = 100 * leaf[~mask].sign()
        changed = run(leaves, limits, upstream)
    assert not any(gradient[~mask].any() for gradient in gradients)
    assert all(gradient[mask].any() for gradient in gradients)
    expected = [o[mask], lse[:, mask], *gradients]
    if not INTERPRETED and where["fused"]:  # on a GPU the fused dq adds in any order
        changed[2] = expected[2] = changed[2][:0]
    assert_same_bits([changed[0][mask], changed[1][:, mask], *changed[2:]], expected)


@pytest.mark.parametrize(("arch", "fused", "loads"), [("sm_90", False, "descriptors"), ("sm_80", True, "pointers")])
def test_future_frames_do_not_matter(arch, fused, loads, device):
    """A frame of 1,828 tokens. One leaked key of them moves an output by less than any honest tolerance; here it
    moves a bit.
    """
    limits = limits_of([Text(20), Frame(32, 56), Frame(4, 4)])
    leaves = leaves_of(limits, (1, 1), 32, BF16, device)
    kept = torch.arange(limits.num_queries) < 1848
    perturbed(leaves, limits, kept, arch=arch, fused=fused, config=LARGE[loads])


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_future_frames_of_4084_tokens_do_not_matter(fused, device):
    limits = limits_of([Text(20), Frame(48, 84), Frame(48, 84)])
    leaves = leaves_of(limits, (1, 1), 128, BF16, device)
    perturbed(leaves, limits, torch.arange(limits.num_queries) < 4104, arch="sm_90", fused=fused)


@pytest.mark.parametrize(("arch", "fused"), [("sm_90", False), ("sm_90", True), ("sm_80", False)])
@pytest.mark.parametrize("first", [31, 63, 64, 65, 128, 129])
def test_documents_do_not_touch_wherever_they_meet(arch, fused, first, device):
    """Around the edges of tiles: a bound that is off by one leaks a row, or masks one."""
    row = torch.arange(135)
    second = row >= first
    limits = limits_kv(first * second, torch.where(second, 135, first), 135)
    for kept in (second, ~second) if first % 2 else (second,):
        leaves = leaves_of(limits, (1, 1), 32, BF16, device)
        perturbed(leaves, limits, kept, arch=arch, fused=fused)


def test_a_nan_that_is_seen_shows(device):
    limits = limits_of([Text(20), Frame(4, 4)])
    leaves = leaves_of(limits, (1, 1), 32, BF16, device)
    leaves[1][25] = torch.nan
    o, lse, dq, _, _ = run(leaves, limits, upstream_of(leaves))
    assert o[20:].isnan().all()
    assert lse[:, 20:].isnan().all()
    assert dq[20:].isnan().all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_awkward_upstream_gradients(arch, device):
    leaves = leaves_of(SMALL, (2, 1), 32, BF16, device)
    of_o, of_lse = awkward_gradients(leaves[0].shape, BF16), awkward_gradients((2, SMALL.num_queries), FP32)
    with as_on(arch):
        for (kind, o), (_, lse) in zip(of_o, of_lse, strict=True):
            upstream = [o.to(device), lse.to(device)]
            dense = [u.clone(memory_format=torch.contiguous_format) for u in upstream]
            for name, a, b in zip(NAMES, run(leaves, SMALL, upstream), run(leaves, SMALL, dense), strict=True):
                assert_bitwise_equal(a, b, f"{name}, upstream {kind}")
