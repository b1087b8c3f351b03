"""frame_attention in Triton: compiled for sm_80, sm_90 and sm_100, run in the interpreter, not yet run on a GPU.

docs/kernels.md says how it works.
"""

from __future__ import annotations

from .backward import backward as backward
from .backward import backward_deterministic as backward_deterministic
from .backward import backward_fused as backward_fused
from .forward import forward as forward
from .forward import forward_with as forward_with
