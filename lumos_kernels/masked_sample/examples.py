"""The problems on which implementations of masked_sample are compared with the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..examples import Change, Draw, Example, Values, first_of_ties, spoiled, tie
from ..limits import USUAL, Limits
from .api import masked_sample
from .philox import gumbels

VOCABULARY, FIRST = 6_000, 900


class SampleExample(Example):
    """A call of masked_sample.

    Two scores nearer than the rounding of their logits may go either way. So the drawn class is judged by its exact
    score, which may fall short of the best one by that rounding.
    """

    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        """Return the drawn ids and their confidence."""
        ids, confidence = masked_sample(**args, impl=impl)
        return {"ids": ids, "confidence": confidence}

    def _logits(self, dtype: torch.dtype) -> Tensor:
        args = self.args
        first, last = args["classes"]
        cond, weight = args["hidden_cond"].to(dtype), args["weight"][first:last].to(dtype)
        logits = cond @ weight.T
        if args["hidden_uncond"] is not None:
            uncond = args["hidden_uncond"].to(dtype) @ weight.T
            logits = uncond + args["guidance_scale"] * (logits - uncond)
        scaled: Tensor = logits / args["temperature"]
        return scaled

    def eager(self) -> Values:
        """Return the fp32 logits: their rounding is the yardstick."""
        return {"logits": self._logits(torch.float32)}

    def exact(self) -> Values:
        """Return the fp64 logits."""
        return {"logits": self._logits(torch.float64)}

    def judged(self, found: Values, eager: Values, exact: Values) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield the exact score of the drawn class against the best one, and the logarithm of the confidence."""
        logits = exact["logits"]
        rounding = (eager["logits"] - logits).abs().amax() if logits.numel() else 0.0
        noise = 0.0 if self.args["greedy"] else gumbels(self.args["row_keys"], logits.shape[1]).double()
        first, last = self.args["classes"]
        drawn = found["ids"] - first
        inside = (drawn >= 0) & (drawn < last - first)
        at = torch.where(inside, drawn, 0)[:, None]
        scores = logits + noise
        best, reached = scores.max(1).values, scores.gather(1, at)[:, 0]
        # A draw compares two sums, each of which carries the rounding of its logit and of the sum.
        yield "drawn", torch.where(inside, reached, torch.nan), best - 2 * rounding, best
        chosen = logits.log_softmax(1).gather(1, at)[:, 0]
        if self.args["greedy"]:
            tied, first_best = first_of_ties(eager["logits"], logits)
            yield "first of ties", drawn[tied].double(), first_best[tied].double(), first_best[tied].double()
        yield "log confidence", found["confidence"].double().log(), chosen - rounding, chosen

    def changes(self) -> Iterator[Change]:
        """Yield the change of some rows and of the other classes, which must not reach the other rows."""
        rows = self.args["hidden_cond"].shape[0]
        if not rows:
            return
        changed = slice(rows // 3, rows // 2)
        others = torch.ones(rows, dtype=torch.bool, device=self.args["hidden_cond"].device)
        others[changed] = False
        spoilt: dict[str, Any] = {"weight": spoiled(self.args["weight"], slice(0, FIRST))}
        for name in ("hidden_cond", "hidden_uncond"):
            if self.args[name] is not None:
                spoilt[name] = spoiled(self.args[name], changed)
        yield Change(
            "other rows and classes", self, self.replace(**spoilt), dict.fromkeys(("ids", "confidence"), others)
        )


def examples(dtype: torch.dtype, head_dim: int, device: torch.device) -> Iterator[SampleExample]:
    """Yield guided draws in two chunks over a ragged slice, unguided ones, greedy choices with ties, small calls."""
    rows_of_chunk = Limits(chunk_bytes=1)  # the least that a chunk holds, 128 rows
    for name, rows, last, guidance, temperature, greedy, lowered in (
        ("guided, ragged slice", 167, VOCABULARY - 3, 3.0, 0.9, False, rows_of_chunk),
        ("unguided", 33, FIRST + 4_096, None, 1.3, False, USUAL),
        ("greedy, ties", 33, VOCABULARY, 3.0, 0.5, True, USUAL),
        ("one class", 5, FIRST + 1, None, 1.0, False, USUAL),
        ("no rows", 0, VOCABULARY, 3.0, 1.0, False, USUAL),
    ):
        draw = Draw(rows, dtype, device)
        cond, weight = draw.normal(rows, 128), draw.normal(VOCABULARY, 128, std=0.3)
        uncond = None if guidance is None else draw.normal(rows, 128)
        if greedy and uncond is not None:
            tie(draw, (cond, uncond), weight[FIRST:last])
        args = {
            "hidden_cond": cond,
            "hidden_uncond": uncond,
            "weight": weight,
            "classes": (FIRST, last),
            "guidance_scale": guidance,
            "temperature": temperature,
            "greedy": greedy,
            "row_keys": _keys(rows).to(device, torch.int64),
        }
        yield SampleExample(name, args, lowered=lowered)


def _keys(rows: int) -> Tensor:
    """Return keys that need both words of the seed and of the counter."""
    row = torch.arange(rows, dtype=torch.int64, device="cpu")
    return torch.stack([2**40 + 7 + row // 2, 5 * 2**32 + 2**31 + row * 2**30], 1)
