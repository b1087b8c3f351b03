"""The problems on which implementations of mm_rope are compared with the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..examples import Change, Draw, Example, Values, spoiled
from .api import mm_rope

HEAD_DIMS = (32, 64, 96, 128)
NORMS = ("q_weight", "q_bias", "k_weight", "k_bias")


class RopeExample(Example):
    """A call of mm_rope. The parameters of the norms are arguments of their own, so that each gets its gradient."""

    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        """Return the rotated q and k."""
        norms: dict[str, Any] = {}
        if "q_weight" in args:
            norms = {"q_norm": (args["q_weight"], args["q_bias"]), "k_norm": (args["k_weight"], args["k_bias"])}
        q, k = mm_rope(args["q"], args["k"], args["positions"], **norms, impl=impl)
        return {"q": q, "k": k}

    def changes(self) -> Iterator[Change]:
        """Yield the change of some tokens, which must not reach the other tokens."""
        tokens = self.args["q"].shape[0]
        rows = slice(tokens // 3, tokens // 2)
        others = torch.ones(tokens, dtype=torch.bool, device=self.args["q"].device)
        others[rows] = False
        changed = self.replace(q=spoiled(self.args["q"], rows), k=spoiled(self.args["k"], rows))
        yield Change("other tokens", self, changed, dict.fromkeys(("q", "k", "dq", "dk"), others))


def examples(dtype: torch.dtype, head_dim: int, device: torch.device) -> Iterator[RopeExample]:
    """Yield slices of a fused projection with norms of one and of two rows, and dense tensors without norms."""
    for name, tokens, heads, kv_heads, norm_rows in (
        ("fused projection, ragged tail", 523, 12, 2, 1),  # groups of eight heads and of four
        ("two rows of norms", 64, 4, 2, 2),
        ("without norms", 130, 3, 1, 0),
    ):
        draw = Draw(tokens, dtype, device)
        fused = draw.normal(tokens, heads + 2 * kv_heads, head_dim)
        q, k, _ = fused.split([heads, kv_heads, kv_heads], 1)
        args: dict[str, Any] = {"q": q, "k": k, "positions": _positions(draw, tokens)}
        if norm_rows:
            for parameter in NORMS:
                mean, std = (1.0, 0.1) if parameter.endswith("weight") else (0.0, 0.1)
                args[parameter] = draw.normal(norm_rows, head_dim, mean=mean, std=std)
        leaves = ("q", "k", *(NORMS if norm_rows else ()))
        upstream = {"q": draw.normal(*q.shape), "k": draw.normal(*k.shape)}
        yield RopeExample(name, args, leaves, upstream)


def _positions(draw: Draw, tokens: int) -> Tensor:
    """Return positions from a prompt's first token to the 90,000th of a long video."""
    t = draw.integers(0, 90_000, tokens)
    t[: tokens // 2] = torch.arange(tokens // 2, device=t.device)
    h, w = draw.integers(0, 90_000, tokens), draw.integers(0, 512, tokens)
    return torch.stack([t, h, w]).to(torch.int32)
