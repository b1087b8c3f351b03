"""The problems on which implementations of tube_masked_loss are compared with the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..examples import Change, Draw, Example, Values, spoiled
from .api import tube_masked_loss

VOCABULARY, FIRST = 6_000, 900
Z_LOSS_WEIGHT = 1e-3


class LossExample(Example):
    """A call of tube_masked_loss."""

    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        """Return the loss and the statistics of the rows."""
        loss, stats = tube_masked_loss(**args, return_stats=True, impl=impl)
        return {"loss": loss, "nll": stats.nll, "lse": stats.lse, "correct": stats.correct}

    def eager(self) -> Values:
        """Return the results of autograd over logits in the dtype of hidden, as a model's lm_head gives them."""
        first, last = self.args["classes"]
        labels, rows = self.args["labels"], self._targets().nonzero()[:, 0]
        hidden, weight = (self.args[name].detach().requires_grad_() for name in ("hidden", "weight"))
        with torch.enable_grad():
            logits = F.linear(hidden[rows], weight[first:last].to(hidden.dtype)).float()
            lse_rows = logits.logsumexp(1)
            nll_rows = lse_rows - logits.gather(1, labels[rows, None] - first)[:, 0]
            nll, lse = (nll_rows.new_zeros(len(labels)).index_put((rows,), x) for x in (nll_rows, lse_rows))
            token_weight = self.args["token_weight"]
            weighted = nll if token_weight is None else torch.where(nll == 0, nll, nll * token_weight.float())
            losses = weighted + self.args["z_loss_weight"] * lse.square()
            reduced = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(len(rows), 1)}
            loss = reduced[self.args["reduction"]]
            dhidden, dweight = torch.autograd.grad(loss, (hidden, weight), self.upstream["loss"])
        return {"loss": loss.detach(), "nll": nll.detach(), "lse": lse.detach(), "dhidden": dhidden, "dweight": dweight}

    def judged(self, found: Values, eager: Values, exact: Values) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield every result. A reduced loss is one number, whose eager error is luck: the rows' error bounds it."""
        for name, value, low, high in super().judged(found, eager, exact):
            if name == "loss" and value.dim() == 0:
                rows = int(self._targets().sum())
                spread = (eager["nll"] - exact["nll"]).abs().max() * (rows if self.args["reduction"] == "sum" else 1)
                low = high + torch.maximum((low - high).abs(), spread)
            yield name, value, low, high

    def changes(self) -> Iterator[Change]:
        """Yield the change of the ignored rows and of the other classes, which must not reach anything."""
        first, _ = self.args["classes"]
        targets = self._targets()
        changed = self.replace(
            hidden=spoiled(self.args["hidden"], ~targets), weight=spoiled(self.args["weight"], slice(0, first))
        )
        everything = ...
        names = ("loss", "nll", "lse", "correct", "dhidden", "dweight")
        yield Change("ignored rows and other classes", self, changed, dict.fromkeys(names, everything))

    def _targets(self) -> Tensor:
        first, last = self.args["classes"]
        targets: Tensor = (self.args["labels"] >= first) & (self.args["labels"] < last)
        return targets


def examples(dtype: torch.dtype, head_dim: int, device: torch.device) -> Iterator[LossExample]:
    """Yield a weighted mean over a ragged slice with a z-loss, row losses, a sum without targets, and one class."""
    for name, tokens, share, last, reduction, weighted in (
        ("mean, row weights, ragged slice", 151, 60, VOCABULARY - 3, "mean", True),
        ("row losses", 70, 60, FIRST + 4_096, "none", False),
        ("no targets", 9, 0, VOCABULARY, "sum", False),
        ("one class", 20, 60, FIRST + 1, "sum", False),
    ):
        draw = Draw(tokens, dtype, device)
        labels = draw.integers(FIRST, last, tokens)
        labels = torch.where(draw.integers(0, 100, tokens) < share, labels, -100)
        args = {
            "hidden": draw.normal(tokens, 128),
            "weight": draw.normal(VOCABULARY, 128, std=0.1),
            "labels": labels,
            "classes": (FIRST, last),
            "reduction": reduction,
            "z_loss_weight": Z_LOSS_WEIGHT,
            "token_weight": draw.normal(tokens, mean=1.0, std=0.2).float() if weighted else None,
        }
        shape = (tokens,) if reduction == "none" else ()
        upstream = {"loss": draw.normal(*shape, mean=1.7, std=0.5).float()}
        yield LossExample(name, args, ("hidden", "weight"), upstream)
