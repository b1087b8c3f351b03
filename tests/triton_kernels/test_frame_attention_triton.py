"""frame_attention's Triton kernels against the fp64 reference, with every way of loading tiles and both backwards.

conftest.py says where they run. Programs are few and tiles large: the interpreter's time goes by tiles.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lumos_kernels import Frame, FrameLayout, RowLimits, Text, checks, dispatch, frame_attention
from lumos_kernels.dispatch import Problem
from lumos_kernels.frame_attention import triton as kernels
from lumos_kernels.frame_attention.triton import configs, primitives, tune
from lumos_kernels.testing import (
    assert_bitwise_equal,
    assert_close_to_reference,
    awkward_gradients,
    eager_attention,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter_reduce

    interpreter_reduce.install()
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("o", "lse", "dq", "dk", "dv")
# Whose configurations: those of sm_80 load through pointers, the others through descriptors.
ARCHS = ("sm_80", "sm_90", "sm_100")
if not INTERPRETED and torch.cuda.is_available():
    ARCHS = {8: ARCHS[:1], 9: ARCHS[:2]}.get(torch.cuda.get_device_capability()[0], ARCHS[::2])


@contextlib.contextmanager
def as_on(arch: str = "sm_90", fused: bool = False, config: configs.Config | None = None):
    """Configurations of an architecture, or one for all kernels; fused: of the two backwards, the one of one pass."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(configs, "architecture", return_value=arch if arch in ARCHS else ARCHS[-1])
        )
        stack.enter_context(mock.patch.object(configs, "fuses_backward", return_value=fused))
        if config is not None and INTERPRETED:  # a GPU has the time for its own tiles, and not the memory for others
            stack.enter_context(mock.patch.object(configs, "choose", return_value=config))
        yield


# Tiles so large that the interpreter gets through a real frame.
LARGE = {"descriptors": configs.Config(128, 256, 4, 1, True), "pointers": configs.Config(128, 256, 4, 1, False)}


def limits_of(*documents) -> RowLimits:
    return FrameLayout.from_segments(documents).limits


def limits_kv(kv_start, kv_end, keys) -> RowLimits:
    return RowLimits.from_kv(torch.as_tensor(kv_start), torch.as_tensor(kv_end), keys, check=True)


def causal(tokens: int, cached: int = 0) -> RowLimits:
    """Frames of 1, 2, 3 ... tokens after `cached` keys that everyone sees: limits that change all over every tile."""
    sizes = torch.arange(1, tokens + 2)
    frame = torch.repeat_interleave(sizes, sizes)[:tokens]
    ends = sizes.cumsum(0)[frame - 1].clamp_max(tokens) + cached
    return limits_kv(torch.zeros_like(ends), ends, tokens + cached)


def sliding(tokens: int, window: int) -> RowLimits:
    ends = torch.arange(1, tokens + 1)
    return limits_kv((ends - window).clamp_min(0), ends, tokens)


def keyless() -> RowLimits:
    """Rows without keys at the start, between others and at the end, and keys that nobody sees."""
    starts = [0] * 40 + [60] * 3 + [70] * 60 + [200] * 30 + [250] * 40
    ends = [0] * 5 + [50] * 35 + [60] * 3 + [130] * 60 + [230] * 30 + [250] * 40
    return limits_kv(starts, ends, 260)


