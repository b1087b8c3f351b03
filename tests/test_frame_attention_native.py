"""frame_attention in C++: every instruction set this CPU runs, and AMX on a model of its tiles, at their edges.

tests/test_frame_attention.py tests the same code, on the best instruction set, against the reference's precision.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from eager_draws import assert_attention_close
from torch import Tensor

from lumos_kernels import Frame, FrameLayout, RowLimits, Text, frame_attention, library
from lumos_kernels.frame_attention import native
from lumos_kernels.testing import (
    assert_bitwise_equal,
    assert_close_to_reference,
    awkward_gradients,
    eager_attention,
    poisoned_allocations,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUERY_TILE, KEY_TILE = 128, 384  # kQueryTile and the largest kKeyTile (192 in fp32, 256 in AMX)
NAMES = ("o", "lse", "dq", "dk", "dv")

pytestmark = [
    pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal())),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=[*library.isas(), *library.models()])
def isa(request, monkeypatch):
    monkeypatch.setenv("LUMOS_CPU_ISA", request.param)
    return request.param


def limits_of(*documents) -> RowLimits:
    return FrameLayout.from_segments(documents).limits


def causal(tokens: int, cached: int = 0) -> RowLimits:
    """Frames of 1, 2, 3 ... tokens after `cached` keys that everyone sees: limits that change all over every tile."""
    sizes = torch.arange(1, tokens + 2)
    frame = torch.repeat_interleave(sizes, sizes)[:tokens]
    ends = (sizes.cumsum(0)[frame - 1] if tokens else sizes[:0]).clamp_max(tokens) + cached
    return RowLimits.from_kv(torch.zeros_like(ends), ends, tokens + cached, check=True)


VIDEO = limits_of([Text(7), Frame(4, 8), Frame(8, 12), Text(2)], [Text(50), Frame(4, 4)])


def leaves_of(limits: RowLimits, heads=(2, 1), head_dim=32, dtype=torch.float32) -> list[Tensor]:
    sizes = (limits.num_queries, heads[0]), (limits.num_keys, heads[1]), (limits.num_keys, heads[1])
    return [torch.randn(*size, head_dim).to(dtype).requires_grad_() for size in sizes]


def run(leaves, limits, upstream, impl="native", **options) -> list[Tensor]:
    """o, lse, dq, dk, dv under a gradient of o, or of o and lse."""
    o, lse = frame_attention(*leaves, limits, return_lse=True, impl=impl, **options)
    gradients = torch.autograd.grad((o, lse)[: len(upstream)], leaves, upstream)
    return [o.detach(), lse.detach(), *gradients]


def upstream_of(leaves: list[Tensor], lse: bool = False) -> list[Tensor]:
    q = leaves[0]
    return [torch.randn_like(q), *([torch.randn(q.shape[1], q.shape[0])] if lse else [])]


def check(leaves, limits, upstream, **options) -> list[Tensor]:
    """Against fp64, with SDPA in the same dtype as the rival; lse and its gradient against the reference's."""
    actual = run(leaves, limits, upstream, **options)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    high = run(exact, limits, [u.double() for u in upstream], "reference", **options)
    has_keys = limits.num_queries and bool((limits.kv_end > limits.kv_start).all())

    def rival(leaves, upstream):
        low = run(leaves, limits, upstream, "reference", **options)
        if len(upstream) == 1 and has_keys:
            o = eager_attention(*leaves, limits, **options)
            low = [o.detach(), low[1], *torch.autograd.grad(o, leaves, upstream)]
        return low

    assert_attention_close(actual, rival, high, leaves, upstream)
    return actual


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_head_dims(isa, dtype, head_dim):
    leaves = leaves_of(VIDEO, (4, 2), head_dim, dtype)
    check(leaves, VIDEO, upstream_of(leaves))


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_heads_of_a_kv_head(isa, group, dtype):
    leaves = leaves_of(VIDEO, (3 * group, 3), 32, dtype)
    check(leaves, VIDEO, upstream_of(leaves, lse=True))


