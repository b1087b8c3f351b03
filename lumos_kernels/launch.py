"""The configurations that Triton kernels share: launch options, and the block of a pass over rows of logits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a Triton kernel is launched. A kernel's own configuration adds the sizes of its tiles.

    num_warps: warps of a program.
    num_stages: stages of the software pipeline over a loop's tiles, None for Triton's default.
    max_registers: registers of a thread at most, None for no limit.
    """

    num_warps: int
    num_stages: int | None = None
    max_registers: int | None = None

    def options(self, *, fp_fusion: bool) -> dict[str, int]:
        """Return the options by the names that a launch takes.

        fp_fusion: ptxas may contract a product and a sum into an FMA, which rounds once. Every launch says so itself,
        because Triton's default is True up to 3.9 and False from 3.10 on.
        """
        given = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}
        return {"enable_fp_fusion": fp_fusion, **{name: value for name, value in given.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class RowConfig(LaunchConfig):
    """How a pass over rows of logits is cut. block: classes that a program takes at once."""

    block: int

    def fitted(self, classes: int) -> RowConfig:
        """Return the configuration for rows of so many classes. A short row takes a small block and few warps."""
        warp = self.block // self.num_warps
        block = max(min(self.block, 1 << max(classes - 1, 0).bit_length()), warp)
        return dataclasses.replace(self, block=block, num_warps=block // warp)


def equal_chunk(rows: int, most: int, multiple: int = 1) -> int:
    """Return the rows of a chunk where `rows` rows are cut into the fewest equal chunks of at most `most` rows.

    The result is rounded up to a multiple of `multiple`, which divides `most`.
    """
    count = max(-(-rows // most), 1)
    return max(-(-rows // count // multiple), 1) * multiple
