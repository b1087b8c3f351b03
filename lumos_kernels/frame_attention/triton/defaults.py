"""The configurations chosen by arithmetic and by what ptxas makes of them: defaults, and the tuner's first candidates.

docs/kernels.md says why. measured.py has what replaces them where it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...launch import LaunchConfig

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


def _config(
    block_m: int, block_n: int, num_warps: int, num_stages: int, descriptors: bool, max_registers: int | None = None
) -> Config:
    return Config(
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        descriptors=descriptors,
        max_registers=max_registers,
    )


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
        # 193 registers: two programs on an SM, each of which has its exponentials (544 clocks of MUFU a tile) run under
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
        # Two programs on an SM (255 registers, 64 KB), each of which waits for its tiles while the other computes. With
        # two stages triton 3.6.0 spills 30. 8 warps exchange p and ds through shared memory, and their 64 x 32 matmuls
        # read both operands from there: 1,664 clocks of it for 1,024 of matmuls, where this one takes 1,024.
        128: _config(64, 64, 4, 1, True),
    },
    ("dkdv", "sm_100"): {
        32: _config(64, 128, 8, 2, True),
        # Without a limit ptxas takes 128 registers for two programs on an SM, and spills 24. So it takes 170.
        64: _config(64, 128, 8, 2, True, 255),
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
        128: _config(64, 64, 8, 1, False),
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

# (kernel, architecture, head size) -> what the tuner tries after the default, the most promising first. All of them
# compile for sm_90 without spills and without serialised wgmma on triton 3.6.0 and 3.7.1.
# Small tiles put two or three programs on an SM, which drift apart and overlap. Large ones read less from L2.
VETTED: Mapping[tuple[str, str, int], Sequence[Config]] = {
    ("forward", "sm_90", 64): (
        _config(128, 128, 8, 2, True),
        _config(64, 128, 4, 2, True),
        _config(128, 64, 4, 2, True),
        _config(128, 128, 8, 3, True),
    ),
    ("forward", "sm_90", 128): (
        _config(64, 128, 4, 2, True),
        _config(64, 64, 4, 3, True),
        _config(128, 64, 8, 3, True),
        _config(64, 64, 4, 2, True),
    ),
    ("dkdv", "sm_90", 64): (
        _config(64, 64, 4, 2, True),
        _config(64, 128, 8, 3, True),
        _config(64, 64, 4, 1, True),
        _config(32, 64, 4, 3, True),
    ),
    ("dkdv", "sm_90", 128): (
        _config(64, 64, 8, 2, True),
        _config(64, 128, 8, 1, True),
        _config(32, 128, 8, 1, True),
    ),
    ("dq", "sm_90", 64): (
        _config(128, 64, 8, 3, True),
        _config(64, 64, 4, 2, True),
        _config(128, 128, 8, 2, True),
        _config(64, 128, 4, 2, True),
    ),
    ("dq", "sm_90", 128): (
        _config(64, 64, 4, 2, True),
        _config(64, 64, 4, 1, True),
        _config(128, 64, 8, 3, True),
        _config(128, 128, 8, 1, True),
    ),
    ("fused", "sm_90", 64): (
        _config(64, 64, 4, 2, True),
        _config(64, 64, 4, 1, True),
        _config(64, 128, 8, 1, True),
        _config(64, 64, 8, 2, True),
    ),
    ("fused", "sm_90", 128): (
        _config(32, 128, 8, 2, True),
        _config(32, 128, 8, 1, True),
    ),
}
