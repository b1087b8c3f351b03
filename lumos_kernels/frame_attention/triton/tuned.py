"""Written by python -m lumos_kernels.frame_attention.triton.tune: what was measured to be fastest, and where.

Nothing was measured yet: configs.DEFAULTS serve, and the backward is the deterministic one.
"""

from __future__ import annotations

# (kernel, architecture, head size) -> configs.Config
CONFIGS: dict[tuple[str, str, int], tuple[int, int, int, int, bool]] = {}

# (architecture, head size) at which the fused backward beat the deterministic one
FUSED_BACKWARD: frozenset[tuple[str, int]] = frozenset()
