"""Which configuration a kernel takes, and which of the two backwards runs.

A configuration comes from the first of these that has one: the user's table, which the tuner writes on the machine at
hand (python -m lumos_kernels.frame_attention.triton.tune), the table in tuned.py, which is committed, and DEFAULTS.
Nothing is measured at run time, and the tables are read once a process: a call inside a CUDA graph's capture launches
what a call outside of it launches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import dispatch
from . import measured
from .defaults import ARCHS, DEFAULTS, FP32, HEAD_DIMS, KERNELS, Config
from .primitives import descriptor_rank, input_precision, operand, padded_head_dim

__all__ = ["ARCHS", "DEFAULTS", "FP32", "HEAD_DIMS", "KERNELS", "Config"]


def family(arch: str | None) -> str:
    """Return the architecture whose configurations this one takes. No GPU (the interpreter) takes those of sm_90.

    The configurations of sm_80 need no more than the 99 KB of shared memory that sm_86, sm_89 and sm_120 have.
    """
    if arch is None or arch == "sm_90":
        return "sm_90"
    return "sm_100" if arch in ("sm_100", "sm_103") else "sm_80"


def architecture(x: Tensor) -> str | None:
    """Return the architecture of the tensor's GPU, e.g. "sm_90", None for a CPU tensor."""
    return dispatch.architecture(x.device.index) if x.is_cuda else None


@functools.cache
def table(gpu: int | None, arch: str) -> measured.Table:
    """Return what was measured for a GPU, the user's measurements before the committed ones. gpu: None for the CPU."""
    committed = measured.committed(arch)
    return committed if gpu is None else committed.updated(measured.of_user(measured.machine(gpu), arch))


def _table_for(q: Tensor) -> tuple[measured.Table, str]:
    arch = family(architecture(q))
    return table(q.device.index if q.is_cuda else None, arch), arch


def choose(kernel: str, q: Tensor) -> Config:
    """Return the configuration of one of KERNELS for q's GPU, head size and dtype."""
    if q.dtype == torch.float32:
        return FP32
    found, arch = _table_for(q)
    head_dim = q.shape[2]
    return found.configs.get((kernel, head_dim)) or DEFAULTS[kernel, arch][head_dim]


def fuses_backward(q: Tensor) -> bool:
    """Return whether the fused backward was measured to be faster here than the deterministic one.

    The fused one is a single pass with fp32 atomics (5 matmuls), the deterministic one has two kernels (7 matmuls). In
    fp32 neither was measured.
    """
    return q.dtype != torch.float32 and _table_for(q)[0].fused.get(q.shape[2], False)


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
