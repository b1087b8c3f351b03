"""masked_sample on GPUs: the library's matmuls, then one Triton pass over each row of logits.

Compiled for sm_80, sm_90 and sm_100, run in the interpreter, not yet run on a GPU. With x the guided and tempered
logits of a row and G its Gumbel variates (philox.py), the pass makes
    class = argmax(x + G),   confidence = exp(x[class] - max x) / sum exp(x - max x),
and reads the row once: an online softmax runs beside the search for the best score. Nothing of the size of the logits
is written. Rows come in chunks. Their logits stay fp32, because guidance multiplies the difference of two logits, and
with it their rounding errors, by 16.

Legend: N rows, K classes, C width of the hidden states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_types as kt
from .. import limits, tensors
from ..launch import RowConfig, equal_chunk
from .contract import Inputs, Outputs

# Bytes of a chunk's logits, both branches together: 1,024 guided rows of 64,000 classes.
LOGITS_BYTES = 512 << 20
ROW_MULTIPLE = 128  # chunks of so many rows leave no matmul tile half empty

# Chosen by arithmetic, not yet by measurement. H100: a guided class costs 8 bytes, 0.6 clocks of an SM's share of HBM,
# and about 90 instructions (40 of them without a draw), 0.7 clocks of its four schedulers; both branches' matmuls of a
# model of width 2,048 cost 2.4. Twice the block needs twice the registers on sm_100, 126.
SAMPLE = RowConfig(block=2048, num_warps=8)

VECTOR = 4  # columns of a Philox counter, and fp32 in 16 bytes
_LOWEST = tl.constexpr(-3.4e38)  # finite: the difference of two of them is 0, not NaN
_NO_COLUMN = tl.constexpr(2**31 - 1)
_TWO_THIRDS = tl.constexpr(0x3F2AAAAB)  # the bits of fp32(2 / 3)
_LN2_HIGH = tl.constexpr(0.693359375)  # 355 / 2^9: its products with exponents are exact
_LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def _reduced(x: kt.Block) -> tuple[kt.Block, kt.Block]:
    """Return m - 1 and k of x = m * 2^k with m in [2/3, 4/3). x is a positive normal number."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - _TWO_THIRDS) >> 23
    return (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0, k


@triton.jit
def _log_of_reduced(f: kt.Block, k: kt.Block) -> kt.Block:
    """Return log((1 + f) * 2^k) to about one unit in the last place.

    It is f - f^2/2 + f^3 q(f) + k log 2, with q the minimax polynomial for |f| <= 1/3.
    """
    q = tl.fma(f, -0.131917417, 0.139624193)
    q = tl.fma(f, q, -0.121151075)
    q = tl.fma(f, q, 0.140109256)
    q = tl.fma(f, q, -0.166854665)
    q = tl.fma(f, q, 0.200100437)
    q = tl.fma(f, q, -0.249996886)
    q = tl.fma(f, q, 0.333332241)
    f2 = f * f
    k = k.to(tl.float32)
    rest = tl.fma(k, _LN2_LOW, tl.fma(f * f2, q, f2 * -0.5))
    return tl.fma(k, _LN2_HIGH, f + rest)


@triton.jit
def _gumbel(word: kt.Block) -> kt.Block:
    """Return the Gumbel variates of Philox words, fp32, within two roundings of those of philox.py from fp64."""
    u = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    f, k = _reduced(1.0 - u)
    # For u below 1/3, f is -u itself: 1 - u would have lost most of its digits.
    exponential = -_log_of_reduced(tl.where(k == 0, -u, f), k)
    f, k = _reduced(exponential)
    return tl.where(u < 1.0, -_log_of_reduced(f, k), -float("inf"))


@triton.jit
def _gumbels_of_block(
    seed: kt.Scalar, counter: kt.Scalar, start: kt.Scalar, lines: kt.Block, VECTOR: tl.constexpr
) -> kt.Block:
    """Return fp32 [lines, 4]. A line has the variates of the four words of one Philox counter."""
    group = (start // VECTOR + lines).to(tl.uint32)
    zero = group * 0
    low, high = (zero + counter.to(tl.uint32)), (zero + (counter >> 32).to(tl.uint32))
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, zero)
    # A thread holds whole lines, so `place` is known at compile time and no select is left in the code.
    place = tl.arange(0, VECTOR)[None, :]
    first, second = tl.where(place == 0, w0[:, None], w1[:, None]), tl.where(place == 2, w2[:, None], w3[:, None])
    return _gumbel(tl.where(place < 2, first, second))


@triton.jit
def _logits(
    cond_ptr: kt.Pointer,
    uncond_ptr: kt.Pointer,
    column: kt.Block,
    mask: kt.Block,
    guidance_scale: kt.Scalar,
    inverse_temperature: kt.Scalar,
) -> kt.Block:
    """Return the guided and tempered logits of some columns."""
    logit = tl.load(cond_ptr + column, mask=mask, other=0.0)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + column, mask=mask, other=0.0)
        logit = uncond + guidance_scale * (logit - uncond)
    return logit * inverse_temperature


