"""Written by python -m lumos_kernels.frame_attention.triton.tune: what was measured to be fastest, and where.

Nothing was measured yet. configs.DEFAULTS serve, and the backward is the deterministic one.
"""

from __future__ import annotations

from typing import Any

# (kernel, architecture, head size) -> the fields of a configs.Config
CONFIGS: dict[tuple[str, str, int], dict[str, Any]] = {}

# (architecture, head size) at which the fused backward beat the deterministic one
FUSED_BACKWARD: frozenset[tuple[str, int]] = frozenset()
