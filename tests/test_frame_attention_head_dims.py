"""frame_attention at head sizes that no kernel computes: padded with zeros to the next one, exactly."""

from __future__ import annotations

import logging

import pytest
import torch
from row_orders import NAMES, leaves_of, with_gradients
from torch.library import opcheck

from lumos_kernels import Frame, FrameLayout, Text, dispatch, frame_attention, library
from lumos_kernels.dispatch import Problem
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference, awkward_gradients

OP = dispatch.ops()["frame_attention"]
LIMITS = FrameLayout.from_segments([[Text(7), Frame(4, 8), Frame(8, 12), Text(2)], [Text(50), Frame(4, 4)]]).limits

native = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
pytestmark = pytest.mark.usefixtures("one_thread")


def attend(*arguments, **options):
    return frame_attention(*arguments, return_lse=True, **options)


def upstream_of(leaves):
    q = leaves[0]
    return [torch.randn_like(q), torch.randn(q.shape[1], q.shape[0])]


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [*range(1, 161, 2), 8, 40, 80, 112, 144])
def test_equals_the_reference(head_dim, dtype):
    leaves = leaves_of(LIMITS, (8, 2), head_dim, dtype)
    upstream = upstream_of(leaves)
    actual = with_gradients(attend, leaves, LIMITS, upstream, impl="native")
    low = with_gradients(attend, leaves, LIMITS, upstream, impl="reference")
    exact = [x.double() for x in leaves], LIMITS, [u.double() for u in upstream]
    high = with_gradients(attend, *exact, impl="reference")
    for name, a, lo, hi in zip(NAMES, actual, low, high, strict=True):
        assert a.dtype == lo.dtype
        assert a.is_contiguous()
        assert_close_to_reference(a, lo, hi, name)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "padded"), [(20, 32), (80, 96), (127, 128), (130, 160)])
def test_padding_is_exact(head_dim, padded, dtype):
    """The very bits of a call whose tensors the caller had padded, under the scale of the original head size."""
    leaves = leaves_of(LIMITS, (4, 2), head_dim, dtype)
    upstream = upstream_of(leaves)
    wide = [torch.nn.functional.pad(x, (0, padded - head_dim)) for x in (*leaves, upstream[0])]
    scale = head_dim**-0.5
    expected = with_gradients(attend, wide[:3], LIMITS, [wide[3], upstream[1]], impl="native", scale=scale)
    for impl in ("native", "auto"):
        actual = with_gradients(attend, leaves, LIMITS, upstream, impl=impl)
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            if name != "lse":
                assert not b[..., head_dim:].any()
                b = b[..., :head_dim].contiguous()
            assert_bitwise_equal(a, b, name)


@native
def test_awkward_gradients_and_slices():
    fused = torch.randn(LIMITS.num_queries, 8, 83)[..., 2:82]
    leaves = list(fused.split([4, 2, 2], 1))
    for name, gradient in awkward_gradients(leaves[0].shape, torch.float32):
        actual = with_gradients(attend, leaves, LIMITS, [gradient], impl="native")
        dense = [x.contiguous() for x in leaves]
        expected = with_gradients(attend, dense, LIMITS, [gradient.contiguous()], impl="native")
        for a, b in zip(actual, expected, strict=True):
            assert_bitwise_equal(a, b, name)


@native
def test_compiles_whole_and_is_a_sound_op():
    leaves = [x.requires_grad_() for x in leaves_of(LIMITS, (4, 2), 20)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    upstream = upstream_of(leaves)
    for a, b in zip(
        with_gradients(compiled, leaves, LIMITS, upstream),
        with_gradients(attend, leaves, LIMITS, upstream),
        strict=True,
    ):
        assert_bitwise_equal(a, b)
    limits = LIMITS.kv_start, LIMITS.kv_end, LIMITS.q_start, LIMITS.q_end
    opcheck(torch.ops.lumos_kernels.frame_attention.default, (*(x.detach() for x in leaves), *limits, 0.2, "auto"))


@pytest.mark.parametrize("head_dim", [1, 48, 80, 127, 128, 144, 1000])
def test_the_predicates_say_what_runs(head_dim):
    assert OP.refusal("native", Problem("cpu", torch.float32, head_dim)) == library.refusal()
    refused = OP.refusal("triton", Problem("cuda", torch.bfloat16, head_dim, "sm_90"))
    assert head_dim > 128 or refused in (None, "triton is not installed")
    assert head_dim <= 128 or refused == f"computes head sizes up to 128, not {head_dim}"


def test_the_slow_reference_at_a_large_head_size_is_said_once_as_a_warning(caplog, monkeypatch):
    # As where triton is installed.
    monkeypatch.setattr(dispatch, "runs_triton", lambda problem: None if problem.device == "cuda" else "runs GPUs")
    caplog.set_level(logging.INFO, "lumos_kernels")
    dispatch._log_choice.cache_clear()
    dispatch._choose.cache_clear()
    for gpu in (0, 1, 0):
        dispatch._choose("frame_attention", "auto", None, Problem("cuda", torch.bfloat16, 160, "sm_90", gpu), False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith("frame_attention on cuda uses the slow reference at head size 160 (triton: computes")
    assert "triton: computes head sizes up to 128, not 160" in message
    caplog.clear()
    dispatch._choose("frame_attention", "auto", None, Problem("cpu", torch.float64, 160), False)
    assert [record.levelno for record in caplog.records] == [logging.INFO]  # no head size would help
    dispatch._log_choice.cache_clear()
    dispatch._choose.cache_clear()
