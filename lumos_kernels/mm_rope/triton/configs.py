"""How the mm_rope kernels are cut into programs. Chosen by arithmetic, not yet by measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import triton
from torch import Tensor

from ...launch import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class Config(LaunchConfig):
    """The tile of a program.

    block_tokens: tokens of a tile in bf16 and fp16; fp32 takes half as many.
    heads: heads that a program walks over, at most.
    """

    block_tokens: int
    heads: int


# Rotation pairs of a head, as a power of two -> configuration. Larger heads take the last one.
# A tile of 1,024 pairs gives each of 128 threads 8 neighbouring pairs: one 16-byte access for each half of a head.
# H100, forward at 3.0 TB/s: reading 1.5 TB/s with 0.7 us of latency needs 8 KB in flight on each of 132 SMs. A warp
# loads 1 KB at a time, and 24 warps are resident (80 registers a thread), so it is enough that a third of them wait.
# Backward reads 2.0 TB/s, 11 KB in flight, with 12 warps of 2 KB (up to 168 registers). Loading the next head before
# computing this one would not help: ptxas moves those loads behind the computation.
# Sine and cosine of a pair cost about 45 instructions. In the time that HBM takes for a pair's 8 bytes, 132 SMs issue
# 76. So 8 heads share one sine and cosine.
FORWARD = {
    16: Config(block_tokens=64, heads=8, num_warps=4),
    32: Config(block_tokens=32, heads=8, num_warps=4),
    64: Config(block_tokens=16, heads=8, num_warps=4),
    128: Config(block_tokens=8, heads=8, num_warps=4),
}
BACKWARD = FORWARD

# For dweight and dbias the token blocks are cut into at most this many splits, each with its own partial sum. The cut
# depends on T alone, so the sums are the same on every GPU. Partials of full groups cost at most 1/190 of the traffic.
# With 5 groups of heads (the 1B model) there are 1,280 to 2,560 programs once T exceeds 8,192. An H100 holds 396 at a
# time, so the last, partly filled round is at most a quarter of the work. Twice as many splits would shorten that
# round, but double what the second stage reads.
MAX_SPLITS = 512
# A program of the second stage takes SUM_COLUMNS columns: 8 of fp32 are 32 bytes, the least that memory gives, and a
# divisor of every head_dim. With one row for each norm that makes 2 * 2 * D / 8 programs, 32 at D = 64. It adds
# SUM_PARTIALS partials at once, 32 KB in flight. The 1B model has at most 4 * 512 partials of q, which take two rounds
# of loads from L2, about 1 us each.
SUM_PARTIALS, SUM_COLUMNS = 1024, 8


def choose(table: Mapping[int, Config], x: Tensor) -> Config:
    """Return the configuration for the head size and dtype of x [T, H, D]."""
    config = table[min(triton.next_power_of_2(x.shape[2] // 2), max(table))]
    return dataclasses.replace(config, block_tokens=config.block_tokens * 2 // x.element_size())


def options(config: Config, head_dim: int, int64: bool) -> dict[str, object]:
    """Return the arguments that both kernels get by name."""
    return {
        "HALF": head_dim // 2,
        "PADDED_HALF": triton.next_power_of_2(head_dim // 2),
        "BLOCK_T": config.block_tokens,
        "HEADS": config.heads,
        "INT64": int64,
        **config.options(fp_fusion=False),  # primitives.token_cos_sin says why
    }