VIDEO = limits_of([Text(7), Frame(4, 8), Frame(8, 12), Text(2)], [Text(50), Frame(4, 4)])  # 231 tokens
SMALL = limits_of([Text(12), Frame(4, 8)], [Text(9), Frame(4, 4)])  # 85 tokens
WINDOW_OF_FRAMES = limits_kv(
    (torch.arange(240) // 40 - 1).clamp_min(0) * 40, (torch.arange(240) // 40 + 1) * 40, 240
)  # each frame of 40 tokens sees itself and the one before
DECODING = limits_kv([0] * 40, [290] * 40, 290)  # the last frame against a cached prefix


def leaves_of(limits, heads=(2, 1), head_dim=64, dtype=BF16, device="cpu") -> list[Tensor]:
    sizes = (limits.num_queries, heads[0]), (limits.num_keys, heads[1]), (limits.num_keys, heads[1])
    return [torch.randn(*size, head_dim).to(device, dtype) for size in sizes]


def upstream_of(leaves: list[Tensor], lse: bool = False) -> list[Tensor]:
    q = leaves[0]
    return [torch.randn_like(q), *([torch.randn(q.shape[1], q.shape[0], device=q.device)] if lse else [])]


def run(leaves, limits, upstream, impl="triton", **options) -> list[Tensor]:
    """o, lse, dq, dk, dv under a gradient of o, or of o and lse."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    limits = limits.to(leaves[0].device)
    o, lse = frame_attention(*leaves, limits, return_lse=True, impl=impl, **options)
    gradients = torch.autograd.grad((o, lse)[: len(upstream)], leaves, upstream)
    return [o.detach(), lse.detach(), *gradients]


def check(leaves, limits, upstream, **options) -> list[Tensor]:
    """Against fp64, with SDPA in the same dtype as the rival; lse and its gradient against the reference's."""
    actual = run(leaves, limits, upstream, **options)
    high = run([x.double() for x in leaves], limits, [u.double() for u in upstream], "reference", **options)
    low = run(leaves, limits, upstream, "reference", **options)
    if len(upstream) == 1 and limits.num_queries and bool((limits.kv_end > limits.kv_start).all()):
        eager = [x.detach().requires_grad_() for x in leaves]
        o = eager_attention(*eager, limits.to(leaves[0].device), **options)
        low = [o.detach(), low[1], *torch.autograd.grad(o, eager, upstream)]
    for name, a, lo, hi in zip(NAMES, actual, low, high, strict=True):
        assert a.dtype == lo.dtype
        assert a.is_contiguous()
        assert_close_to_reference(a, lo, hi, name)
    return actual


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_bitwise_equal(a, b, name)


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


@pytest.mark.parametrize("layout", ["fused", "heads first", "every second token", "channels last", "shifted by one"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_strides(layout, arch, device):
    dense = leaves_of(SMALL, (4, 2), 32, FP16, device)
    upstream = upstream_of(dense)
    if layout == "fused":  # with NaN behind every row
        fused = torch.full((SMALL.num_queries, 9, 32), torch.nan, dtype=FP16, device=device)
        strided = list(fused[:, :8].split([4, 2, 2], 1))
    elif layout == "heads first":
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in dense]
    elif layout == "every second token":
        strided = [x.repeat_interleave(2, dim=0)[::2] for x in dense]
    elif layout == "channels last":
        strided = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in dense]
    else:  # not aligned to 16 bytes
        strided = [x.new_empty(x.numel() + 1)[1:].view(x.shape) for x in dense]
    for into, x in zip(strided, dense, strict=True):
        into.copy_(x)
    with as_on(arch):
        assert_same_bits(run(strided, SMALL, upstream), run(dense, SMALL, upstream))


@pytest.mark.skipif(ARCHS == ("sm_80",), reason="there are no descriptors on this GPU")
def test_one_kernel_may_load_by_pointers_and_the_next_by_descriptors(device):
    leaves = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in leaves_of(SMALL, (2, 1), 32, BF16, device)]
    with as_on("sm_90"), mock.patch.dict(configs.tuned.CONFIGS, {("dkdv", "sm_90", 32): (64, 64, 4, 2, False)}):
        assert not configs.choose("dkdv", leaves[0]).descriptors
        assert configs.choose("dq", leaves[0]).descriptors
        check(leaves, SMALL, upstream_of(leaves))


def test_limits_with_strides(device):
    every_second = RowLimits(*(torch.stack([x, -x], 1)[:, 0] for x in vars(SMALL).values()))
    leaves = leaves_of(SMALL, (1, 1), 32, BF16, device)
    upstream = upstream_of(leaves)
    assert_same_bits(run(leaves, every_second, upstream), run(leaves, SMALL, upstream))


def direct(leaves, limits, upstream, deterministic=True) -> list[Tensor]:
    """o, lse and the gradients, called without torch.library between."""
    limits = limits.to(leaves[0].device)
    o, lse = kernels.forward(*leaves, limits, 0.2)
    of_o, of_lse = upstream
    return [o, lse, *kernels.backward(of_o, of_lse, *leaves, o, lse, limits, 0.2, deterministic)]


