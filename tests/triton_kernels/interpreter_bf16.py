"""Makes Triton's interpreter right, or loud, in bfloat16.

Up to Triton 3.9 it holds bf16 as uint16 and computes with those integers: tl.dot, +, -, *, comparisons and reductions
of bf16 are garbage without a word, and casts from fp32 truncate where hardware rounds to nearest even. Loads, stores
and casts to fp32 are right. After install() casts round and tl.dot is right; bf16 arithmetic, which our kernels never
do (they cast to fp32 after each load), raises.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _to_fp32(handle):
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _to_bf16(handle):
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(handle.data), np.uint16(0x7FC0), nearest_even), tl.bfloat16)


def install() -> None:
    """Patches the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return _to_bf16(source)
        if _is_bf16(source) and to.scalar == tl.float32:
            return _to_fp32(source)
        if _is_bf16(source) or to.scalar == tl.bfloat16:
            raise TypeError(f"the interpreter cannot cast {source.dtype.scalar} to {to.scalar}: go through fp32")
        return cast(self, source, to)

    def create_dot(self, a, b, accumulator, *options):
        return dot(self, _to_fp32(a), _to_fp32(b), accumulator, *options)

    builder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):  # lambdas over the old cast_impl in some versions
        setattr(builder, name, cast_impl)
    builder.create_dot = create_dot
    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_fabs"):
        setattr(builder, name, _refusing(getattr(builder, name), name))
    reduce = interpreter.ReduceScanOpInterface
    check = reduce.check_tensor

    def check_tensor(self, tensors):
        if any(_is_bf16(tensor.handle) for tensor in tensors):
            raise TypeError("the interpreter cannot reduce bfloat16: cast to fp32 first")
        check(self, tensors)

    reduce.check_tensor = check_tensor


def _refusing(operation, name: str):
    def guarded(self, *operands):
        if any(isinstance(operand, interpreter.TensorHandle) and _is_bf16(operand) for operand in operands):
            raise TypeError(f"the interpreter cannot compute {name} in bfloat16: cast to fp32 first")
        return operation(self, *operands)

    return guarded
