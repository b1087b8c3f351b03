"""Calls each compiled op with arguments that fit, then with each tensor spoilt in turn: other sizes, strides, dtypes.

test_compiled_ops.py runs this in a process of its own. Prints how many calls were refused, and how many computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lumos_kernels import library

T, HEADS, D, WIDTH, CLASSES = 40, 2, 64, 48, 32


def fitting(isa: int) -> dict[str, tuple[Any, ...]]:
    """Arguments that fit, by op."""
    q, k, positions = torch.randn(T, HEADS, D), torch.randn(T, 1, D), torch.zeros(3, T, dtype=torch.int32)
    norm, lse = torch.ones(1, D), torch.zeros(HEADS, T)
    start, end = torch.zeros(T, dtype=torch.int32), torch.arange(1, T + 1, dtype=torch.int32)
    attention = q, k, k
    rope = q, k, positions, norm, norm, norm, norm, torch.ones(D // 2), 1e-5, isa
    logits, targets = torch.randn(T, CLASSES), torch.zeros(T, dtype=torch.int64)
    stats = torch.zeros(T, 1), torch.zeros(T, 1), torch.zeros(T), torch.zeros(T, dtype=torch.bool)
    drawn = torch.zeros(T), torch.zeros(T, dtype=torch.int64), torch.zeros(T), torch.zeros(T)
    drawn = *drawn, torch.ones(T, dtype=torch.float64)
    x, weight, row = torch.randn(T, WIDTH), torch.randn(CLASSES, WIDTH), torch.ones(T)
    calls = {
        "frame_attention_forward": (*attention, start, end, 0.1, isa),
        "frame_attention_backward": (q, lse, *attention, q, lse, start, end, 0.1, isa),
        "frame_layout": (torch.zeros(T, dtype=torch.int64), torch.tensor([0, 7, T], dtype=torch.int32)),
        "mm_rope_forward": rope,
        "mm_rope_backward": (q, k, *rope),
        "tube_masked_loss_reduce": (logits, targets, 0, 0, *stats, logits, isa),
        "tube_masked_loss_finish": (targets, row, 0.1, CLASSES, CLASSES, *stats, logits, isa),
        "tube_masked_loss_gradient": (logits, targets, 0, row, row, row, logits.clone(), isa),
        "masked_sample_reduce": (logits, torch.zeros(T, 2, dtype=torch.int64), False, 1.0, 1.0, 0, *drawn, isa),
        "masked_sample_finish": (*drawn, row, isa),
        "pack_rows_fp32": (x, isa),
        "packed_matmul_fp32": (torch.ops.lumos_native.pack_rows_fp32(x, isa), weight, torch.zeros(T, CLASSES), isa),
    }
    packed = torch.ops.lumos_native.pack_rows_bf16(x.bfloat16(), isa)
    if packed.numel():
        calls["packed_matmul_bf16"] = packed, weight.bfloat16(), torch.zeros(T, CLASSES), isa
        calls["add_outer_bf16"] = logits.bfloat16(), x.bfloat16(), torch.zeros(CLASSES, WIDTH), isa
    return calls


def spoilt(x: Tensor) -> Iterator[Tensor]:
    """The tensor with other sizes, strides or another dtype."""
    yield x.new_zeros(())
    yield x.new_empty(0)
    yield x[None]
    for dim in range(x.dim()):
        yield x.narrow(dim, 0, 1).contiguous()
        yield x.narrow(dim, 0, 0).contiguous()
        yield torch.cat([x, x], dim)
        yield x.narrow(dim, 0, 1).expand_as(x)
        yield x.repeat_interleave(2, dim).narrow(dim, 0, x.shape[dim])
    yield x.transpose(0, -1)
    for dtype in (torch.float16, torch.int8, torch.float64, torch.bool):
        yield x.to(dtype)


def main() -> None:
    torch.set_num_threads(1)
    counts = {"refused": 0, "computed": 0}
    for isa in map(library.isa_value, library.isas()):
        for name, arguments in fitting(isa).items():
            op = getattr(torch.ops.lumos_native, name)
            op(*arguments)
            for place in (n for n, x in enumerate(arguments) if isinstance(x, Tensor)):
                for value in spoilt(arguments[place]):
                    print(f"{name}, argument {place}: {value.dtype} {list(value.shape)} {value.stride()}", flush=True)
                    fresh = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
                    try:
                        op(*fresh[:place], value, *fresh[place + 1 :])
                    except RuntimeError:
                        counts["refused"] += 1
                    else:
                        counts["computed"] += 1
    print(counts)


if __name__ == "__main__":
    main()