# Around the rows of a register block, a step (24 or 32), a block of keys (64, 128 or 256) and the tiles.
LENGTHS = (1, 2, 5, 6, 7, 24, 31, 32, 33, 48, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385, 513)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lengths_around_the_tiles(isa, tokens, dtype):
    limits = causal(tokens)
    # Many heads where there are few tokens: one head has few elements, and the rival's largest error is then luck.
    leaves = leaves_of(limits, (16, 2) if tokens < 16 else (3, 1), 64, dtype)
    check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize("cached", [1, 63, 64, 65, 191, 192, 200, 236, 256, 300])
def test_keys_before_the_queries(isa, cached):
    limits = causal(20, cached)
    leaves = leaves_of(limits, (2, 2), dtype=torch.bfloat16)
    check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize("window", [1, 50, 128, 300])
def test_sliding_windows(isa, window):
    """Both limits move with every row."""
    ends = torch.arange(1, 401)
    limits = RowLimits.from_kv((ends - window).clamp_min(0), ends, 400, check=True)
    leaves = leaves_of(limits, (2, 1), dtype=torch.bfloat16)
    check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales(isa, scale, dtype):
    leaves = leaves_of(VIDEO, dtype=dtype)
    check(leaves, VIDEO, upstream_of(leaves, lse=True), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_awkward_gradients(isa, dtype):
    leaves = leaves_of(VIDEO, (3, 1), dtype=dtype)
    for (_, of_o), (_, of_lse) in zip(
        awkward_gradients(leaves[0].shape, dtype), awkward_gradients((3, VIDEO.num_queries), torch.float32), strict=True
    ):
        check(leaves, VIDEO, [of_o, of_lse])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_fused_projection(isa, dtype):
    """q, k and v inside a wider buffer that holds NaN everywhere else; nothing is written to it."""
    dense = leaves_of(VIDEO, (4, 2), 32, dtype)
    fused = torch.full((2 * VIDEO.num_queries, 16, 48), torch.nan, dtype=dtype)
    slices = fused[::2, 1:9:2, 3:35], fused[::2, 10:12, 8:40], fused[1::2, 12:16:2, :32]
    for into, leaf in zip(slices, dense, strict=True):
        into.copy_(leaf.detach())
    before = fused.clone()
    strided = [x.detach().requires_grad_() for x in slices]
    upstream = upstream_of(dense, lse=True)
    assert_same_bits(run(strided, VIDEO, upstream), run(dense, VIDEO, upstream))
    assert_bitwise_equal(fused, before)


def test_limits_with_strides(isa):
    every_second = RowLimits(*(torch.stack([x, -x], 1)[:, 0] for x in vars(VIDEO).values()))
    leaves = leaves_of(VIDEO)
    upstream = upstream_of(leaves)
    assert_same_bits(run(leaves, every_second, upstream), run(leaves, VIDEO, upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (3, 1)], ids=str)
def test_threads_change_no_bit(isa, heads, dtype):
    """One kv head and at least three key tiles: threads wait for each other in every query tile."""
    limits = causal(2 * KEY_TILE + 5)
    leaves = leaves_of(limits, heads, dtype=dtype)
    upstream = upstream_of(leaves, lse=True)
    expected = run(leaves, limits, upstream)
    for threads in (2, 3, 3):
        torch.set_num_threads(threads)
        assert_same_bits(run(leaves, limits, upstream), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_what_nobody_sees_may_be_nan(isa, dtype, head_dim):
    """Keys without queries, in and after a tile, and queries without keys: bits as with zeros there."""
    starts = [0] * 40 + [60] * 3 + [70] * 60 + [200] * 30
    ends = [50] * 40 + [60] * 3 + [130] * 60 + [400] * 30
    limits = RowLimits.from_kv(torch.tensor(starts), torch.tensor(ends), 450, check=True)
    unseen, empty = limits.q_start >= limits.q_end, limits.kv_start == limits.kv_end
    assert int(unseen.sum()) == 20 + 70 + 50
    leaves = leaves_of(limits, (2, 1), head_dim, dtype)
    upstream = upstream_of(leaves)
    for tensor, rows in zip((*leaves, upstream[0]), (empty, unseen, unseen, empty), strict=True):
        tensor.data[rows] = 0
    expected = check(leaves, limits, upstream)
    for tensor, rows in zip((*leaves, upstream[0]), (empty, unseen, unseen, empty), strict=True):
        tensor.data[rows] = torch.nan
    actual = run(leaves, limits, upstream)
    assert_same_bits(actual, expected)
    o, lse, dq, dk, dv = actual
    assert (lse[:, empty] == -torch.inf).all()
    assert not any(x.any() for x in (o[empty], dq[empty], dk[unseen], dv[unseen]))


@pytest.mark.parametrize("place", [0, 15, 16, 31, 40, 70, 255, 256, 299])
@pytest.mark.parametrize(("of", "factor"), [("q", 60), ("k", 60), ("v", 2.0**100)])
def test_one_token_of_large_norm(isa, of, factor, place):
    """Exponents of 200, or values of 2^100: a reference fixed at 0 would overflow, or leave nothing of a sum."""
    limits = causal(300)
    leaves = leaves_of(limits, (8, 1), 64, torch.bfloat16)
    leaves["qkv".index(of)].data[place] *= factor
    check(leaves, limits, upstream_of(leaves, lse=of != "v"))


@pytest.mark.parametrize("channel", [0, 21, 42, 63])
@pytest.mark.parametrize(("of", "factor"), [("q", 1000), ("k", 1000), ("v", 2.0**100)])
def test_one_channel_of_large_norm(isa, of, factor, channel):
    limits = causal(60)
    leaves = leaves_of(limits, (2, 1), 64, torch.bfloat16)
    leaves["qkv".index(of)].data[..., channel] *= factor
    check(leaves, limits, upstream_of(leaves, lse=of != "v"))


@pytest.mark.parametrize("size", [100, 5000, 1e5])
def test_scores_whose_neighbours_in_fp32_are_units_apart(isa, size):
    """Exponents of 10^10: what rounding leaves of one is no fraction. Forward only: lse has no digits for backward."""
    limits = causal(300)
    leaves = [x.detach() for x in leaves_of(limits, (4, 2), 64, torch.bfloat16)]
    q, k, v = leaves[0] * size, leaves[1] * size, leaves[2]
    actual, low = (frame_attention(q, k, v, limits, return_lse=True, impl=impl) for impl in ("native", "reference"))
    high = frame_attention(q.double(), k.double(), v.double(), limits, return_lse=True, impl="reference")
    for name, a, lo, hi in zip(NAMES, actual, low, high, strict=False):
        assert_close_to_reference(a, lo, hi, name)


@pytest.mark.parametrize("place", [1, 3, 30, 39])
def test_a_query_that_is_nan_leaves_the_others(isa, place):
    """Among rows of small and of large norm, which it must not hide."""
    limits = causal(40)
    q, k, v = (leaf.detach() for leaf in leaves_of(limits, (2, 1), 64, torch.bfloat16))
    q[..., 0] = k[..., 0] = 8
    q[place - 1] *= 60
    others = torch.arange(40) != place
    expected = frame_attention(q, k, v, limits, return_lse=True, impl="native")
    q[place] = torch.nan
    o, lse = frame_attention(q, k, v, limits, return_lse=True, impl="native")
    assert_bitwise_equal(o[others], expected[0][others], "o")
    assert_bitwise_equal(lse[:, others], expected[1][:, others], "lse")
    assert o[place].isnan().all()
    assert lse[:, place].isnan().all()


@pytest.mark.parametrize("place", [0, 9, 32, 59])
def test_a_query_whose_square_overflows(isa, place):
    """In a channel where the keys are 0. The rows beside it have exponents near -290, all of them."""
    limits = causal(60)
    leaves = leaves_of(limits, (2, 1), 64, torch.bfloat16)
    q, k, _ = (leaf.data for leaf in leaves)
    q[..., 0], k[..., 0], k[..., 1] = 20, -80, 0
    q[place, :, 1] = 2.0**66
    check(leaves, limits, upstream_of(leaves))


@pytest.mark.parametrize("of", ["q", "k"])
def test_squares_that_vanish(isa, of):
    """bf16 products flush what is below 2^-126, such as squares of 2^-66, but at this scale exponents reach 200."""
    limits = causal(60)
    leaves = leaves_of(limits, (4, 1), 64, torch.bfloat16)
    leaves["qk".index(of)].data *= 2.0**-66
    check(leaves, limits, upstream_of(leaves), scale=2.0**70)


def test_large_values_at_large_scores(isa):
    """Exponents of 26 pass for a fixed reference of 0, but their p times values of 2^110 would overflow."""
    limits = causal(100)
    q, k, v = leaves_of(limits, (4, 1), 32, torch.bfloat16)
    for x in (q, k):
        x.data.mul_(0.05).add_(1.8)
    v.data *= 2.0**110
    check([q, k, v], limits, upstream_of([q]))


@pytest.mark.parametrize("sizes", [(1, 60, 1), (60, 1, 60), (60, 1, 1), (1, 1, 60)], ids=str)
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_references_that_change_on_the_way(isa, sizes, sign):
    """Blocks of keys of small and of large norm, in every order; with a sign all scores of a block are of that sign, so
    that a row whose first keys are all far below 0 has to forget them, or those far above are all that counts.
    """
    starts = torch.tensor([0] * 60 + [300] * 40)  # 40 rows do not see the first block
    limits = RowLimits.from_kv(starts, torch.full_like(starts, 700), 700, check=True)
    q, k, v = leaves_of(limits, (2, 1), 32, torch.bfloat16)
    if sign:
        q.data[..., 0], k.data[..., 0] = 4, sign * 4
    k.data *= torch.tensor(sizes).repeat_interleave(256)[:700, None, None]
    check([q, k, v], limits, upstream_of([q], lse=True))


@pytest.mark.parametrize("unseen", [3.0, 60.0, 1e4])
@pytest.mark.parametrize("which", ["queries", "keys", "values"])
def test_what_a_row_does_not_see_changes_no_bit_by_its_norm(isa, which, unseen):
    """Rows and keys of another document in the same blocks: scores are bounded by the norms of whole blocks."""
    row = torch.arange(200)
    second = row >= 100
    limits = RowLimits.from_kv(100 * second, torch.where(second, 200, 100), 200, check=True)
    leaves = leaves_of(limits, (2, 1), 64, torch.bfloat16)
    of_o, of_lse = upstream_of(leaves, lse=True)
    upstream = [of_o * ~second[:, None, None], of_lse * ~second]
    expected = run(leaves, limits, upstream)
    leaves[("queries", "keys", "values").index(which)].data[second] *= unseen if which != "values" else 2.0**80
    o, lse, *gradients = run(leaves, limits, upstream)
    assert_same_bits(
        [o[~second], lse[:, ~second], *gradients], [expected[0][~second], expected[1][:, ~second], *expected[2:]]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_nan_that_is_seen_shows(isa, dtype):
    limits = limits_of([Text(20), Frame(4, 4)])
    leaves = leaves_of(limits, dtype=dtype)
    leaves[1].data[25] = torch.nan
    o, lse, dq, _, _ = run(leaves, limits, upstream_of(leaves))
    assert o[20:].isnan().all()
    assert lse[:, 20:].isnan().all()
    assert dq[20:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("change", [1848, 3675], ids=["the second frame", "its last token"])
def test_future_frames_do_not_matter(isa, dtype, change):
    """1,828 tokens a frame. Large finite values in keys that come later leave every bit of the rows before."""
    limits = limits_of([Text(20), Frame(32, 56), Frame(32, 56)])
    touched = limits.kv_end > change
    assert 0 < int(touched.sum()) < len(touched)
    leaves = leaves_of(limits, (1, 1), dtype=dtype)
    of_o, of_lse = upstream_of(leaves, lse=True)
    upstream = [of_o * ~touched[:, None, None], of_lse * ~touched]
    o, lse, dq, dk, dv = run(leaves, limits, upstream)
    assert not any(x.any() for x in (dq[touched], dk[change:], dv[change:]))
    for leaf in leaves[1:]:
        leaf.data[change:] = 1e4 * leaf.data[change:].sign()
    changed = run(leaves, limits, upstream)
    assert_same_bits(
        [changed[0][~touched], changed[1][:, ~touched], *changed[2:]], [o[~touched], lse[:, ~touched], dq, dk, dv]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["before", "after"])
def test_documents_do_not_touch_wherever_they_meet(isa, dtype, side):
    """At every place inside the register blocks of a tile: what decides that a block needs no mask is off by one for
    one of them, and one leaked key is within every tolerance.
    """
    for first in (*range(130, 142), 127, 128, 159, 160, 255, 256):  # and the ends of key blocks and of tiles
        row = torch.arange(2 * QUERY_TILE + 9)
        second = row >= first
        limits = RowLimits.from_kv(first * second, torch.where(second, len(row), first), len(row), check=True)
        kept, other = (second, ~second) if side == "after" else (~second, second)
        leaves = leaves_of(limits, (1, 1), dtype=dtype)
        of_o, of_lse = upstream_of(leaves, lse=True)
        upstream = [of_o * kept[:, None, None], of_lse * kept]
        o, lse, *gradients = run(leaves, limits, upstream)
        assert not any(gradient[other].any() for gradient in gradients), first
        for leaf in leaves:
            leaf.data[other] = 1e2 * leaf.data[other].sign()
        changed = run(leaves, limits, upstream)
        same = [changed[0][kept], changed[1][:, kept], *changed[2:]]
        assert_same_bits(same, [o[kept], lse[:, kept], *gradients])


def test_every_element_is_written(isa):
    leaves = leaves_of(VIDEO, (2, 1), dtype=torch.bfloat16)
    upstream = upstream_of(leaves, lse=True)
    expected = run(leaves, VIDEO, upstream)
    with poisoned_allocations():
        assert_same_bits(run(leaves, VIDEO, upstream), expected)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 6), (3, 0), (3, 6)])
def test_nothing_to_see(isa, queries, keys):
    none = torch.zeros(queries, dtype=torch.int32)
    limits = RowLimits.from_kv(none, none, keys, check=True)
    leaves = leaves_of(limits)
    o, lse, *gradients = run(leaves, limits, upstream_of(leaves, lse=True))
    assert not o.any()
    assert (lse == -torch.inf).all()
    assert not any(g.any() for g in gradients)


def test_the_gradient_of_a_long_frame_keeps_its_precision(isa):
    """dk and dv of the first tokens are sums over all rows and the heads of the group."""
    limits = limits_of([Text(3), Frame(24, 28)])
    leaves = leaves_of(limits, (4, 1))
    check(leaves, limits, [torch.ones_like(leaves[0])])


def test_instruction_sets_are_those_of_the_cpu():
    flags = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_bf16": {"avx512f", "avx512_bf16"},
        "amx": {"avx512_bf16", "amx_tile", "amx_bf16"},
    }
    able = [name for name in ("amx", "avx512_bf16", "avx512", "avx2") if needs[name] <= flags]
    assert library.isas() == (*able, "base")
    assert library.isa() == library.isas()[0]  # a model is never chosen by itself
    assert library.models() == (("amx_model",) if "avx512_bf16" in able else ())


