from lumos_kernels.mm_rope.api import mm_rope as mm_rope
