"""Tube-masked loss on GPUs: the matmuls are the library's, everything between them is one Triton pass over the logits.

Compiled for sm_80, sm_90 and sm_100, run in the interpreter, not yet run on a GPU. Target rows come in chunks. A
chunk's logits are rounded to hidden's dtype, as a model's lm_head does; the pass reads a row twice, for its statistics
and then to put the gradient of each logit in its place, which two more matmuls take from there. dW is summed over the
chunks in fp32. The contract is in ops.py.

Shapes: N target rows, K classes, C width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lumos_kernels import checks

# Of a chunk: 4,352 rows of 64,000 bf16 classes and 2,048 or 3,072 channels. Fewer rows would load and store the fp32
# sums of dW, 0.5 GB, more often: 0.35 ms of HBM beside the 4 ms of a chunk's matmuls (H100, by arithmetic).
CHUNK_BYTES = 560 << 20
ROW_MULTIPLE = 128  # leaves no matmul tile half empty, and per-row data 16-byte aligned


class Config(NamedTuple):
    """How a kernel is cut."""

    block: int  # classes that a program takes at once
    num_warps: int
    registers: int | None  # of a thread, at most


# Bytes of a logit -> configuration of the loss pass. Chosen by arithmetic, not yet by measurement.
# A row of 64,000 bf16 is 128 KB. Kept in registers (one block of 65,536) it spills at least 180 times a thread, even
# with every register of an SM. So it is read twice, and the second time from L2: few programs with many warps, because
# 2 programs on each of 132 SMs are 34 MB of rows, and 8 would be 135 MB, more than an H100's 50 MB of L2.
# Reading 1.5 TB/s with 0.7 us of latency needs 8 KB in flight on each SM; a block keeps 32 KB in flight.
# ptxas would take up to 92 registers where 64, room for the second program, cost no spill.
LOSS = {2: Config(16384, 16, 64), 4: Config(16384, 32, 64)}
# The pass of the recomputed logits reads once: small programs, each a part of a row.
GRADIENT = {2: Config(4096, 4, None), 4: Config(4096, 8, None)}
# Rows that are no multiple of 16 classes allow no wide accesses, whose addresses and masks then cost registers.
NARROW = 4  # blocks are so much smaller

# Smaller than every logit, but finite: the difference of two of them is 0, that of two infinities would be NaN.
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _columns(start, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """int32 [BLOCK / VECTOR, VECTOR]: a line is one thread's 16 bytes, so that sums along it stay in the thread."""
    line = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return start + line + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _largest_and_sum(row_ptr, classes, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Largest logit of a row, and the sum of exp(logit - largest). Every line of a block has a pair of its own."""
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
def _occurs_before(row_ptr, value, end, classes, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Whether one of a row's logits before column `end` is `value`."""
    found = tl.zeros([BLOCK // VECTOR], tl.int32)
    for start in range(0, end, BLOCK):
        column = _columns(start, BLOCK, VECTOR)
        x = tl.load(row_ptr + column, mask=column < classes, other=-float("inf")).to(tl.float32)
        found = tl.maximum(found, tl.max(((x == value) & (column < end)).to(tl.int32), axis=1))
    return tl.max(found, axis=0) != 0


@triton.jit
def _put_gradient(
    row_ptr, start, classes, target, offset, scale, on_nll, on_lse, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """Overwrites logits x by the gradient of on_nll * nll + on_lse * lse, with softmax = scale * exp(x - offset)."""
    column = _columns(start, BLOCK, VECTOR)
    x = tl.load(row_ptr + column, mask=column < classes, other=-float("inf")).to(tl.float32)
    softmax = tl.exp(x - offset) * scale
    # Not softmax * (on_nll + on_lse) - on_nll, which loses all but a few digits where the target is nearly certain.
    gradient = tl.fma(softmax, on_lse, tl.where(column == target, softmax - 1.0, softmax) * on_nll)
    tl.store(row_ptr + column, gradient.to(row_ptr.dtype.element_ty), mask=column < classes)


@triton.jit
def _loss_kernel(
    logits_ptr,
    targets_ptr,
    row_weight_ptr,
    nll_ptr,
    lse_ptr,
    correct_ptr,
    row_stride,
    classes,
    z_loss,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a row: statistics, and the gradient of row_weight * nll + z_loss * lse^2 in the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    # Before the first gradient is written: the reductions below synchronise the program's warps.
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    top, total = _largest_and_sum(row_ptr, classes, BLOCK, VECTOR)
    lse = top + tl.log(total)
    correct = target_logit == top
    if correct:  # equal logits are common in bf16, and the first of them is the argmax
        correct = not _occurs_before(row_ptr, top, target, classes, BLOCK, VECTOR)
    tl.store(nll_ptr + row, (top - target_logit) + tl.log(total))  # exact however far the logits lie from 0
    tl.store(lse_ptr + row, lse)
    tl.store(correct_ptr + row, correct.to(tl.uint8))
    if WITH_GRADIENT:
        on_nll = 1.0
        if row_weight_ptr is not None:
            on_nll = tl.load(row_weight_ptr + row)
        on_lse = 2.0 * z_loss * lse
        for start in range(0, classes, BLOCK // 2):  # a whole block would spill on sm_100
            _put_gradient(row_ptr, start, classes, target, top, 1.0 / total, on_nll, on_lse, BLOCK // 2, VECTOR)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    targets_ptr,
    lse_ptr,
    grad_nll_ptr,
    grad_lse_ptr,
    row_stride,
    classes,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a row and a block: the gradient of grad_nll * nll + grad_lse * lse in the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, start = logits_ptr + row * row_stride, tl.program_id(1) * BLOCK
    target = tl.load(targets_ptr + row).to(tl.int32)
    on_nll, on_lse = tl.load(grad_nll_ptr + row), tl.load(grad_lse_ptr + row)
    lse = tl.load(lse_ptr + row)
    _put_gradient(row_ptr, start, classes, target, lse, 1.0, on_nll, on_lse, BLOCK, VECTOR)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    row_weight: Tensor | None,
    z_loss: float,
    need_hidden: bool,
    dweight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See ops.py. Three launches a chunk of rows, two more for each gradient; no host sync."""
    work = _Work(hidden, weight, rows, need_hidden, dweight)
    nll, lse = (torch.empty(rows.shape, dtype=torch.float32, device=rows.device) for _ in range(2))
    correct = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    for part in work.chunks():
        logits = work.logits(part)
        row_weights = None if row_weight is None else row_weight[part]
        options = _options(LOSS, logits)
        with checks.device_guard(logits):
            _loss_kernel[(len(logits),)](
                logits,
                targets[part],
                row_weights,
                nll[part],
                lse[part],
                correct[part],
                logits.stride(0),
                logits.shape[1],
                z_loss,
                WITH_GRADIENT=need_hidden or dweight is not None,
                **options,
            )
        work.add(part, logits)
    return nll, lse, correct.view(torch.bool), work.dhidden


def backward(
    grad_nll: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    lse: Tensor,
    need_hidden: bool,
    dweight: Tensor | None,
) -> Tensor | None:
    """See ops.py. Makes the logits again."""
    if not need_hidden and dweight is None:
        return None
    work = _Work(hidden, weight, rows, need_hidden, dweight)
    for part in work.chunks():
        logits = work.logits(part)
        options = _options(GRADIENT, logits)
        grid = len(logits), triton.cdiv(logits.shape[1], options["BLOCK"])
        per_row = (tensor[part] for tensor in (targets, lse, grad_nll, grad_lse))
        with checks.device_guard(logits):
            _gradient_kernel[grid](logits, *per_row, logits.stride(0), logits.shape[1], **options)
        work.add(part, logits)
    return work.dhidden


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Target rows of a chunk: equal chunks of a multiple of 128, at most CHUNK_BYTES each where 128 rows fit."""
    most = max(CHUNK_BYTES // row_bytes // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    size = triton.cdiv(rows, max(triton.cdiv(rows, most), 1))
    return max(triton.cdiv(size, ROW_MULTIPLE), 1) * ROW_MULTIPLE


def _options(table: dict[int, Config], logits: Tensor) -> dict:
    """The launch arguments that both kernels get by name. A short row takes a small block and few warps."""
    config = table[logits.element_size()]
    classes, block = logits.shape[1], config.block if logits.shape[1] % 16 == 0 else config.block // NARROW
    warp = block // config.num_warps
    block = max(min(block, triton.next_power_of_2(classes)), warp)
    return {
        "BLOCK": block,
        "VECTOR": 16 // logits.element_size(),
        "num_warps": block // warp,
        "maxnreg": config.registers,
    }


class _Work:
    """The matmuls of a call and their results. Beyond the results it holds one chunk: logits, and rows of x or dx."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: Tensor, need_hidden: bool, dweight: Tensor | None) -> None:
        self.hidden, self.weight, self.rows, self.dweight = hidden, weight, rows, dweight
        device, (classes, width) = hidden.device, weight.shape
        self.size = chunk_rows(len(rows), (classes + width) * hidden.element_size())
        size = min(self.size, len(rows))
        self._x = torch.empty((size, width), dtype=hidden.dtype, device=device)
        self._logits = torch.empty((size, classes), dtype=hidden.dtype, device=device)
        self.dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if need_hidden else None

    def chunks(self) -> Iterator[slice]:
        return (slice(start, min(start + self.size, len(self.rows))) for start in range(0, len(self.rows), self.size))

    def logits(self, part: slice) -> Tensor:
        """[rows, K], in the place of the chunk's before."""
        rows = self.rows[part]
        x = torch.index_select(self.hidden, 0, rows, out=self._x[: len(rows)])
        return torch.mm(x, self.weight.T, out=self._logits[: len(rows)])

    def add(self, part: slice, dlogits: Tensor) -> None:
        """Adds a chunk's part of the gradients. dx takes the place of x, which dweight needs before."""
        x = self._x[: len(dlogits)]
        if self.dweight is not None:
            add_outer(self.dweight, dlogits.T, x, first=part.start == 0)
        if self.dhidden is not None:
            self.dhidden.index_copy_(0, self.rows[part], torch.mm(dlogits, self.weight, out=x))


def add_outer(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b in fp32, or total = a b. Half-precision products go straight into the fp32 sums, without a copy of
    `total`: torch has that for CUDA alone, so the interpreter's tensors are converted.
    """
    if a.dtype == torch.float32 or a.device.type == "cpu":
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
