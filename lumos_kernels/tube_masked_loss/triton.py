"""tube_masked_loss on GPUs: the library's matmuls, and one Triton pass over the logits between them.

Compiled for sm_80, sm_90 and sm_100, run in the interpreter, not yet run on a GPU. With x a row of logits and m its
maximum, the pass makes
    total = sum exp(x - m),   lse = m + log(total),   nll = lse - x[target],
    gradient = softmax * on_lse + (softmax - one_hot(target)) * on_nll,   softmax = exp(x - m) / total,
with on_nll = token_weight and on_lse = 2 * z_loss_weight * lse. A row whose target is no class gets zeros instead.

Target rows come in chunks. A chunk's logits are rounded to hidden's dtype, as a model's lm_head rounds them. The pass
reads a row twice: for its statistics, and then to put the gradient of each logit in its place, from which two more
matmuls take it. dW is summed over the chunks in fp32.

Legend: N target rows, K classes, C width of the hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_types as kt
from .. import limits, tensors
from ..launch import RowConfig, equal_chunk
from .contract import Inputs, Outputs, RowLoss, StatisticGradients, Wanted

# Bytes of a chunk: 4,352 rows of 64,000 bf16 classes and 2,048 or 3,072 channels. Fewer rows would load and store the
# fp32 sums of dW, 0.5 GB, more often: 0.35 ms of HBM beside the 4 ms of a chunk's matmuls (H100, by arithmetic).
CHUNK_BYTES = 560 << 20
ROW_MULTIPLE = 128  # leaves no matmul tile half empty, and per-row data 16-byte aligned

# Bytes of a logit -> configuration of the loss pass. Chosen by arithmetic, not yet by measurement.
# A row of 64,000 bf16 is 128 KB. Kept in registers (one block of 65,536) it spills at least 180 times a thread, even
# with every register of an SM. So it is read twice, the second time from L2. That takes few programs with many warps:
# 2 programs on each of 132 SMs are 34 MB of rows, and 8 would be 135 MB, more than an H100's 50 MB of L2.
# Reading 1.5 TB/s with 0.7 us of latency needs 8 KB in flight on each SM, and a block keeps 32 KB in flight.
# ptxas would take up to 92 registers. Held to 64, which leaves room for the second program, it spills none.
LOSS = {
    2: RowConfig(block=16384, num_warps=16, max_registers=64),
    4: RowConfig(block=16384, num_warps=32, max_registers=64),
}
# The pass over recomputed logits reads once: small programs, each of which takes a part of a row.
GRADIENT = {2: RowConfig(block=4096, num_warps=4), 4: RowConfig(block=4096, num_warps=8)}
# Rows that are no multiple of 16 classes allow no wide accesses, and the addresses and masks of narrow ones cost
# registers. Their blocks are smaller by this factor.
NARROW = 4

# Smaller than every logit, but finite: the difference of two of them is 0, where two infinities would give NaN.
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _columns(start: kt.Scalar, BLOCK: tl.constexpr, VECTOR: tl.constexpr) -> kt.Block:
    """Return the columns of a block, int32 [BLOCK / VECTOR, VECTOR].

    A line is the 16 bytes that one thread loads, so sums along a line stay in the thread.
    """
    line = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return start + line + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _largest_and_sum(
    row_ptr: kt.Pointer, classes: kt.Scalar, BLOCK: tl.constexpr, VECTOR: tl.constexpr
) -> tuple[kt.Scalar, kt.Scalar]:
    """Return the largest logit of a row, and the sum of exp(logit - largest): an online softmax in every line."""
    largest = tl.full([BLOCK // VECTOR], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, classes, BLOCK):
        column = _columns(start, BLOCK, VECTOR)
        x = tl.load(row_ptr + column, mask=column < classes, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger[:, None]), axis=1)
        largest = larger
    top = tl.max(largest, axis=0)
    return top, tl.sum(total * tl.exp(largest - top), axis=0)


@triton.jit
def _occurs_before(
    row_ptr: kt.Pointer, value: kt.Scalar, end: kt.Scalar, classes: kt.Scalar, BLOCK: tl.constexpr, VECTOR: tl.constexpr
) -> kt.Scalar:
    """Return whether one of a row's logits before column `end` is `value`."""
    found = tl.zeros([BLOCK // VECTOR], tl.int32)
    for start in range(0, end, BLOCK):
        column = _columns(start, BLOCK, VECTOR)
        x = tl.load(row_ptr + column, mask=column < classes, other=-float("inf")).to(tl.float32)
        found = tl.maximum(found, tl.max(((x == value) & (column < end)).to(tl.int32), axis=1))
    return tl.max(found, axis=0) != 0


@triton.jit
def _put_gradient(
    row_ptr: kt.Pointer, start: kt.Scalar, classes: kt.Scalar, target: kt.Scalar, offset: kt.Scalar, scale: kt.Scalar,
    on_nll: kt.Scalar, on_lse: kt.Scalar, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
) -> None:  # fmt: skip
    """Overwrite logits x by the gradient of on_nll * nll + on_lse * lse, with softmax = scale * exp(x - offset)."""
    column = _columns(start, BLOCK, VECTOR)
    x = tl.load(row_ptr + column, mask=column < classes, other=-float("inf")).to(tl.float32)
    softmax = tl.exp(x - offset) * scale
    # The shorter softmax * (on_nll + on_lse) - on_nll loses all but a few digits where the target is nearly certain.
    gradient = tl.fma(softmax, on_lse, tl.where(column == target, softmax - 1.0, softmax) * on_nll)
    tl.store(row_ptr + column, gradient.to(row_ptr.dtype.element_ty), mask=column < classes)


@triton.jit
def _put_zeros(
    row_ptr: kt.Pointer, start: kt.Scalar, classes: kt.Scalar, BLOCK: tl.constexpr, VECTOR: tl.constexpr
) -> None:
    """Overwrite the logits of a row without a target by their gradient."""
    column = _columns(start, BLOCK, VECTOR)
    zeros = tl.zeros([BLOCK // VECTOR, VECTOR], row_ptr.dtype.element_ty)
    tl.store(row_ptr + column, zeros, mask=column < classes)


@triton.jit
def _loss_kernel(
    logits_ptr: kt.Pointer,
    targets_ptr: kt.Pointer,
    token_weight_ptr: kt.Pointer,
    nll_ptr: kt.Pointer,
    lse_ptr: kt.Pointer,
    correct_ptr: kt.Pointer,
    row_stride: kt.Scalar,
    classes: kt.Scalar,
    z_loss_weight: kt.Scalar,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Write a row's statistics, and the gradient of its loss in the place of its logits. A program takes a row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    given_target = tl.load(targets_ptr + row)  # compared before it loses its upper 32 bits
    if (given_target >= 0) & (given_target < classes):
        target = given_target.to(tl.int32)
        # This load comes before the first gradient is written: the reductions between them synchronise the warps.
        target_logit = tl.load(row_ptr + target).to(tl.float32)
        top, total = _largest_and_sum(row_ptr, classes, BLOCK, VECTOR)
        lse = top + tl.log(total)
        correct = target_logit == top
        if correct:  # equal logits are common in bf16, and only the first of them is the argmax
            correct = not _occurs_before(row_ptr, top, target, classes, BLOCK, VECTOR)
        tl.store(nll_ptr + row, (top - target_logit) + tl.log(total))  # exact, however far the logits are from 0
        tl.store(lse_ptr + row, lse)
        tl.store(correct_ptr + row, correct.to(tl.uint8))
        if WITH_GRADIENT:
            on_nll = 1.0
            if token_weight_ptr is not None:
                on_nll = tl.load(token_weight_ptr + row)
            on_lse = 2.0 * z_loss_weight * lse
            for start in range(0, classes, BLOCK // 2):  # a whole block would spill on sm_100
                _put_gradient(row_ptr, start, classes, target, top, 1.0 / total, on_nll, on_lse, BLOCK // 2, VECTOR)
    else:
        tl.store(nll_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if WITH_GRADIENT:
            for start in range(0, classes, BLOCK // 2):
                _put_zeros(row_ptr, start, classes, BLOCK // 2, VECTOR)


@triton.jit
def _gradient_kernel(
    logits_ptr: kt.Pointer,
    targets_ptr: kt.Pointer,
    lse_ptr: kt.Pointer,
    grad_nll_ptr: kt.Pointer,
    grad_lse_ptr: kt.Pointer,
    row_stride: kt.Scalar,
    classes: kt.Scalar,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Write the gradient of grad_nll * nll + grad_lse * lse in the place of a block of a row's logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, start = logits_ptr + row * row_stride, tl.program_id(1) * BLOCK
    target = tl.load(targets_ptr + row)  # compared before it loses its upper 32 bits
    if (target >= 0) & (target < classes):
        on_nll, on_lse = tl.load(grad_nll_ptr + row), tl.load(grad_lse_ptr + row)
        lse = tl.load(lse_ptr + row)
        _put_gradient(row_ptr, start, classes, target.to(tl.int32), lse, 1.0, on_nll, on_lse, BLOCK, VECTOR)
    else:
        _put_zeros(row_ptr, start, classes, BLOCK, VECTOR)


def forward(inputs: Inputs, loss: RowLoss, wanted: Wanted) -> Outputs:
    """Return the statistics and, where wanted, the gradients of the sum of the row losses.

    Three launches a chunk of rows, two more for each gradient; no host sync.
    """
    work = _Work(inputs, wanted)
    count, device = inputs.rows.shape, inputs.rows.device
    nll, lse = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    correct = torch.empty(count, dtype=torch.uint8, device=device)
    for part in work.chunks():
        logits = work.logits(part)
        with tensors.device_guard(logits):
            _loss_kernel[(len(logits),)](
                logits,
                inputs.targets[part],
                None if loss.token_weight is None else loss.token_weight[part],
                nll[part],
                lse[part],
                correct[part],
                logits.stride(0),
                logits.shape[1],
                loss.z_loss_weight,
                WITH_GRADIENT=wanted.hidden or wanted.weight is not None,
                **_options(LOSS, logits),
            )
        work.add(part, logits)
    return Outputs(nll, lse, correct.view(torch.bool), work.dhidden)


def backward(inputs: Inputs, lse: Tensor, grad: StatisticGradients, wanted: Wanted) -> Tensor | None:
    """Return and write the gradients of the statistics, given those that arrive there."""
    if not wanted.hidden and wanted.weight is None:
        return None
    work = _Work(inputs, wanted)
    for part in work.chunks():
        logits = work.logits(part)
        options = _options(GRADIENT, logits)
        grid = len(logits), triton.cdiv(logits.shape[1], options["BLOCK"])
        per_row = (x[part] for x in (inputs.targets, lse, *grad))
        with tensors.device_guard(logits):
            _gradient_kernel[grid](logits, *per_row, logits.stride(0), logits.shape[1], **options)
        work.add(part, logits)
    return work.dhidden


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Return the target rows of a chunk: a multiple of 128, at most CHUNK_BYTES where 128 rows fit."""
    most = limits.capped(CHUNK_BYTES, limits.current().chunk_bytes)
    return equal_chunk(rows, max(most // row_bytes // ROW_MULTIPLE, 1) * ROW_MULTIPLE, ROW_MULTIPLE)


def _options(table: Mapping[int, RowConfig], logits: Tensor) -> dict[str, int]:
    """Return the launch arguments that both kernels get by name."""
    config, classes = table[logits.element_size()], logits.shape[1]
    if classes % 16:
        config = dataclasses.replace(config, block=config.block // NARROW)
    config = config.fitted(classes)
    return {"BLOCK": config.block, "VECTOR": 16 // logits.element_size(), **config.options(fp_fusion=True)}


class _Work:
    """The matmuls of a call and their results. Beside the results it holds one chunk: logits, and rows of x or dx."""

    def __init__(self, inputs: Inputs, wanted: Wanted) -> None:
        self.inputs, self.dweight = inputs, wanted.weight
        hidden, device, (classes, width) = inputs.hidden, inputs.hidden.device, inputs.weight.shape
        self.size = chunk_rows(len(inputs.rows), (classes + width) * hidden.element_size())
        size = min(self.size, len(inputs.rows))
        self._x = torch.empty((size, width), dtype=hidden.dtype, device=device)
        self._logits = torch.empty((size, classes), dtype=hidden.dtype, device=device)
        self.dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if wanted.hidden else None

    def chunks(self) -> Iterator[slice]:
        rows = len(self.inputs.rows)
        return (slice(start, min(start + self.size, rows)) for start in range(0, rows, self.size))

    def logits(self, part: slice) -> Tensor:
        """Return [rows, K], in the place of the logits of the chunk before."""
        rows = self.inputs.rows[part]
        x = torch.index_select(self.inputs.hidden, 0, rows, out=self._x[: len(rows)])
        return torch.mm(x, self.inputs.weight.T, out=self._logits[: len(rows)])

    def add(self, part: slice, dlogits: Tensor) -> None:
        """Add a chunk's part of the gradients. dx takes the place of x, so the weight's gradient comes first."""
        x = self._x[: len(dlogits)]
        if self.dweight is not None:
            add_outer(self.dweight, dlogits.T, x, first=part.start == 0)
        if self.dhidden is not None:
            self.dhidden.index_copy_(0, self.inputs.rows[part], torch.mm(dlogits, self.inputs.weight, out=x))


def add_outer(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute total += a b in fp32, or total = a b where this is the first product.

    Half-precision products go straight into the fp32 sums, without a copy of `total`. torch has that for CUDA alone, so
    the interpreter's tensors are converted.
    """
    if a.dtype == torch.float32 or a.device.type == "cpu":
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