@triton.jit
def _sample_kernel(
    cond_ptr: kt.Pointer,
    uncond_ptr: kt.Pointer,
    keys_ptr: kt.Pointer,
    ids_ptr: kt.Pointer,
    confidence_ptr: kt.Pointer,
    row_stride: kt.Scalar,
    classes: kt.Scalar,
    guidance_scale: kt.Scalar,
    inverse_temperature: kt.Scalar,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Draw a row's class. A program takes a row.

    Every line of 4 columns keeps a running maximum, a sum of exponentials, and the first of its best scores.
    """
    row = tl.program_id(0).to(tl.int64)
    cond_ptr += row * row_stride
    if uncond_ptr is not None:
        uncond_ptr += row * row_stride
    if keys_ptr is not None:
        seed, counter = tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1)
    lines = tl.arange(0, BLOCK // VECTOR)
    largest = tl.full([BLOCK // VECTOR], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    best = tl.full([BLOCK // VECTOR], -float("inf"), tl.float32)
    best_column = tl.full([BLOCK // VECTOR], _NO_COLUMN, tl.int32)
    for start in range(0, classes, BLOCK):
        column = start + lines[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        mask = column < classes
        logit = _logits(cond_ptr, uncond_ptr, column, mask, guidance_scale, inverse_temperature)
        logit = tl.where(mask, logit, -float("inf"))
        larger = tl.maximum(largest, tl.max(logit, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logit - larger[:, None]), axis=1)
        largest = larger
        score = logit
        if keys_ptr is not None:
            score += _gumbels_of_block(seed, counter, start, lines, VECTOR)
        line_best = tl.max(score, axis=1)
        line_column = tl.min(tl.where(score == line_best[:, None], column, _NO_COLUMN), axis=1)
        best_column = tl.where(line_best > best, line_column, best_column)
        best = tl.maximum(best, line_best)
    top = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - top), axis=0)
    chosen = tl.min(tl.where(best == tl.max(best, axis=0), best_column, _NO_COLUMN), axis=0)
    chosen = tl.where(chosen < classes, chosen, 0)  # where no score is above -inf
    logit = _logits(cond_ptr, uncond_ptr, chosen, chosen < classes, guidance_scale, inverse_temperature)
    tl.store(ids_ptr + row, chosen.to(tl.int64))
    tl.store(confidence_ptr + row, tl.exp(logit - top) / total)


def forward(inputs: Inputs) -> Outputs:
    """Draw a class for each row. Two launches a chunk of rows, three with guidance; no host sync."""
    weight, device = inputs.weight, inputs.weight.device
    count, classes = inputs.hidden_cond.shape[0], weight.shape[0]
    ids = torch.empty((count,), dtype=torch.int64, device=device)
    confidence = torch.empty((count,), dtype=torch.float32, device=device)
    branches = [branch for branch in inputs[:2] if branch is not None]
    size = chunk_rows(count, len(branches) * classes)
    buffers = [torch.empty((min(size, count), classes), dtype=torch.float32, device=device) for _ in branches]
    row_keys = None if inputs.row_keys is None else inputs.row_keys.contiguous()
    config = SAMPLE.fitted(classes)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        logits = [
            fp32_product(hidden[part], weight.T, buffer[: part.stop - start])
            for hidden, buffer in zip(branches, buffers, strict=True)
        ]
        with tensors.device_guard(weight):
            _sample_kernel[(part.stop - start,)](
                logits[0],
                logits[1] if len(logits) == 2 else None,
                None if row_keys is None else row_keys[part],
                ids[part],
                confidence[part],
                classes,
                classes,
                inputs.guidance_scale,
                1.0 / inputs.temperature,
                BLOCK=config.block,
                VECTOR=VECTOR,
                **config.options(fp_fusion=True),
            )
    return Outputs(ids, confidence)


def chunk_rows(rows: int, columns: int) -> int:
    """Return the rows of a chunk: a multiple of 128, at most LOGITS_BYTES of fp32 logits where 128 rows fit."""
    most = limits.capped(LOGITS_BYTES, limits.current().chunk_bytes)
    return equal_chunk(rows, max(most // (4 * columns) // ROW_MULTIPLE, 1) * ROW_MULTIPLE, ROW_MULTIPLE)


def fp32_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a b in fp32 into `out`, and return it.

    torch has that for half-precision factors on CUDA alone, so the interpreter's tensors are converted.
    """
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