GUARDED = [
    (VIDEO, 64, BF16, "sm_90", False),
    (VIDEO, 96, FP16, "sm_80", False),
    (VIDEO, 96, BF16, "sm_90", True),
    (DECODING, 64, BF16, "sm_80", True),
    (keyless(), 128, BF16, "sm_90", False),
    (limits_kv([0, 0], [0, 0], 0), 64, FP32, "sm_90", False),
]


@pytest.mark.parametrize("case", GUARDED, ids=lambda case: "-".join(map(str, case[1:])))
def test_writes_every_element_and_nothing_around(case, device, guarded_allocations):
    limits, head_dim, dtype, arch, fused = case
    leaves = leaves_of(limits, (2, 1), head_dim, dtype, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(arch, fused), guarded_allocations():
        results = direct(leaves, limits, upstream, deterministic=not fused)
    assert all(x.is_contiguous() and not x.isnan().any() for x in results)


@pytest.mark.parametrize(("arch", "fused"), [("sm_80", False), ("sm_80", True), ("sm_90", False), ("sm_90", True)])
def test_64_bit_offsets_give_the_same_bits(arch, fused, device):
    leaves = leaves_of(SMALL, (4, 2), 32, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    asked = []

    def always(*tensors: Tensor) -> bool:
        asked.append(tensors)
        return True

    with as_on(arch, fused):
        expected = direct(leaves, SMALL, upstream, deterministic=not fused)
        with mock.patch.object(checks, "needs_int64_offsets", always):
            actual = direct(leaves, SMALL, upstream, deterministic=not fused)
    if INTERPRETED or not fused:
        assert_same_bits(actual, expected)
    # Each kernel is asked about everything it reads or writes by an offset.
    q, k, v = leaves
    of_o, of_lse = upstream
    o, lse, dq, dk, dv = actual
    keys = (q, k, v, of_o, dk, dv)
    wanted = [(q, k, v, o, lse), (of_o, o, lse, of_lse), *([keys, (dq,)] if fused else [keys, (q, k, v, of_o, dq)])]
    assert len(asked) == len(wanted)
    for tensors, seen in zip(wanted, asked, strict=True):
        assert {x.data_ptr() for x in tensors} <= {x.data_ptr() for x in seen}


def test_the_deterministic_backward_is_taken_unless_the_fused_one_is_measured_faster(device):
    leaves = leaves_of(SMALL, (1, 1), 32, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    passes = importlib.import_module("lumos_kernels.frame_attention.triton.backward")

    def is_fused(deterministic: bool) -> bool:
        with mock.patch.object(passes, "_fused_backward") as fused:
            direct(leaves, SMALL, upstream, deterministic)
        return fused.called

    measured = configs.family(configs.architecture(leaves[0])), 32
    with mock.patch.object(configs.tuned, "FUSED_BACKWARD", frozenset()):
        assert not is_fused(deterministic=False)
    with mock.patch.object(configs.tuned, "FUSED_BACKWARD", frozenset([measured])):
        assert is_fused(deterministic=False)
        assert not is_fused(deterministic=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_deterministic_runs_give_the_same_bits(arch, device):
    leaves = leaves_of(SMALL, (3, 1), 64, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(arch, fused=True):  # asked for, and refused
        first = direct(leaves, SMALL, upstream)
        for _ in range(2 if INTERPRETED else 50):
            assert_same_bits(direct(leaves, SMALL, upstream), first)


class HostReads(TorchDispatchMode):
    """Collects the operators that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_the_host_reads_no_value_and_launches_the_same_for_other_limits(fused, device):
    """What a CUDA graph captures serves every layout of the same sizes: grids and arguments come from shapes."""
    launches = []

    def record(self, *args, grid, warmup, **options):
        tensors = [x for x in args if isinstance(x, Tensor)]
        launches.append((self.fn.__name__, grid, {**options, "grid": None}, [x.shape for x in tensors]))

    other = limits_of([Text(VIDEO.num_queries)])
    leaves = leaves_of(VIDEO, (4, 2), 64, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(fused=fused), HostReads() as reads, contextlib.ExitStack() as stack:
        for owner in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(owner, "run", record, create=True))
        direct(leaves, VIDEO, upstream, deterministic=False)
        first, launches = launches, []
        direct(leaves, other, upstream, deterministic=False)
    assert reads.seen == []
    assert first == launches
    assert len(first) == 4


@triton.jit
def _work_kernel(tile_ptr, head_ptr, tiles, heads, per_section):
    pid = tl.program_id(0)
    tile, head = primitives.work_item(pid, tiles, heads, per_section)
    tl.store(tile_ptr + pid, tile)
    tl.store(head_ptr + pid, head)


@pytest.mark.parametrize(("tiles", "heads", "per_section"), [(3, 8, 4), (1, 5, 2), (4, 6, 6), (5, 6, 4), (2, 3, 1)])
def test_every_tile_of_every_head_is_one_work_item(tiles, heads, per_section, device):
    work = [torch.empty(tiles * heads, dtype=torch.int32, device=device) for _ in range(2)]
    _work_kernel[(tiles * heads,)](*work, tiles, heads, per_section)
    items = list(zip(*(x.tolist() for x in work), strict=True))
    sections = [range(first, min(first + per_section, heads)) for first in range(0, heads, per_section)]
    assert items == [(tile, head) for section in sections for tile in range(tiles) for head in section]


def test_the_heaviest_tiles_of_a_video_come_first(device):
    """In the order of the programs, per head: a tile of queries sees no more keys than the one before, a tile of keys
    is seen by no more queries.
    """
    limits = limits_of([Text(5), *[Frame(4, 8)] * 12])
    work = [torch.empty(6, dtype=torch.int32, device=device) for _ in range(2)]
    _work_kernel[(6,)](*work, 6, 1, 1)
    tile = work[0].tolist()
    pairs = limits.dense_mask()[:384, :384].view(6, 64, -1)
    queries = [int(pairs[6 - 1 - t].sum()) for t in tile]
    keys = [int(limits.dense_mask()[:, 64 * t : 64 * t + 64].sum()) for t in tile]
    assert queries == sorted(queries, reverse=True)
    assert keys == sorted(keys, reverse=True)


def test_sections_hold_the_heads_whose_keys_fit_the_cache():
    assert primitives.heads_per_section(8, 12_796, 64, 2) == 3
    assert primitives.heads_per_section(8, 1_000, 64, 2) == 8
    assert primitives.heads_per_section(8, 89_848, 128, 2) == 1


def test_only_some_head_sizes_and_dtypes_are_run():
    op = dispatch.ops()["frame_attention"]
    assert op.refusal("triton", Problem("cuda", BF16, 48, "sm_90")) == (
        "computes head sizes 32, 64, 96 and 128, not 48"
    )
    assert "float64" in op.refusal("triton", Problem("cuda", torch.float64, 64, "sm_90"))
    for head_dim in configs.HEAD_DIMS:
        assert op.refusal("triton", Problem("cuda", BF16, head_dim, "sm_90")) is None
    assert "not yet proven" in op.refusal("triton", Problem("cuda", BF16, 64, "sm_90"), automatic=True)


def test_every_kernel_has_a_configuration_everywhere_and_measured_ones_come_first(device):
    for kernel in configs.KERNELS:
        for arch in configs.ARCHS:
            assert set(configs.DEFAULTS[kernel, arch]) == set(configs.HEAD_DIMS)
            assert all(primitives.MAX_BLOCK % c.block_m == 0 for c in configs.DEFAULTS[kernel, arch].values())
    q = torch.empty(1, 1, 64, dtype=BF16, device=device)
    with as_on("sm_90"):
        assert configs.choose("dq", q) == configs.DEFAULTS["dq", "sm_90"][64]
        with mock.patch.object(configs.tuned, "CONFIGS", {("dq", "sm_90", 64): (64, 64, 4, 3, False)}):
            assert configs.choose("dq", q) == configs.Config(64, 64, 4, 3, False)
            assert configs.choose("dkdv", q) == configs.DEFAULTS["dkdv", "sm_90"][64]
            assert configs.choose("dq", q.float()) == configs.FP32
    for arch, family in {"sm_86": "sm_80", "sm_90": "sm_90", "sm_103": "sm_100", "sm_120": "sm_80"}.items():
        assert configs.family(arch) == family


def tuning(times: dict, wrong=(), todo=None, minutes=1.0):
    """tune() with made-up times for configurations; kernels do not run. Returns its entries and its report."""
    lines: list[str] = []
    current: list = []

    def runner(subject, data):
        def call():
            config = configs.choose(subject.kernel, None)
            current[:] = [subject.kernel, config]
            if config in wrong:
                if wrong[config] is None:
                    return (torch.full((4,), torch.nan),)
                raise wrong[config]
            return (torch.ones(4),)

        return call

    def measure(call) -> float:
        call()
        return times.get(tuple(current), 1.0)

    with mock.patch.object(tune, "runner", runner):
        entries, fused = tune.tune(
            "sm_90", minutes, measure=measure, report=lines.append, make=lambda shape, device: None, todo=todo
        )
    return entries, fused, lines


def test_the_tuner_takes_the_fastest_right_configuration():
    subject = tune.Subject("forward", tune.SHAPES[0])
    default, *others = tune.candidates("forward", "sm_90", 64)
    assert len(set(others)) == len(others) > 5
    times = {("forward", c): t for c, t in zip(others, (0.5, 0.6, 0.7, 0.8, 0.99), strict=False)}
    wrong = {others[0]: RuntimeError("out of resource: shared memory\nmore"), others[1]: None}
    entries, fused, lines = tuning(times, wrong, [subject])
    assert entries == {**configs.tuned.CONFIGS, ("forward", "sm_90", 64): tuple(others[2])}
    assert fused == configs.tuned.FUSED_BACKWARD
    assert f"    refused {others[0]}: RuntimeError: out of resource: shared memory" in lines
    assert f"    refused {others[1]}: wrong result" in lines
    # 1 % is not enough to leave the default
    entries, _, _ = tuning({("forward", others[4]): 0.99}, {}, [subject])
    assert entries["forward", "sm_90", 64] == tuple(default)


@pytest.mark.parametrize("seconds", [0.5, 0.99])
def test_the_tuner_fuses_the_backward_where_it_is_faster(seconds):
    shape = tune.SHAPES[1]
    todo = [tune.Subject(kernel, shape) for kernel in ("dkdv", "dq", "fused")]
    _, fused, _ = tuning({("fused", c): seconds for c in tune.candidates("fused", "sm_90", 128)}, {}, todo)
    assert (("sm_90", 128) in fused) == (seconds < 0.98)


def test_the_tuner_stops_in_time_and_keeps_what_it_did_not_reach():
    with mock.patch.object(configs.tuned, "CONFIGS", {("dq", "sm_80", 64): (64, 64, 4, 1, False)}):
        entries, _, lines = tuning({}, minutes=0.0)
    assert entries == {("dq", "sm_80", 64): (64, 64, 4, 1, False)}
    assert lines == ["time is up: 16 of 16 keep their entries"]


def test_the_tuner_leaves_a_kernel_when_its_share_of_the_time_is_up():
    subject = tune.Subject("forward", tune.SHAPES[0])
    with mock.patch.object(tune, "runner", return_value=lambda: (torch.ones(4),)):
        verdict = tune.decide(subject, "sm_90", None, deadline=-1.0, measure=lambda call: 1.0)
    assert verdict.config == configs.DEFAULTS["forward", "sm_90"][64]
    assert verdict.tried == 1


def test_the_tuners_table_reads_back():
    entries = {("forward", "sm_90", 64): (128, 128, 4, 2, True), ("dq", "sm_80", 32): (64, 32, 4, 2, False)}
    for fused in (frozenset(), frozenset({("sm_90", 64), ("sm_90", 128)})):
        read: dict = {}
        exec(tune.source(entries, fused, "Last run: nowhere."), read)
        assert read["CONFIGS"] == entries
        assert read["FUSED_BACKWARD"] == fused


def test_the_tuner_runs_the_kernels_it_measures(device):
    """On small inputs: a result of each kernel, in a configuration that is not its default."""
    limits = SMALL.to(device)
    q, k, v = leaves_of(SMALL, (2, 1), 32, BF16, device)
    data = tune.Inputs(q, k, v, torch.randn_like(q), limits)
    for kernel in configs.KERNELS:
        subject = tune.Subject(kernel, tune.Shape(32, 2, 1))
        config = configs.Config(64, 64, 4, 2, False)
        call = tune.runner(subject, data)
        expected = call()
        with tune.using(subject, config):
            assert configs.choose(kernel, q) == config
            assert tune.agrees(call(), expected)


def test_a_dry_run_lists_the_candidates(capsys):
    tune.main(["--dry-run", "--arch", "sm_90"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(configs.KERNELS) * len(tune.SHAPES)
    assert lines[0].startswith("forward D=64: ")
