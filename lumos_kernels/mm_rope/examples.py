"""The problems on which implementations of mm_rope are compared with the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..examples import Change, Draw, Example, Values, spoiled
from ..limits import USUAL, Limits
from .api import mm_rope

HEAD_DIMS = (32, 64, 96, 128)
NORMS = ("q_weight", "q_bias", "k_weight", "k_bias")


class RopeExample(Example):
    """A call of mm_rope. The parameters of the norms are arguments of their own, so that each gets its gradient."""

    even = ("q", "k", "dq", "dk")

    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        """Return the rotated q and k."""
        norms: dict[str, Any] = {}
        if "q_weight" in args:
            norms = {"q_norm": (args["q_weight"], args["q_bias"]), "k_norm": (args["k_weight"], args["k_bias"])}
        q, k = mm_rope(
            args["q"], args["k"], args["positions"], **norms, theta=args["theta"], eps=args["eps"], impl=impl
        )
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
    """Yield slices of a fused projection, splits of several blocks, dense tensors without norms, and other variants."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for name, tokens, heads, kv_heads, norm_rows, norm_dtype, theta, eps, lowered in (
        # groups of eight heads and of four
        ("fused projection, ragged tail", 523, 12, 2, 1, dtype, 1e4, 1e-5, USUAL),
        ("two rows of norms, long splits", 300, 4, 2, 2, dtype, 1e4, 0.1, Limits(splits=3, partials=2)),
        ("without norms", 130, 3, 1, 0, dtype, 500.0, 1e-5, USUAL),
        ("norms of another dtype, int64 offsets", 70, 9, 1, 1, other, 1e4, 0.1, Limits(int64=True)),
        ("no tokens", 0, 2, 1, 1, dtype, 1e4, 1e-5, USUAL),
    ):
        draw = Draw(tokens, dtype, device)
        fused = draw.normal(tokens, heads + 2 * kv_heads, head_dim)
        q, k, _ = fused.split([heads, kv_heads, kv_heads], 1)
        args: dict[str, Any] = {"q": q, "k": k, "positions": _positions(draw, tokens), "theta": theta, "eps": eps}
        if norm_rows:
            for parameter in NORMS:
                mean, std = (1.0, 0.1) if parameter.endswith("weight") else (0.0, 0.1)
                args[parameter] = draw.normal(norm_rows, head_dim, mean=mean, std=std).to(norm_dtype)
        leaves = ("q", "k", *(NORMS if norm_rows else ()))
        upstream = {"q": draw.normal(*q.shape), "k": draw.normal(*k.shape)}
        yield RopeExample(name, args, leaves, upstream, lowered=lowered)


def _positions(draw: Draw, tokens: int) -> Tensor:
    """Return positions from a prompt's first token to the 90,000th of a long video."""
    t = draw.integers(0, 90_000, tokens)
    t[: tokens // 2] = torch.arange(tokens // 2, device=t.device)
    h, w = draw.integers(0, 90_000, tokens), draw.integers(0, 512, tokens)
    return torch.stack([t, h, w]).to(torch.int32)
