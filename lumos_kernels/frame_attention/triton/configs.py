"""How the kernels are cut: one configuration for each kernel, architecture, head size and element size.

A configuration comes from tuned.py where that has one. The tuner writes it after measuring on a GPU (python -m
lumos_kernels.frame_attention.triton.tune). Else it comes from DEFAULTS, chosen by arithmetic and by what ptxas makes of
them; docs/kernels.md says why. Nothing is measured at run time: a call inside a CUDA graph's capture launches what a
call outside of it launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...launch import LaunchConfig
from . import tuned
from .primitives import descriptor_rank, input_precision, operand, padded_head_dim

KERNELS = ("forward", "dkdv", "dq", "fused")
ARCHS = ("sm_80", "sm_90", "sm_100")
HEAD_DIMS = (32, 64, 96, 128)


@dataclass(frozen=True, kw_only=True)
class Config(LaunchConfig):
    """The tiles of a kernel.

    block_m: queries of a tile, a divisor of primitives.MAX_BLOCK.
    block_n: keys of a tile.
    descriptors: tiles come through host tensor descriptors (the copy engine, sm_90 and later) instead of pointers.
    """

    block_m: int
    block_n: int
    descriptors: bool


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, descriptors: bool) -> Config:
    return Config(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, descriptors=descriptors)


# (kernel, architecture) -> head size -> configuration, for bf16 and fp16: block_m, block_n, warps, stages, descriptors.
# All compile without spills and without serialised wgmma on triton 3.6.0 (sm_90) and 3.7.1 (all three). None was
# measured yet.
DEFAULTS: Mapping[tuple[str, str], Mapping[int, Config]] = {
    ("forward", "sm_80"): {
        32: _config(128, 64, 8, 3, False),
        64: _config(128, 64, 8, 3, False),
        96: _config(128, 64, 8, 2, False),
        128: _config(128, 64, 8, 2, False),
    },
    ("forward", "sm_90"): {
        32: _config(128, 128, 4, 2, True),
        # 188 registers: two programs on an SM, each of which has its exponentials (544 clocks of MUFU a tile) run under
        # the other's matmuls (512). 128 keys and 4 warps need more than 255 registers, so ptxas waits after each wgmma.
        # 64 queries would read 64 bytes of K and V for each clock of matmuls, more than L2 gives; 8 warps at 128 x 128
        # are one program on an SM, in lock step.
        64: _config(128, 64, 4, 3, True),
        96: _config(128, 128, 8, 2, True),
        128: _config(128, 128, 8, 2, True),
    },
    ("forward", "sm_100"): {
        32: _config(128, 128, 8, 2, True),
        64: _config(128, 128, 8, 2, True),
        96: _config(128, 128, 8, 2, True),
        128: _config(128, 128, 8, 2, True),
    },
    ("dkdv", "sm_80"): {
        32: _config(64, 64, 4, 2, False),
        64: _config(32, 64, 4, 2, False),
        96: _config(64, 64, 8, 1, False),
        128: _config(64, 64, 8, 1, False),
    },
    ("dkdv", "sm_90"): {
        32: _config(64, 128, 8, 2, True),
        64: _config(64, 128, 8, 2, True),
        # Left operands stay in registers here. 32 x 64 and 64 x 64 with 4 warps and 32 x 128 with 8, in two stages,
        # spill or serialise wgmma.
        96: _config(64, 64, 8, 2, True),
        # Two programs on an SM (253 registers, 64 KB), each of which waits for its tiles while the other computes. With
        # two stages triton 3.6.0 spills 30. 8 warps exchange p and ds through shared memory, and their 64 x 32 matmuls
        # read both operands from there: 1,664 clocks of it for 1,024 of matmuls, where this one takes 1,024.
        128: _config(64, 64, 4, 1, True),
    },
    ("dkdv", "sm_100"): {
        32: _config(64, 128, 8, 2, True),
        64: _config(64, 128, 8, 2, True),
        96: _config(64, 64, 8, 2, True),
        128: _config(64, 64, 8, 2, True),
    },
    ("dq", "sm_80"): {
        32: _config(128, 64, 8, 2, False),
        64: _config(64, 32, 4, 2, False),
        96: _config(64, 64, 4, 2, False),
        128: _config(64, 64, 4, 2, False),
    },
    ("dq", "sm_90"): {
        32: _config(128, 64, 8, 2, True),
        64: _config(128, 64, 8, 2, True),
        96: _config(128, 64, 8, 2, True),
        128: _config(128, 64, 8, 2, True),
    },
    ("dq", "sm_100"): {
        32: _config(128, 128, 8, 2, True),
        64: _config(128, 128, 8, 2, True),
        96: _config(128, 64, 8, 2, True),
        128: _config(128, 64, 8, 2, True),
    },
    ("fused", "sm_80"): {
        32: _config(64, 32, 4, 2, False),
        64: _config(64, 32, 4, 2, False),
        96: _config(64, 64, 8, 1, False),
        128: _config(64, 64, 8, 2, False),
    },
    ("fused", "sm_90"): {
        32: _config(64, 128, 8, 2, True),
        64: _config(64, 128, 8, 2, True),
        96: _config(64, 64, 8, 2, True),
        128: _config(64, 64, 8, 2, True),
    },
    ("fused", "sm_100"): {
        32: _config(64, 128, 8, 2, True),
        64: _config(64, 128, 8, 2, True),
        96: _config(64, 64, 8, 2, True),
        128: _config(64, 64, 8, 2, True),
    },
}

# fp32 is there to be right, not fast. Its matmuls run on the FMA units, whose operands all have to fit in registers.
FP32 = _config(32, 32, 8, 1, False)


def family(arch: str | None) -> str:
    """Return the architecture whose configurations this one takes. No GPU (the interpreter) takes those of sm_90.

    The configurations of sm_80 need no more than the 99 KB of shared memory that sm_86, sm_89 and sm_120 have.
    """
    if arch is None or arch == "sm_90":
        return "sm_90"
    return "sm_100" if arch in ("sm_100", "sm_103") else "sm_80"


def architecture(x: Tensor) -> str | None:
    """Return the architecture of the tensor's GPU, e.g. "sm_90", None for a CPU tensor."""
    if not x.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def choose(kernel: str, q: Tensor) -> Config:
    """Return the configuration of one of KERNELS for q's architecture, head size and dtype."""
    if q.dtype == torch.float32:
        return FP32
    arch, head_dim = family(architecture(q)), q.shape[2]
    measured = tuned.CONFIGS.get((kernel, arch, head_dim))
    return DEFAULTS[kernel, arch][head_dim] if measured is None else Config(**measured)


