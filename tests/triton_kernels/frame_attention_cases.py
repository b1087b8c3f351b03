"""What the tests of frame_attention's Triton kernels share: limits, tensors, configurations and the check."""

from __future__ import annotations

import contextlib
import os
import sys
from unittest import mock

import torch
from eager_draws import attention_draws
from torch import Tensor

from lumos_kernels import Frame, FrameLayout, RowLimits, Text, frame_attention, self_check
from lumos_kernels.frame_attention import triton as kernels
from lumos_kernels.frame_attention.contract import Inputs, OutputGradients
from lumos_kernels.frame_attention.triton import configs, tuned
from lumos_kernels.testing import (
    assert_bitwise_equal,
    assert_close_to_reference,
    eager_attention,
    is_few,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter_reduce

    interpreter_reduce.install()

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
        stack.enter_context(mock.patch.object(self_check, "allows", return_value=True))
        if config is not None and INTERPRETED:  # a GPU has the time for its own tiles, and not the memory for others
            stack.enter_context(mock.patch.object(configs, "choose", return_value=config))
        yield


@contextlib.contextmanager
def measured_as(entries: dict | None = None, fused: frozenset = frozenset()):
    """Other tables in the place of tuned.py's."""
    configs.table.cache_clear()
    try:
        with mock.patch.multiple(tuned, CONFIGS=entries or {}, FUSED_BACKWARD=fused):
            yield
    finally:
        configs.table.cache_clear()


def fields(block_m, block_n, num_warps, num_stages, descriptors) -> dict:
    """The fields of a configuration, as the tuner's table has them."""
    return {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "block_m": block_m,
        "block_n": block_n,
        "descriptors": descriptors,
    }


def config(*sizes) -> configs.Config:
    return configs.Config(**fields(*sizes))


# Tiles so large that the interpreter gets through a real frame.
LARGE = {"descriptors": config(128, 256, 4, 1, True), "pointers": config(128, 256, 4, 1, False)}


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


def run_fused(leaves, limits, upstream) -> list[Tensor]:
    """The same by the fused backward, called by its name."""
    inputs = Inputs(*leaves, limits.to(leaves[0].device), leaves[0].shape[2] ** -0.5)
    outputs = kernels.forward(inputs)
    grad = OutputGradients(*upstream) if len(upstream) == 2 else OutputGradients(*upstream, None)
    module = sys.modules[kernels.backward_fused.__module__]
    with (
        mock.patch.object(module, "_key_pass", wraps=module._key_pass) as key_pass,
        mock.patch.object(module, "_query_pass", side_effect=AssertionError("the deterministic backward ran")),
    ):
        gradients = kernels.backward_fused(inputs, outputs, grad)
    assert [call.args[3].dtype for call in key_pass.call_args_list] == [FP32]  # the fp32 sums of dq
    return [*outputs, *gradients]


def check(leaves, limits, upstream, actual=None, **options) -> list[Tensor]:
    """Against fp64, with SDPA in the same dtype as the rival; lse and its gradient against the reference's."""
    actual = run(leaves, limits, upstream, **options) if actual is None else actual
    high = run([x.double() for x in leaves], limits, [u.double() for u in upstream], "reference", **options)

    def rival(leaves, upstream):
        low = run(leaves, limits, upstream, "reference", **options)
        if len(upstream) == 1 and limits.num_queries and bool((limits.kv_end > limits.kv_start).all()):
            eager = [x.detach().requires_grad_() for x in leaves]
            o = eager_attention(*eager, limits.to(leaves[0].device), **options)
            low = [o.detach(), low[1], *torch.autograd.grad(o, eager, upstream)]
        return low

    draws = [rival(leaves, upstream)]
    if any(map(is_few, high)):
        draws += attention_draws(rival, leaves, upstream)
    for name, a, hi, *lows in zip(NAMES, actual, high, *draws, strict=True):
        assert a.dtype == lows[0].dtype
        assert a.is_contiguous()
        assert_close_to_reference(a, lows, hi, name)
    return actual


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_bitwise_equal(a, b, name)
