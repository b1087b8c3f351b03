"""The backward pass: the launches of the kernels of backward_kernels.py, which has the algebra."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import self_check, tensors
from ...dispatch import Problem
from ...layout import RowLimits
from ..contract import FUSED, OP, Gradients, Inputs, OutputGradients, Outputs
from . import configs
from .backward_kernels import _delta_kernel, _key_kernel, _query_kernel, _round_kernel
from .defaults import Config
from .primitives import LOG2_E, MAX_BLOCK, describable, heads_per_section, padded_head_dim

ROUND_BLOCK = 1024  # elements of dq that a program of _round_kernel takes


class _Operands(NamedTuple):
    """What every kernel after the first one reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_o: Tensor
    statistics: Tensor  # fp32 [2, H, padded], by _delta_kernel
    row_limits: Tensor  # int32, by _delta_kernel
    limits: RowLimits
    scale: float


def _statistics(inputs: Inputs, outputs: Outputs, grad: OutputGradients, block_m: int) -> tuple[Tensor, Tensor]:
    """Return the statistics and limits that _delta_kernel writes. One launch; every element is written."""
    o, lse = outputs
    limits = inputs.limits
    queries, heads, head_dim = o.shape
    padded = triton.cdiv(queries, MAX_BLOCK) * MAX_BLOCK
    result = torch.empty((2, heads, padded), dtype=torch.float32, device=o.device)
    row_limits = torch.empty((2 * (padded + padded // block_m),), dtype=torch.int32, device=o.device)
    read_or_written = grad.o, o, lse, result, *(() if grad.lse is None else (grad.lse,))
    _delta_kernel[(padded // MAX_BLOCK, heads)](
        grad.o,
        o,
        lse,
        grad.lse,
        result,
        row_limits,
        limits.kv_start.contiguous(),
        limits.kv_end.contiguous(),
        grad.o.stride()[:2],
        o.stride()[:2],
        *((0, 0) if grad.lse is None else grad.lse.stride()),
        queries,
        limits.num_keys,
        padded,
        heads,
        D=head_dim,
        PADDED_D=padded_head_dim(head_dim),
        BLOCK=MAX_BLOCK,
        BLOCK_M=block_m,
        INT64=tensors.needs_int64_offsets(*read_or_written),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return result, row_limits


def backward(inputs: Inputs, outputs: Outputs, grad: OutputGradients, *, deterministic: bool) -> Gradients:
    """Return the gradients. Nothing waits for the GPU.

    The fused backward serves where nobody asks for equal bits, a measurement prefers it and its self-check has passed.
    """
    if not deterministic and configs.fuses_backward(inputs.q):
        problem = Problem.of(inputs.q, inputs.q.shape[2])
        if self_check.allows(OP, "triton", problem, FUSED):
            return backward_fused(inputs, outputs, grad)
    return backward_deterministic(inputs, outputs, grad)


def backward_deterministic(
    inputs: Inputs,
    outputs: Outputs,
    grad: OutputGradients,
    *,
    dkdv: Config | None = None,
    dq: Config | None = None,
) -> Gradients:
    """Return the gradients in three launches. dkdv, dq: configurations, those of configs.choose where not given."""
    dkdv, dq = dkdv or configs.choose("dkdv", inputs.q), dq or configs.choose("dq", inputs.q)
    result = _new_gradients(inputs)
    if inputs.q.numel() and inputs.k.numel():
        with tensors.device_guard(inputs.q):
            operands = _operands(inputs, outputs, grad, dkdv.block_m, dkdv.descriptors or dq.descriptors)
            _key_pass(dkdv, operands, result, None)
            _query_pass(dq, operands, result.q)
    return result


def backward_fused(
    inputs: Inputs, outputs: Outputs, grad: OutputGradients, *, config: Config | None = None
) -> Gradients:
    """Return the gradients in two launches, a memset, and one that rounds dq, whose bits differ from run to run.

    config: a configuration, that of configs.choose where not given.
    """
    config = config or configs.choose("fused", inputs.q)
    result = _new_gradients(inputs)
    dq = result.q
    if inputs.q.numel() and inputs.k.numel():
        with tensors.device_guard(dq):
            operands = _operands(inputs, outputs, grad, config.block_m, config.descriptors)
            dq_sum = torch.zeros(dq.shape, dtype=torch.float32, device=dq.device)
            _key_pass(config, operands, result, dq_sum)
            grid, int64 = (triton.cdiv(dq.numel(), ROUND_BLOCK),), tensors.needs_int64_offsets(dq)
            _round_kernel[grid](
                dq_sum, dq, inputs.scale, dq.numel(), BLOCK=ROUND_BLOCK, INT64=int64, num_warps=4, enable_fp_fusion=True
            )
    return result


def _new_gradients(inputs: Inputs) -> Gradients:
    """Return gradients for the kernels to write, zeros where there is nothing to launch."""
    q, k, v = inputs[:3]
    allocate = torch.empty if q.numel() and k.numel() else torch.zeros
    return Gradients(*(allocate(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)))


def _operands(inputs: Inputs, outputs: Outputs, grad: OutputGradients, block_m: int, descriptors: bool) -> _Operands:
    """Return what the kernels read. block_m: the queries of a tile of the kernel that writes dk and dv."""
    q, k, v, limits, scale = inputs
    (statistics, row_limits), grad_o = _statistics(inputs, outputs, grad, block_m), grad.o
    if descriptors:
        q, k, v, grad_o = map(describable, (q, k, v, grad_o))
    return _Operands(q, k, v, grad_o, statistics, row_limits, limits, scale)


def _key_pass(config: Config, operands: _Operands, result: Gradients, dq_sum: Tensor | None) -> None:
    """Write dk and dv, and add to dq_sum where it is given."""
    q, k, v, grad_o, statistics, row_limits, limits, scale = operands
    keys, kv_heads, head_dim = k.shape
    heads = q.shape[1]
    m, n = config.block_m, config.block_n
    tiled: tuple[Tensor, ...] = q, k, v, grad_o, result.k, result.v
    blocks: tuple[int, ...] = m, n, n, m, n, n
    if dq_sum is not None:
        tiled, blocks = (*tiled, dq_sum), (*blocks, m)
    views, strides = configs.operands(tiled, blocks, config)
    if dq_sum is None:
        views, strides = [*views, None], [*strides, (0, 0)]
    # A program streams q and the gradient of o here, for all query heads of its kv head.
    per_section = heads_per_section(kv_heads, heads // kv_heads * q.shape[0], head_dim, q.element_size())
    _key_kernel[(triton.cdiv(keys, n) * kv_heads,)](
        *views,
        statistics,
        row_limits,
        limits.q_start.contiguous(),
        limits.q_end.contiguous(),
        *strides,
        q.shape[0],
        statistics.shape[2],
        keys,
        kv_heads,
        heads // kv_heads,
        per_section,
        scale,
        scale * LOG2_E,
        FUSED=dq_sum is not None,
        **configs.options(config, q, tensors.needs_int64_offsets(*tiled, statistics)),
    )


def _query_pass(config: Config, operands: _Operands, dq: Tensor) -> None:
    q, k, v, grad_o, statistics, _, limits, scale = operands
    queries, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    m, n = config.block_m, config.block_n
    tiled = q, k, v, grad_o, dq
    views, strides = configs.operands(tiled, (m, n, n, m, m), config)
    _query_kernel[(triton.cdiv(queries, m) * heads,)](
        *views,
        statistics,
        limits.kv_start.contiguous(),
        limits.kv_end.contiguous(),
        *strides,
        queries,
        statistics.shape[2],
        keys,
        heads,
        group,
        group * heads_per_section(kv_heads, keys, head_dim, k.element_size()),
        scale,
        scale * LOG2_E,
        **configs.options(config, q, tensors.needs_int64_offsets(*tiled, statistics)),
    )