needs_model = pytest.mark.skipif(not library.models(), reason="this CPU has no AVX512_BF16, which the model needs")


@needs_model
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_the_check_before_amx_passes_what_is_right(head_dim):
    assert native.agree("avx512_bf16", head_dim)


@needs_model
@pytest.mark.parametrize("wrong", range(5), ids=NAMES)
def test_the_check_before_amx_refuses_what_is_wrong(monkeypatch, caplog, wrong):
    """One element of one result differs, and what runs instead of AMX is the next best."""
    trial = native._trial

    def defective(isa: str, head_dim: int) -> list[Tensor]:
        results = trial("amx_model", head_dim)
        if isa == "amx":
            results[wrong].view(-1)[results[wrong].abs().argmax()] *= 1.1
        return results

    native.agree.cache_clear()
    monkeypatch.setattr(native, "_trial", defective)
    monkeypatch.setattr(library, "isa", lambda: "amx")
    q = torch.empty(1, 1, 64, dtype=torch.bfloat16)
    assert native._isa(q) == library.isa_value("avx512_bf16")
    assert "frame_attention does not use amx: at head size 64" in caplog.text
    assert native._isa(q.float()) == library.isa_value("amx")  # computed without tiles
    monkeypatch.setenv("LUMOS_CPU_ISA", "amx")
    assert native._isa(q) == library.isa_value("amx")
    native.agree.cache_clear()
