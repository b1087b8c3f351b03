"""frame_attention: every implementation against SDPA with the dense mask, and the contracts of its public function.

An implementation that runs CPU tensors joins by being registered in dispatch; Triton has a file of its own.
"""

import pytest
import torch
from eager_draws import attention_draws
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lumos_kernels import Frame, FrameLayout, RowLimits, Text, dispatch, frame_attention
from lumos_kernels.dispatch import Problem
from lumos_kernels.testing import (
    assert_bitwise_equal,
    assert_close_to_reference,
    awkward_gradients,
    eager_attention,
    is_few,
    poisoned_allocations,
)

OP = dispatch.ops()["frame_attention"]
LOW = (torch.bfloat16, torch.float16, torch.float32)


def runs(impl, dtype):
    return impl != "triton" and OP.refusal(impl, Problem("cpu", dtype, 64)) is None


IMPLS = [impl for impl in OP.implementations if runs(impl, torch.float32)]
# The fp32 reference is the eager rival of the others: it has none of its own and is tested in fp64.
FINEST = [(impl, torch.float64 if impl == "reference" else torch.float32) for impl in IMPLS]
CASES = [(impl, dtype) for impl, finest in FINEST for dtype in (*LOW[:2], finest) if runs(impl, dtype)]
EXACT = [impl for impl in IMPLS if runs(impl, torch.float64)]
NAMES = ("o", "lse", "dq", "dk", "dv")
HEADS = [(1, 1), (8, 1), (8, 2), (6, 3), (5, 5), (7, 1), (3, 3)]  # query and kv heads


def limits_of(*documents):
    return FrameLayout.from_segments(documents).limits


def limits_kv(kv_start, kv_end, keys):
    return RowLimits.from_kv(torch.tensor(kv_start), torch.tensor(kv_end), keys, check=True)


def decoding(tokens=10, prefix=70):
    """The tokens of a frame that see a cached prefix and all of themselves."""
    return limits_kv([0] * tokens, [prefix + tokens] * tokens, prefix + tokens)


def sliding_window(frames=5, tokens=24, window=2):
    """Frames of `tokens` tokens that see themselves and the `window - 1` frames before."""
    frame = torch.arange(frames * tokens) // tokens
    return RowLimits.from_kv((frame - window + 1).clamp_min(0) * tokens, (frame + 1) * tokens, frames * tokens, True)


def keyless():
    """Rows without keys at the start, between others and at the end, and keys that nobody sees."""
    starts, ends = [0, 0, 2, 5, 5, 9, 9, 14], [0, 3, 5, 5, 9, 14, 14, 14]
    return limits_kv(starts, ends, 17)


VIDEO = limits_of([Text(12), Frame(4, 8), Frame(4, 8), Frame(4, 8), Text(2)])
LIMITS = {
    "one token": limits_of([Text(1)]),
    "text": limits_of([Text(37)]),
    "one frame": limits_of([Frame(4, 4)]),
    "video": VIDEO,
    "documents": limits_of([Text(5), Frame(4, 4)], [], [Text(9)], [Frame(8, 4), Text(1), Frame(4, 8)], [Text(1)]),
    "padded batch": FrameLayout.from_tokens(torch.tensor([[5] * 30, [5] * 9 + [0] * 21])).limits,
    "decoding": decoding(),
    "sliding window": sliding_window(),
    "keyless rows": keyless(),
    "no query sees a key": limits_kv([0, 0, 4], [0, 0, 4], 4),
    "no keys": limits_kv([0, 0], [0, 0], 0),
    "no queries": RowLimits.from_kv(torch.empty(0).int(), torch.empty(0).int(), 6),
    "nothing": RowLimits.from_kv(torch.empty(0).int(), torch.empty(0).int(), 0),
}