def fuses_backward(q: Tensor) -> bool:
    """Return whether the fused backward was measured to be faster here than the deterministic one.

    The fused one is a single pass with fp32 atomics (5 matmuls), the deterministic one has two kernels (7 matmuls).
    """
    return (family(architecture(q)), q.shape[2]) in tuned.FUSED_BACKWARD


def operands(
    tensors: Sequence[Tensor], blocks: Sequence[int], config: Config
) -> tuple[list[Tensor | TensorDescriptor], list[tuple[int, ...]]]:
    """Return the kernels' views of tensors [T, H, D] with tiles of `blocks` rows, and the tensors' strides."""
    rank = descriptor_rank(tensors[0].shape[2]) if config.descriptors else 0
    pairs = [operand(x, block, rank) for x, block in zip(tensors, blocks, strict=True)]
    return [view for view, _ in pairs], [strides for _, strides in pairs]


def options(config: Config, q: Tensor, int64: bool) -> dict[str, object]:
    """Return the arguments that every kernel with tiles gets by name."""
    return {
        "D": q.shape[2],
        "PADDED_D": padded_head_dim(q.shape[2]),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "RANK": descriptor_rank(q.shape[2]) if config.descriptors else 0,
        "INT64": int64,
        "PRECISION": input_precision(q.dtype),
        **config.options(fp_fusion=True),
    }
