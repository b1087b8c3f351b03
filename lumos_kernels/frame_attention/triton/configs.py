"""How the kernels are cut: one configuration for each kernel, architecture, head size and element size.

A configuration comes from tuned.py, which the tuner writes after measuring on a GPU (python -m
lumos_kernels.frame_attention.triton.tune), and else from DEFAULTS, chosen by arithmetic and by what ptxas makes of
them. docs/kernels.md says why each is what it is; nothing is measured or compiled twice at run time, so that a call
inside a CUDA graph's capture launches what a call outside does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lumos_kernels.frame_attention.triton import tuned
from lumos_kernels.frame_attention.triton.primitives import (
    descriptor_rank,
    input_precision,
    operand,
    padded_head_dim,
)

KERNELS = ("forward", "dkdv", "dq", "fused")
ARCHS = ("sm_80", "sm_90", "sm_100")
HEAD_DIMS = (32, 64, 96, 128)


class Config(NamedTuple):
    """A kernel's tile and launch options."""

    block_m: int  # queries; divides primitives.MAX_BLOCK
    block_n: int  # keys
    num_warps: int
    num_stages: int  # of the software pipeline over the loop's tiles
    descriptors: bool  # host tensor descriptors (the copy engine, sm_90 and later) instead of pointers


# (kernel, architecture) -> head size -> configuration, for bf16 and fp16.
DEFAULTS: Mapping[tuple[str, str], Mapping[int, Config]] = {
    ("forward", "sm_80"): {
        32: Config(128, 64, 8, 3, False),
        64: Config(128, 64, 8, 3, False),
        96: Config(128, 64, 8, 2, False),
        128: Config(128, 64, 8, 2, False),
    },
    ("forward", "sm_90"): {
        32: Config(128, 128, 4, 2, True),
        64: Config(128, 128, 4, 2, True),
        96: Config(128, 128, 8, 2, True),
        128: Config(128, 128, 8, 2, True),
    },
    ("forward", "sm_100"): {
        32: Config(128, 128, 8, 2, True),
        64: Config(128, 128, 8, 2, True),
        96: Config(128, 128, 8, 2, True),
        128: Config(128, 128, 8, 2, True),
    },
    ("dkdv", "sm_80"): {
        32: Config(64, 64, 4, 2, False),
        64: Config(32, 64, 4, 2, False),
        96: Config(64, 64, 8, 1, False),
        128: Config(64, 64, 8, 1, False),
    },
    ("dkdv", "sm_90"): {
        32: Config(64, 128, 8, 2, True),
        64: Config(64, 128, 8, 2, True),
        96: Config(32, 128, 8, 2, True),
        128: Config(64, 64, 4, 2, True),
    },
    ("dkdv", "sm_100"): {
        32: Config(64, 128, 8, 2, True),
        64: Config(64, 128, 8, 2, True),
        96: Config(64, 64, 8, 2, True),
        128: Config(64, 64, 8, 2, True),
    },
    ("dq", "sm_80"): {
        32: Config(128, 64, 8, 2, False),
        64: Config(64, 32, 4, 2, False),
        96: Config(64, 64, 4, 2, False),
        128: Config(64, 64, 4, 2, False),
    },
    ("dq", "sm_90"): {
        32: Config(128, 64, 8, 2, True),
        64: Config(128, 64, 8, 2, True),
        96: Config(128, 64, 8, 2, True),
        128: Config(128, 64, 8, 2, True),
    },
    ("dq", "sm_100"): {
        32: Config(128, 128, 8, 2, True),
        64: Config(128, 128, 8, 2, True),
        96: Config(128, 64, 8, 2, True),
        128: Config(128, 64, 8, 2, True),
    },
    ("fused", "sm_80"): {
        32: Config(64, 32, 4, 2, False),
        64: Config(64, 32, 4, 2, False),
        96: Config(64, 64, 8, 1, False),
        128: Config(64, 64, 8, 2, False),
    },
    ("fused", "sm_90"): {
        32: Config(64, 128, 8, 2, True),
        64: Config(64, 128, 8, 2, True),
        96: Config(64, 64, 8, 2, True),
        128: Config(64, 64, 8, 2, True),
    },
    ("fused", "sm_100"): {
        32: Config(64, 128, 8, 2, True),
        64: Config(64, 128, 8, 2, True),
        96: Config(64, 64, 8, 2, True),
        128: Config(64, 64, 8, 2, True),
    },
}

# fp32 is to be right, not fast: its matmuls run on the FMA units, whose operands all have to fit in registers.
FP32 = Config(32, 32, 8, 1, False)


def family(arch: str | None) -> str:
    """Whose configurations an architecture takes, e.g. "sm_90". None (no GPU, the interpreter): those of sm_90.

    The sm_80 ones need no more than the 99 KB of shared memory that sm_86, sm_89 and sm_120 have.
    """
    if arch is None or arch == "sm_90":
        return "sm_90"
    return "sm_100" if arch in ("sm_100", "sm_103") else "sm_80"


def architecture(x: Tensor) -> str | None:
    if not x.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def choose(kernel: str, q: Tensor) -> Config:
    """The configuration of one of KERNELS for q's architecture, head size and dtype."""
    if q.dtype == torch.float32:
        return FP32
    arch, head_dim = family(architecture(q)), q.shape[2]
    measured = tuned.CONFIGS.get((kernel, arch, head_dim))
    return DEFAULTS[kernel, arch][head_dim] if measured is None else Config(*measured)


def fuses_backward(q: Tensor) -> bool:
    """Whether the backward of one pass with fp32 atomics (5 matmuls) was measured to be faster here than the
    deterministic one of two kernels (7 matmuls).
    """
    return (family(architecture(q)), q.shape[2]) in tuned.FUSED_BACKWARD


def operands(
    tensors: Sequence[Tensor], blocks: Sequence[int], config: Config
) -> tuple[list[Tensor | TensorDescriptor], list[tuple[int, int]]]:
    """The kernels' views of tensors [T, H, D] with tiles of so many rows, and their strides."""
    rank = descriptor_rank(tensors[0].shape[2]) if config.descriptors else 0
    pairs = [operand(x, block, rank) for x, block in zip(tensors, blocks, strict=True)]
    return [view for view, _ in pairs], [strides for _, strides in pairs]


def options(config: Config, q: Tensor, int64: bool) -> dict:
    """The arguments that every kernel with tiles gets by name."""
    return {
        "D": q.shape[2],
        "PADDED_D": padded_head_dim(q.shape[2]),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "RANK": descriptor_rank(q.shape[2]) if config.descriptors else 0,
        "INT64": int64,
        "PRECISION": input_precision(q.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
