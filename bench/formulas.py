"""Useful work of each op: the one place where the benchmarks take bytes and FLOPs from.

The work of a whole model is in LumosConfig.forward_flops and LumosConfig.training_flops.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumos_kernels import flops


@dataclass(frozen=True)
class Work:
    """An amount of useful work. unit: "B" (bytes moved) or "FLOP"."""

    amount: int
    unit: str

    def rate(self, seconds: float) -> float:
        """GB/s or GFLOP/s."""
        return self.amount / seconds / 1e9


def mm_rope_bytes(tokens: int, heads: int, head_dim: int, element_size: int, backward: bool) -> Work:
    """Forward reads and writes q and k once; backward reads x and dy and writes dx.

    heads: query and key heads together. Positions (12 bytes a token), norm parameters and their gradients are left
    out: below 1 % at the sizes of the model.
    """
    passes = 5 if backward else 2
    return Work(passes * tokens * heads * head_dim * element_size, "B")


def attention_flops(visible_pairs: int, heads: int, head_dim: int, backward: bool) -> Work:
    """The count of the FlashAttention papers, so that rates compare with theirs (lumos_kernels.flops)."""
    return Work(flops.attention_flops(visible_pairs, heads, head_dim, backward=backward), "FLOP")


def loss_flops(targets: int, hidden: int, classes: int, backward: bool) -> Work:
    """One matmul forward (logits), two backward (gradients of hidden and weight): target rows x class slice."""
    return Work(flops.loss_flops(targets, hidden, classes, products=3 if backward else 1), "FLOP")


def sample_flops(rows: int, hidden: int, classes: int, branches: int) -> Work:
    """The logits of every branch: undecided rows x class slice."""
    return Work(branches * loss_flops(rows, hidden, classes, backward=False).amount, "FLOP")


def layout_bytes(tokens: int) -> Work:
    """Ids read (8 bytes a token); positions, four limits, frame index (32) and content (1) written."""
    return Work(41 * tokens, "B")
