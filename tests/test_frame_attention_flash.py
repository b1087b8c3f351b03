"""frame_attention through flash-attn, against stand-ins with the signatures and the semantics of its releases.

flash-attn itself needs a GPU. The stand-ins are plain torch: masks aligned to the bottom right, lse beside o,
gradients of q, k and v but none of lse. They know no more than flash-attn documents.
"""

from __future__ import annotations

import contextlib
import types
from unittest import mock

import pytest
import torch
from torch import Tensor

from lumos_kernels import Frame, FrameLayout, RowLimits, Text, dispatch, frame_attention
from lumos_kernels.dispatch import Problem
from lumos_kernels.frame_attention import flash
from lumos_kernels.frame_attention.contract import Inputs, OutputGradients, Outputs
from lumos_kernels.testing import assert_close_to_reference

OP = dispatch.ops()["frame_attention"]


class _Attention(torch.autograd.Function):
    """One sequence, [L, H, D]: o and an lse that takes a gradient and drops it, as flash-attn's does."""

    @staticmethod
    def forward(ctx, q, k, v, scale, causal):
        assert scale >= 0  # the kernels subtract scale * maximum, which is the maximum of the scaled scores only then
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            q, k, v = leaves
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("ihd,jhd->hij", q.float(), k.float().repeat_interleave(group, 1)) * scale
            rows, keys = scores.shape[1:]
            if causal:
                hidden = torch.arange(keys) > torch.arange(rows)[:, None] + keys - rows
                assert not hidden.all(1).any()  # releases disagree on what a row without keys gives
                scores = scores.masked_fill(hidden, -torch.inf)
            o = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.float().repeat_interleave(group, 1)).to(q.dtype)
        ctx.graph = leaves, o
        return o.detach(), scores.logsumexp(-1).detach()

    @staticmethod
    def backward(ctx, grad_o, grad_lse):
        leaves, o = ctx.graph
        return *torch.autograd.grad(o, leaves, grad_o, retain_graph=True), None, None


def _batch(q, k, v, softmax_scale, causal):
    assert q.dim() == k.dim() == v.dim() == 4
    outs = [_Attention.apply(*x, softmax_scale, causal) for x in zip(q, k, v, strict=True)]
    return torch.stack([o for o, _ in outs]), torch.stack([lse for _, lse in outs])


def _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    of_q, of_k = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    assert (max(of_q), max(of_k)) == (max_seqlen_q, max_seqlen_k)
    sequences = zip(q.split(of_q), k.split(of_k), v.split(of_k), strict=True)
    outs = [_Attention.apply(*x, softmax_scale, causal) for x in sequences]
    return torch.cat([o for o, _ in outs]), torch.cat([lse for _, lse in outs], 1)


def flash_attn_2(seen: list) -> types.ModuleType:
    """flash_attn 2.8."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        seen.append(("one", causal, deterministic, q.shape[1], k.shape[1]))
        o, lse = _batch(q, k, v, softmax_scale, causal)
        return (o, lse, None) if return_attn_probs else o

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        seen.append(("varlen", causal, deterministic, max_seqlen_q, max_seqlen_k))
        sizes = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        o, lse = _packed(q, k, v, *sizes, softmax_scale, causal)
        return (o, lse, None) if return_attn_probs else o

    return _module("flash_attn", flash_attn_func, flash_attn_varlen_func)


def flash_attn_3(seen: list) -> types.ModuleType:
    """flash_attn_interface, FlashAttention-3 for Hopper."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        seen.append(("one", causal, deterministic, q.shape[1], k.shape[1]))
        o, lse = _batch(q, k, v, softmax_scale, causal)
        return (o, lse) if return_attn_probs else o

    return _module("flash_attn_interface", flash_attn_func)


