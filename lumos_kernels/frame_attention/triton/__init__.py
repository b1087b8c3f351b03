"""frame_attention in Triton. ops.py has the contract, docs/kernels.md how it works."""

from lumos_kernels.frame_attention.triton.backward import backward as backward
from lumos_kernels.frame_attention.triton.forward import forward as forward
