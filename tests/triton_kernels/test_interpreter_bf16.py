"""The corrected bf16 interpreter is right where it computes, and raises where it cannot."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests the interpreter")


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


def test_casts_round_to_nearest_even_like_torch():
    """Every bf16 value, the points half-way to the next one and their neighbours, infinities and NaN."""
    bits = torch.arange(2**16, dtype=torch.int64)[:, None] * 2**16 + torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    )
    x = bits.flatten().to(torch.uint32).view(torch.float32)
    x = torch.cat([x, x.new_zeros(2**19 - x.numel())])
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, x.numel())
    expected = x.to(torch.bfloat16)
    same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
    assert same.all()
    back = torch.empty_like(out, dtype=torch.float32)
    _cast_kernel[(1,)](out, back, out.numel())
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)))


def test_dot_of_bf16_is_that_of_the_same_numbers_in_fp32():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=1e-5)


@triton.jit
def _arithmetic_kernel(x_ptr, out_ptr, WHICH: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i)
    if WHICH == "add":
        x = x + x
    elif WHICH == "multiply":
        x = x * x
    elif WHICH == "negate":
        x = -x
    elif WHICH == "compare":
        x = tl.where(x > x, x, x)
    elif WHICH == "absolute":
        x = tl.abs(x)
    elif WHICH == "exponential":
        x = tl.exp2(x)
    elif WHICH == "fma":
        x = tl.fma(x, x, x)
    elif WHICH == "sum":
        x = tl.sum(x, axis=0) + tl.zeros([16], tl.float32)
    tl.store(out_ptr + i, x)


@pytest.mark.parametrize("which", ["add", "multiply", "negate", "compare", "absolute", "exponential", "fma", "sum"])
def test_arithmetic_in_bf16_raises(which):
    x = torch.randn(16).bfloat16()
    out = torch.empty_like(x)
    with pytest.raises(InterpreterError):
        _arithmetic_kernel[(1,)](x, out, which)


def test_the_same_arithmetic_in_fp32_does_not_raise():
    x = torch.randn(16)
    for which in ("add", "multiply", "negate", "compare", "absolute", "exponential", "fma", "sum"):
        _arithmetic_kernel[(1,)](x, torch.empty_like(x), which)


def test_a_bf16_copy_needs_no_arithmetic():
    x = torch.randn(16).bfloat16()
    out = torch.empty_like(x)
    _arithmetic_kernel[(1,)](x, out, "none")
    assert torch.equal(out, x)