def flash_attn_4(seen: list) -> types.ModuleType:
    """flash_attn.cute, FlashAttention-4; its lse has padding behind the rows."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
    ):  # fmt: skip
        seen.append(("one", causal, deterministic, q.shape[1], k.shape[1]))
        o, lse = _batch(q, k, v, softmax_scale, causal)
        return o, torch.nn.functional.pad(lse, (0, 5), value=torch.nan) if return_lse else None

    return _module("flash_attn.cute", flash_attn_func)


def _module(name: str, *functions) -> types.ModuleType:
    module = types.ModuleType(name)
    for function in functions:
        setattr(module, function.__name__, function)
    return module


@pytest.fixture(params=[flash_attn_2, flash_attn_3, flash_attn_4], ids=["2", "3", "4"])
def calls(request):
    """The calls that the installed flash-attn has seen: (kind, causal, deterministic, queries, keys)."""
    seen: list = []
    with installed(request.param(seen)):
        yield seen


@contextlib.contextmanager
def installed(stand_in: types.ModuleType):
    """In here frame_attention finds this flash-attn, and its predicate lets CPU tensors through."""
    runs_here = {"flash": lambda problem: flash.refusal()}
    with (
        mock.patch.object(flash, "module", return_value=stand_in),
        mock.patch.dict(OP.implementations, runs_here),
    ):
        yield
    dispatch._choose.cache_clear()


def limits_of(*documents) -> RowLimits:
    return FrameLayout.from_segments(documents).limits


def limits_kv(kv_start, kv_end, keys) -> RowLimits:
    return RowLimits.from_kv(torch.as_tensor(kv_start), torch.as_tensor(kv_end), keys, check=True)


FRAMES = torch.arange(100) // 20
_STARTS, _ENDS = [-5, 0, 9, -(2**31), 2**31 - 1, 3], [4, 10**6, 12, 2**31 - 1, -(2**31), 2]
LIMITS = {
    "video": limits_of([Text(7), Frame(4, 8), Frame(4, 4), Text(2)]),
    "documents": limits_of([Text(5), Frame(4, 4)], [], [Text(9)], [Text(1)], [Frame(4, 4), Frame(4, 8)]),
    "text": limits_of([Text(37)]),
    "texts": limits_of([Text(37)], [Text(1)], [Text(20)]),
    "pictures": limits_of([Frame(4, 4)], [Frame(4, 8)]),
    "decoding": limits_kv([0] * 10, [80] * 10, 80),
    "sliding window of frames": limits_kv((FRAMES - 1).clamp_min(0) * 20, (FRAMES + 1) * 20, 100),
    "keyless rows": limits_kv([0, 0, 2, 5, 5, 9, 9, 14], [0, 3, 5, 5, 9, 14, 14, 14], 17),
    "text from nothing": limits_kv([0] * 4, [0, 1, 2, 3], 3),
    "no row sees a key": limits_kv([0, 0, 4], [0, 0, 4], 4),
    "frames in any order": limits_kv([40] * 20 + [0] * 20 + [20] * 20, [60] * 20 + [20] * 20 + [60] * 20, 60),
    "text backwards": limits_kv([0] * 9, list(range(9, 0, -1)), 9),
    "rows without keys among others": limits_kv([0, 3, 0, 0], [4, 3, 4, 4], 4),
    "outside of the keys": RowLimits(*(torch.tensor(x).int() for x in (_STARTS, _ENDS, [0] * 6, [6] * 6))),
    "no queries": RowLimits.from_kv(torch.empty(0).int(), torch.empty(0).int(), 6),
}


def leaves_of(limits, heads=(4, 2), dtype=torch.float32) -> list[Tensor]:
    sizes = (limits.num_queries, heads[0]), (limits.num_keys, heads[1]), (limits.num_keys, heads[1])
    return [torch.randn(*size, 32).to(dtype).requires_grad_() for size in sizes]


def with_gradients(leaves, limits, upstream, impl, **options):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    o, lse = frame_attention(*leaves, limits, return_lse=True, impl=impl, **options)
    gradients = torch.autograd.grad(o, leaves, upstream, allow_unused=True, materialize_grads=True)
    return [o.detach(), lse.detach(), *gradients]


def check(leaves, limits, impl="flash", **options):
    upstream = torch.randn_like(leaves[0])
    ours = with_gradients(leaves, limits, upstream, impl, **options)
    low = with_gradients(leaves, limits, upstream, "reference", **options)
    high = with_gradients([x.double() for x in leaves], limits, upstream.double(), "reference", **options)
    for name, a, lo, hi in zip(("o", "lse", "dq", "dk", "dv"), ours, low, high, strict=True):
        assert a.dtype == lo.dtype
        # The stand-in sums over several calls, in another order than the reference: twice and a little.
        assert_close_to_reference(a, lo, hi, name) if a.numel() > 2000 else torch.testing.assert_close(a, lo)


@pytest.mark.parametrize("name", LIMITS)
def test_equals_the_reference(name, calls):
    check(leaves_of(LIMITS[name]), LIMITS[name])
    check(leaves_of(LIMITS[name], (3, 1)), LIMITS[name], scale=0.3)
    check(leaves_of(LIMITS[name]), LIMITS[name], scale=-0.3)
    assert bool(calls) == bool((LIMITS[name].kv_end > LIMITS[name].kv_start).any())


@pytest.mark.parametrize("name", ["video", "texts", "keyless rows", "no row sees a key"])
def test_as_an_op_it_runs_the_forward_again(name, calls):
    """What LUMOS_IMPL=flash chooses goes through the op."""
    limits = LIMITS[name]
    leaves = [leaf.detach() for leaf in leaves_of(limits)]
    grad_o = torch.randn_like(leaves[0])
    inputs = Inputs(*leaves, limits, 0.2)
    outputs = flash.forward(inputs)
    gradients = flash.backward(inputs, outputs, OutputGradients(grad_o, None), deterministic=True)
    expected = with_gradients(leaves, limits, grad_o, "reference", scale=0.2)
    for a, b in zip((*outputs, *gradients), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_frames_are_one_call_each_and_text_is_causal():
    seen: list = []
    with installed(flash_attn_2(seen)):
        check(leaves_of(LIMITS["video"]), LIMITS["video"], deterministic=True)
        assert seen == [
            ("one", True, True, 7, 7),
            ("one", False, True, 40, 47),
            ("one", False, True, 24, 71),
            ("one", True, True, 2, 73),
        ]
        seen.clear()
        check(leaves_of(LIMITS["texts"]), LIMITS["texts"])
        check(leaves_of(LIMITS["pictures"]), LIMITS["pictures"])
        assert seen == [("varlen", True, False, 37, 37), ("varlen", False, False, 40, 40)]


def test_cuts_every_limit_into_what_it_is():
    for name, limits in LIMITS.items():
        mask = torch.zeros_like(limits.dense_mask())
        for run in flash.cut(limits):
            rows, keys = run.q_last - run.q_first, run.k_last - run.k_first
            seen = torch.ones(rows, keys, dtype=torch.bool)
            assert not mask[run.q_first : run.q_last].any(), name
            mask[run.q_first : run.q_last, run.k_first : run.k_last] = seen.tril(keys - rows) if run.causal else seen
        assert torch.equal(mask, limits.dense_mask()), name


def test_limits_are_read_once_until_they_change(calls):
    limits = limits_of([Text(5), Frame(4, 4)])
    leaves = leaves_of(limits)
    with mock.patch.object(flash, "cut", wraps=flash.cut) as cut:
        for _ in range(3):
            frame_attention(*leaves, limits, impl="flash")
        assert cut.call_count == 1
        limits.kv_end.copy_(torch.arange(1, 30))  # in place: all text
        check(leaves, RowLimits.from_kv(limits.kv_start, limits.kv_end, 29))
        ours = frame_attention(*leaves, limits, impl="flash")
        assert cut.call_count >= 2
    torch.testing.assert_close(ours, frame_attention(*leaves, limits, impl="reference"))


def test_a_gradient_of_lse_is_refused(calls):
    limits = LIMITS["video"]
    o, lse = frame_attention(*leaves_of(limits), limits, return_lse=True, impl="flash")
    with pytest.raises(ValueError, match="impl='flash' passes no gradient through lse"):
        (o.sum() + lse.sum()).backward()
    q, k, v = (leaf.detach() for leaf in leaves_of(limits))
    with pytest.raises(ValueError, match="impl='flash' passes no gradient through lse"):
        flash.backward(Inputs(q, k, v, limits, 0.2), Outputs(o, lse), OutputGradients(q, lse), deterministic=False)


def test_limits_it_has_no_mask_for_are_refused(calls):
    ends = torch.arange(1, 2001)
    limits = RowLimits.from_kv((ends - 50).clamp_min(0), ends, 2000)
    with pytest.raises(ValueError, match=r"cannot express these limits: 2000 queries would take 1951 calls"):
        frame_attention(*leaves_of(limits), limits, impl="flash")
    assert not calls


def test_a_version_without_lse_is_refused():
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        return q

    limits = LIMITS["video"]
    with (
        installed(_module("flash_attn", flash_attn_func)),
        pytest.raises(ValueError, match="flash_attn_func returns no lse"),
    ):
        frame_attention(*leaves_of(limits), limits, impl="flash")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem("cpu", torch.bfloat16, 64), "runs CUDA tensors, not cpu"),
        (Problem("cuda", torch.float32, 64, "sm_90"), "computes bfloat16 and float16, not float32"),
        (Problem("cuda", torch.bfloat16, 288, "sm_90"), "multiples of 8 up to 256, not 288"),
    ],
)
def test_says_what_it_does_not_run(problem, reason):
    assert reason in OP.refusal("flash", problem)


def test_absence_is_a_reason():
    problem = Problem("cuda", torch.bfloat16, 64, "sm_90")
    with mock.patch.object(flash, "module", return_value=None):
        assert OP.refusal("flash", problem) == "flash-attn is not installed, or does not load with this torch"
    with mock.patch.object(flash, "module", return_value=flash_attn_2([])):
        assert OP.refusal("flash", problem) is None
        assert dispatch.needs_self_check("flash", problem)
    with pytest.raises(ValueError, match="impl='flash' cannot run here: runs CUDA tensors, not cpu"):
        frame_attention(*leaves_of(LIMITS["text"]), LIMITS["text"], impl="flash")


def test_takes_the_newest_interface_that_loads():
    fake = {"flash_attn": flash_attn_2([]), "flash_attn_interface": flash_attn_3([])}

    def load(name):
        if name not in fake:
            raise ImportError(name)
        return fake[name]

    flash.module.cache_clear()
    with mock.patch.object(flash.importlib, "import_module", load):
        assert flash.module() is fake.pop("flash_attn_interface")
        flash.module.cache_clear()
        assert flash.module() is fake.pop("flash_attn")
        flash.module.cache_clear()
        assert flash.module() is None
    flash.module.cache_clear()


@pytest.mark.parametrize("name", ["video", "texts", "keyless rows"])
def test_a_second_derivative_is_refused(name, calls):
    """flash-attn would drop it in silence."""
    leaves = leaves_of(LIMITS[name])
    o = frame_attention(*leaves, LIMITS[name], impl="flash")
    for gradient in torch.autograd.grad(o.sum(), leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="frame_attention has no second derivatives"):
            torch.autograd.grad(gradient.square().sum(), leaves, retain_graph=True)