def oracle(q, k, v, limits, scale=None):
    """o and lse in the inputs' precision: the rows that see a key through an explicit softmax over the dense mask."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = scores.masked_fill(~limits.dense_mask(), -torch.inf)
    seeing = limits.kv_end > limits.kv_start
    nothing = 0 * (q.sum() + k.sum() + v.sum())  # gradients of zero where no row sees a key
    o, lse = torch.zeros_like(q) + nothing, scores.new_full(scores.shape[:2], -torch.inf) + nothing
    if seeing.any():
        o = o.index_put((seeing,), torch.einsum("hij,jhd->ihd", scores[:, seeing].softmax(-1), v))
        lse = lse.index_put((torch.arange(len(lse))[:, None], seeing.nonzero()[:, 0]), scores[:, seeing].logsumexp(-1))
    return o, lse


def problem(limits, heads=(4, 2), head_dim=32, dtype=torch.float32):
    sizes = (limits.num_queries, heads[0]), (limits.num_keys, heads[1]), (limits.num_keys, heads[1])
    return [torch.randn(*size, head_dim).to(dtype).requires_grad_() for size in sizes]


def with_gradients(function, leaves, limits, upstream, **options):
    """Outputs, then the gradients of q, k, v, under a gradient of o, or of o and lse."""
    options = options if function is oracle else {"return_lse": True} | options
    o, lse = function(*leaves, limits, **options)
    outputs = (o, lse)[: len(upstream)]
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
    return [o.detach(), lse.detach(), *gradients]


def copies(leaves, dtype):
    return [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


def yardstick(impl):
    """The eager low-precision rival: for the reference the oracle, for everything else the reference."""
    return (oracle, {}) if impl == "reference" else (frame_attention, {"impl": "reference"})


def assert_as_close_as_eager(impl, leaves, limits, upstream, eager=None, **options):
    """eager: the precision of the eager yardstick, by default that of the leaves."""
    actual = with_gradients(frame_attention, leaves, limits, upstream, impl=impl, **options)
    upstream64 = [u.double() for u in upstream]
    high = with_gradients(oracle, copies(leaves, torch.float64), limits, upstream64, **options)
    if leaves[0].dtype == torch.float64:
        assert_equal_to_rounding(actual, high)
        return
    rival, extra = yardstick(impl)
    if eager is not None:
        leaves, upstream = copies(leaves, eager), [u.to(eager) if u.dtype == leaves[0].dtype else u for u in upstream]

    def low(leaves, upstream):
        return with_gradients(rival, leaves, limits, upstream, **extra, **options)

    draws = [low(leaves, upstream)]
    if any(map(is_few, high)):
        draws += attention_draws(low, leaves, upstream)
    for name, a, hi, *lows in zip(NAMES, actual, high, *draws, strict=True):
        assert_close_to_reference(a, [lo.to(a.dtype) for lo in lows], hi, name)


def assert_equal_to_rounding(actual, expected):
    """Equal but for what sums of a few hundred fp64 terms in another order may differ by."""
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        atol = 1000 * torch.finfo(torch.float64).eps * max([1.0, *b[b.isfinite()].abs().tolist()])
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def random_upstream(leaves, limits, lse=False):
    dtype = torch.promote_types(leaves[0].dtype, torch.float32)
    of_lse = [torch.randn(leaves[0].shape[1], limits.num_queries, dtype=dtype)] if lse else []
    return [torch.randn_like(leaves[0]), *of_lse]


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("name", ["text", "video", "documents", "decoding", "sliding window"])
def test_fp64_equals_scaled_dot_product_attention(impl, name):
    limits = LIMITS[name]
    leaves = problem(limits, (8, 2), dtype=torch.float64)
    ours, theirs = frame_attention(*leaves, limits, impl=impl), eager_attention(*leaves, limits)
    upstream = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(o, leaves, upstream) for o in (ours, theirs))
    lse = torch.empty(0, dtype=torch.float64)  # SDPA has none to offer
    assert_equal_to_rounding(*((o, lse, *grads) for o, grads in zip((ours, theirs), gradients, strict=True)))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_keys_give_zero_and_minus_infinity_and_pass_no_gradient(impl):
    limits = keyless()
    empty = limits.kv_start == limits.kv_end
    unseen = ~limits.dense_mask().any(0)
    assert int(empty.sum()) == 3
    assert int(unseen.sum()) == 3
    leaves = problem(limits)
    upstream = random_upstream(leaves, limits, lse=True)
    o, lse, dq, dk, dv = with_gradients(frame_attention, leaves, limits, upstream, impl=impl)
    assert not o[empty].any()
    assert (lse[:, empty] == -torch.inf).all()
    for zero in (dq[empty], dk[unseen], dv[unseen]):
        assert not zero.any()
    assert all(x.isfinite().all() for x in (o, dq, dk, dv))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("name", LIMITS)
def test_error_is_within_twice_the_eager_one(impl, dtype, name):
    leaves = problem(LIMITS[name], dtype=dtype)
    assert_as_close_as_eager(impl, leaves, LIMITS[name], random_upstream(leaves, LIMITS[name], lse=True))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_head_dims(impl, dtype, head_dim):
    leaves = problem(VIDEO, head_dim=head_dim, dtype=dtype)
    assert_as_close_as_eager(impl, leaves, VIDEO, random_upstream(leaves, VIDEO))


@pytest.mark.parametrize(("impl", "dtype"), FINEST)
@pytest.mark.parametrize("heads", HEADS)
def test_head_counts(impl, dtype, heads):
    leaves = problem(VIDEO, heads, dtype=dtype)
    assert_as_close_as_eager(impl, leaves, VIDEO, random_upstream(leaves, VIDEO))


@pytest.mark.parametrize(("impl", "dtype"), FINEST)
@pytest.mark.parametrize("tokens", [15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1025])
def test_lengths_around_tile_multiples(impl, dtype, tokens):
    limits = limits_of([Text(tokens // 3), Frame(4, 4), Text(tokens)])
    limits = RowLimits.from_kv(limits.kv_start[:tokens], limits.kv_end[:tokens].clamp_max(tokens), tokens, check=True)
    leaves = problem(limits, heads=(1, 1), dtype=dtype)
    assert_as_close_as_eager(impl, leaves, limits, random_upstream(leaves, limits))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_extreme_values_and_scale(impl, dtype):
    leaves = problem(VIDEO, dtype=dtype)
    with torch.no_grad():
        leaves[0].mul_(5)
        leaves[1].mul_(3)
    assert_as_close_as_eager(impl, leaves, VIDEO, random_upstream(leaves, VIDEO))
    assert_as_close_as_eager(impl, problem(VIDEO, dtype=dtype), VIDEO, random_upstream(leaves, VIDEO), scale=0.37)


grids = st.builds(Frame, st.sampled_from([4, 8]), st.sampled_from([4, 8]))
segments = st.one_of(st.builds(Text, st.integers(0, 9)), grids)


@pytest.mark.parametrize(("impl", "dtype"), FINEST)
@given(
    st.lists(st.lists(segments, max_size=3), min_size=1, max_size=2),
    st.sampled_from(HEADS),
    st.sampled_from([32, 64, 96]),
    st.permutations(range(3)),
    st.integers(0, 60),
)
@settings(max_examples=12, deadline=None)
def test_any_documents_heads_strides_and_suffixes(impl, dtype, documents, heads, head_dim, order, cached):
    """The first `cached` tokens of the stream are keys alone, as in decoding.

    This is about structure: a wrong key among some hundred moves an output by far more than the eager error in fp16,
    which is the yardstick here. That of fp32, a few units in the last place, is luck in tensors this small.
    """
    torch.manual_seed(0)
    limits = limits_of(*documents)
    limits = RowLimits.from_kv(limits.kv_start[cached:], limits.kv_end[cached:], limits.num_keys, check=True)
    inverse = [order.index(axis) for axis in range(3)]
    leaves = problem(limits, heads, head_dim, dtype)
    leaves = [leaf.detach().permute(order).contiguous().permute(inverse).requires_grad_() for leaf in leaves]
    assert_as_close_as_eager(impl, leaves, limits, random_upstream(leaves, limits, lse=True), eager=torch.float16)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("heads", [(4, 2), (1, 1), (3, 1)])
def test_gradcheck_of_output_and_lse(impl, heads):
    limits = limits_kv([0, 0, 0, 2, 2], [1, 3, 3, 5, 6], 6)
    leaves = problem(limits, heads, head_dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *qkv: frame_attention(*qkv, limits, scale=0.7, return_lse=True, impl=impl), leaves
    )


@pytest.mark.parametrize("impl", EXACT)
def test_gradcheck_beside_rows_without_keys(impl):
    limits = limits_kv([0, 0, 1, 3], [0, 3, 3, 3], 4)
    seeing = torch.tensor([1, 2])
    leaves = problem(limits, (2, 1), head_dim=3, dtype=torch.float64)

    def function(*qkv):
        o, lse = frame_attention(*qkv, limits, return_lse=True, impl=impl)
        return o, lse[:, seeing]

    assert torch.autograd.gradcheck(function, leaves)


def assert_unseen_keys_do_not_matter(impl, limits, change, heads=(2, 1), dtype=torch.float32):
    """`change` is a slice of keys: the rows that see none of it keep every bit and send no gradient into it."""
    touched = limits.dense_mask()[:, change].any(1)
    assert touched.any()
    assert not touched.all()
    leaves = problem(limits, heads, dtype=dtype)
    upstream = random_upstream(leaves, limits, lse=True)
    upstream = [upstream[0] * ~touched[:, None, None], upstream[1] * ~touched]
    o, lse, *gradients = with_gradients(frame_attention, leaves, limits, upstream, impl=impl)
    changed = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    for leaf in changed[1:]:
        leaf.data[change] = 1e4 * torch.randn_like(leaf.data[change]).sign()
    changed[0].data[touched] = 1e4
    o_changed, lse_changed, *gradients_changed = with_gradients(frame_attention, changed, limits, upstream, impl=impl)
    assert_bitwise_equal(o_changed[~touched], o[~touched], "o")
    assert_bitwise_equal(lse_changed[:, ~touched], lse[:, ~touched], "lse")
    for name, a, b in zip(("dq", "dk", "dv"), gradients_changed, gradients, strict=True):
        assert_bitwise_equal(a, b, name)
    assert not gradients[0][touched].any()
    for gradient in gradients[1:]:
        assert not gradient[change].any()
        assert gradient.any()


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("text", slice(20, 37)),
        ("video", slice(52, 92)),  # the second frame, seen by itself and all that follows
        ("video", slice(91, 92)),  # its end token alone
        ("documents", slice(0, 29)),
        ("documents", slice(38, 120)),
        ("padded batch", slice(39, 60)),
        ("sliding window", slice(0, 24)),
        ("keyless rows", slice(9, 14)),
    ],
)
def test_future_frames_and_other_documents_do_not_matter(impl, dtype, name, change):
    assert_unseen_keys_do_not_matter(impl, LIMITS[name], change, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grid", [(32, 56), pytest.param((48, 84), marks=pytest.mark.slow)])
def test_future_frames_do_not_matter_at_published_sizes(impl, grid):
    """One leaked key of 1,828 moves an output by less than any honest tolerance; here it moves a bit."""
    limits = limits_of([Text(20), Frame(*grid), Frame(*grid), Text(3)])
    assert_unseen_keys_do_not_matter(impl, limits, slice(20 + Frame(*grid).length, limits.num_keys), heads=(1, 1))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_awkward_gradients(impl, dtype):
    limits = LIMITS["documents"]
    leaves = problem(limits, (3, 1), dtype=dtype)
    for _, grad in awkward_gradients(leaves[0].shape, dtype):
        assert_as_close_as_eager(impl, leaves, limits, [grad])


@pytest.mark.parametrize(("impl", "dtype"), FINEST)
def test_awkward_gradients_of_lse(impl, dtype):
    leaves = problem(VIDEO, (3, 1), dtype=dtype)
    for _, grad in awkward_gradients((3, VIDEO.num_queries), dtype):
        assert_as_close_as_eager(impl, leaves, VIDEO, [torch.randn_like(leaves[0]), grad])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_lse_alone(impl):
    leaves = problem(VIDEO)
    upstream = random_upstream(leaves, VIDEO, lse=True)
    _, lse = frame_attention(*leaves, VIDEO, return_lse=True, impl=impl)
    alone = torch.autograd.grad(lse, leaves, upstream[1], allow_unused=True, materialize_grads=True)
    both = with_gradients(frame_attention, leaves, VIDEO, [torch.zeros_like(upstream[0]), upstream[1]], impl=impl)[2:]
    for a, b in zip(alone, both, strict=True):
        assert torch.equal(a, b)
    assert not alone[2].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_two_backward_passes_give_the_same_gradients(impl):
    leaves = problem(VIDEO)
    o, upstream = frame_attention(*leaves, VIDEO, deterministic=True, impl=impl), random_upstream(leaves, VIDEO)
    first = torch.autograd.grad(o, leaves, upstream, retain_graph=True)
    for a, b in zip(torch.autograd.grad(o, leaves, upstream), first, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(("impl", "dtype"), [case for case in CASES if case[1] != torch.float64])
def test_gradients_accumulated_over_8_steps(impl, dtype):
    """k and v stay, as the keys of a shared prompt do, and collect the gradients of eight sets of queries."""
    rival, options = yardstick(impl)
    first = problem(VIDEO, dtype=dtype)
    queries = [torch.randn_like(first[0]) for _ in range(8)]
    upstreams = [torch.randn_like(first[0]) for _ in range(8)]

    def accumulate(function, dtype, **options):
        k, v = copies(first[1:], dtype)
        for q, upstream in zip(queries, upstreams, strict=True):
            o = function(q.to(dtype), k, v, VIDEO, **options)
            (o[0] if function is oracle else o).backward(upstream.to(dtype))
        return k.grad, v.grad

    results = accumulate(frame_attention, dtype, impl=impl), accumulate(rival, dtype, **options)
    for name, a, lo, hi in zip(("dk", "dv"), *results, accumulate(oracle, torch.float64), strict=True):
        assert_close_to_reference(a, lo, hi, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(impl, frozen):
    leaves = problem(VIDEO)
    upstream = random_upstream(leaves, VIDEO)
    every = with_gradients(frame_attention, leaves, VIDEO, upstream, impl=impl, deterministic=True)[2:]
    for index in frozen:
        leaves[index].requires_grad_(False)
    frame_attention(*leaves, VIDEO, deterministic=True, impl=impl).backward(*upstream)
    for index, leaf in enumerate(leaves):
        if index in frozen:
            assert leaf.grad is None
        else:
            assert_bitwise_equal(leaf.grad, every[index])


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_any_strides(impl, dtype, order):
    leaves = problem(VIDEO, (6, 2), dtype=dtype)
    inverse = [order.index(axis) for axis in range(3)]
    strided = [leaf.detach().permute(order).contiguous().permute(inverse).requires_grad_() for leaf in leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    assert_as_close_as_eager(impl, strided, VIDEO, random_upstream(leaves, VIDEO))
    assert frame_attention(*strided, VIDEO, impl=impl).is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_slices_of_a_fused_projection(impl):
    """q, k and v as slices of one [T, (Hq + 2 Hkv) D] tensor, whose gradient collects theirs."""
    fused = torch.randn(VIDEO.num_queries, (4 + 2 + 2) * 32, requires_grad=True)
    q, k, v = (x.unflatten(-1, (-1, 32)) for x in fused.split([128, 64, 64], dim=-1))
    leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    upstream = random_upstream(leaves, VIDEO)
    o, _, *gradients = with_gradients(frame_attention, leaves, VIDEO, upstream, impl=impl)
    ours = frame_attention(q, k, v, VIDEO, impl=impl)
    torch.testing.assert_close(ours, o)
    (gradient,) = torch.autograd.grad(ours, fused, upstream)
    torch.testing.assert_close(gradient, torch.cat([g.flatten(1) for g in gradients], -1))


@pytest.mark.parametrize(("impl", "dtype"), [case for case in CASES if case[1] != torch.float64])
def test_a_prefix_computed_in_two_calls_equals_one(impl, dtype):
    """Cached decoding: the last frame alone against all keys gives the rows that the whole sequence gives."""
    limits = limits_of([Text(12), Frame(4, 8), Frame(4, 8)])
    leaves = [leaf.detach() for leaf in problem(limits, dtype=dtype)]
    q, k, v = leaves
    last = slice(52, 92)
    cut = RowLimits.from_kv(limits.kv_start[last], limits.kv_end[last], 92, check=True)
    ours = frame_attention(q[last], k, v, cut, impl=impl)
    low, high = eager_attention(*leaves, limits)[last], eager_attention(*(x.double() for x in leaves), limits)[last]
    assert_close_to_reference(ours, low, high)


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_alone(impl):
    leaves = problem(VIDEO)
    before = [leaf.detach().clone() for leaf in leaves]
    with_gradients(frame_attention, leaves, VIDEO, random_upstream(leaves, VIDEO, lse=True), impl=impl)
    for leaf, copy in zip(leaves, before, strict=True):
        assert_bitwise_equal(leaf.detach(), copy)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["video", "documents", "decoding", "keyless rows", "no query sees a key"])
def test_every_output_element_is_written(impl, name):
    limits = LIMITS[name]
    leaves = problem(limits)
    upstream = random_upstream(leaves, limits, lse=True)
    expected = with_gradients(frame_attention, leaves, limits, upstream, impl=impl, deterministic=True)
    with poisoned_allocations():
        poisoned = with_gradients(frame_attention, leaves, limits, upstream, impl=impl, deterministic=True)
    for a, b in zip(poisoned, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_fifty_deterministic_runs_give_the_same_bits(impl):
    leaves = problem(VIDEO)
    upstream = random_upstream(leaves, VIDEO, lse=True)
    first = with_gradients(frame_attention, leaves, VIDEO, upstream, impl=impl, deterministic=True)
    for _ in range(50):
        again = with_gradients(frame_attention, leaves, VIDEO, upstream, impl=impl, deterministic=True)
        for a, b in zip(again, first, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(impl, dtype):
    leaves = problem(VIDEO, dtype=dtype)
    upstream = random_upstream(leaves, VIDEO, lse=True)
    expected = with_gradients(frame_attention, leaves, VIDEO, upstream, impl=impl, deterministic=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(frame_attention, leaves, VIDEO, upstream, impl=impl, deterministic=True)
    for a, b in zip(ours, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(impl, reentrant):
    leaves = problem(VIDEO)
    upstream = random_upstream(leaves, VIDEO)
    expected = with_gradients(frame_attention, leaves, VIDEO, upstream, impl=impl, deterministic=True)[2:]
    o = checkpoint(
        lambda *qkv: frame_attention(*qkv, VIDEO, deterministic=True, impl=impl), *leaves, use_reentrant=reentrant
    )
    o.backward(*upstream)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert_bitwise_equal(leaf.grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    limits = keyless()
    q, k, v = (leaf.detach() for leaf in problem(limits))
    q, v = q.transpose(0, 1).contiguous().transpose(0, 1), v.transpose(1, 2).contiguous().transpose(1, 2)
    rows = limits.kv_start, limits.kv_end, limits.q_start, limits.q_end
    opcheck(torch.ops.lumos_kernels.frame_attention.default, (q, k, v, *rows, 0.2, impl))
    o, lse = torch.ops.lumos_kernels.frame_attention.default(q, k, v, *rows, 0.2, impl)
    grad_o = torch.randn(8, 4, 1).expand(8, 4, 32)
    for grad_lse in (None, torch.randn(8, 4).T):
        arguments = (grad_o, grad_lse, q, k, v, *rows, 0.2, o, lse, True, impl)
        opcheck(torch.ops.lumos_kernels.frame_attention_backward.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_takes_a_second_length(impl):
    def function(q, k, v, limits):
        return frame_attention(2 * q, k, v, limits, return_lse=True, deterministic=True, impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(limits):
        leaves = problem(limits)
        upstream = random_upstream(leaves, limits, lse=True)
        results = [
            (*outputs, *torch.autograd.grad(outputs, leaves, upstream))
            for outputs in (f(*leaves, limits) for f in (compiled, function))
        ]
        for a, b in zip(*results, strict=True):
            assert_bitwise_equal(a, b)

    check(VIDEO)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(LIMITS["documents"])


def good():
    q, k, v = torch.zeros(5, 4, 32), torch.zeros(7, 2, 32), torch.zeros(7, 2, 32)
    return {"q": q, "k": k, "v": v, "limits": limits_kv([0] * 5, [7] * 5, 7)}


BAD = {
    "q without heads": ("q", {"q": torch.zeros(5, 32)}),
    "q of integers": ("q", {"q": torch.zeros(5, 4, 32, dtype=torch.int32)}),
    "k of another head_dim": ("k", {"k": torch.zeros(7, 2, 64)}),
    "k of another dtype": ("k", {"k": torch.zeros(7, 2, 32, dtype=torch.float16)}),
    "k elsewhere": ("k", {"k": torch.zeros(7, 2, 32, device="meta")}),
    "v of other keys": ("v", {"v": torch.zeros(6, 2, 32)}),
    "v of other heads": ("v", {"v": torch.zeros(7, 1, 32)}),
    "v of another dtype": ("v", {"v": torch.zeros(7, 2, 32, dtype=torch.float64)}),
    "heads that do not divide": ("the kv heads of k and v", {"q": torch.zeros(5, 3, 32)}),
    "no kv heads": ("the kv heads of k and v", {"k": torch.zeros(7, 0, 32), "v": torch.zeros(7, 0, 32)}),
    "no query heads": ("q", {"q": torch.zeros(5, 0, 32)}),
    "no channels": ("q", {"q": torch.zeros(5, 4, 0), "k": torch.zeros(7, 2, 0), "v": torch.zeros(7, 2, 0)}),
    "limits of other queries": ("limits.kv_start", {"limits": limits_kv([0] * 4, [7] * 4, 7)}),
    "limits of other keys": ("limits.q_start", {"limits": limits_kv([0] * 5, [6] * 5, 6)}),
    "limits of int64": (
        "limits.kv_end",
        {"limits": RowLimits(torch.zeros(5).int(), torch.zeros(5).long(), torch.zeros(7).int(), torch.zeros(7).int())},
    ),
    "limits elsewhere": ("limits.kv_start", {"limits": limits_kv([0] * 5, [7] * 5, 7).to("meta")}),
    "unknown implementation": ("impl='fastest'", {"impl": "fastest"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case):
    name, change = BAD[case]
    frame_attention(**good(), impl="reference")
    with pytest.raises(ValueError, match=rf"(^|: ){name} "):
        frame_attention(**(good() | change))
