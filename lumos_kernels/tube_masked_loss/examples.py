"""The problems on which implementations of tube_masked_loss are compared with the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..examples import TIES, Change, Draw, Example, Values, first_of_ties, spoiled, tie
from ..limits import USUAL, Limits
from .api import tube_masked_loss

VOCABULARY, FIRST = 6_000, 900
LONG = 17_408  # classes: a multiple of 16, and more than a block of any kernel
Z_LOSS_WEIGHT = 1e-3


class LossExample(Example):
    """A call of tube_masked_loss."""

    even = ("dhidden",)

    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        """Return the loss and the statistics of the rows."""
        loss, stats = tube_masked_loss(**args, return_stats=True, impl=impl)
        return {"loss": loss, "nll": stats.nll, "lse": stats.lse, "correct": stats.correct}

    def eager(self) -> Values:
        """Return the results of logits in the dtype of hidden, as a model's lm_head gives them.

        The gradients of the logits are rounded to that dtype too. The gradients of a sum are rounded before they are
        scaled, and again after it.
        """
        first, last = self.args["classes"]
        hidden, reduction, token_weight = (self.args[name] for name in ("hidden", "reduction", "token_weight"))
        dtype, tokens = hidden.dtype, len(hidden)
        rows, logits = self._target_logits(dtype)
        targets = self.args["labels"][rows, None] - first
        w, x = self.args["weight"][first:last].to(dtype).float(), hidden[rows].float()
        lse = logits.logsumexp(1)
        nll = lse - logits.gather(1, targets)[:, 0]
        factor = torch.ones_like(nll) if token_weight is None else token_weight[rows].float()
        losses = factor * nll + self.args["z_loss_weight"] * lse.square()
        on_nll, on_lse, scale = factor, 2 * self.args["z_loss_weight"] * lse, 1.0
        if reduction == "none":
            arrived = {name: gradient[rows] for name, gradient in self.upstream.items()}
            on_nll = on_nll * arrived["loss"] + arrived.get("nll", 0.0)
            on_lse = on_lse * arrived["loss"] + arrived.get("lse", 0.0)
        else:
            scale = float(self.upstream["loss"]) / (max(len(rows), 1) if reduction == "mean" else 1)
        dlogits = (logits - lse[:, None]).exp_().mul_((on_nll + on_lse)[:, None])
        dlogits = dlogits.scatter_add_(1, targets, -on_nll[:, None]).to(dtype).float()
        dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(self.args["weight"])
        dhidden[rows] = ((dlogits @ w).to(dtype).float() * scale).to(dtype)
        dweight[first:last] = ((dlogits.mT @ x) * scale).to(dweight.dtype)
        nll, lse, losses = (values.new_zeros(tokens).index_put((rows,), values) for values in (nll, lse, losses))
        reduced = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(len(rows), 1)}
        return {"loss": reduced[reduction], "nll": nll, "lse": lse, "dhidden": dhidden, "dweight": dweight}

    def _target_logits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the target rows and their logits, rounded to a dtype and held in fp32, or wider."""
        first, last = self.args["classes"]
        rows, wide = self._targets().nonzero()[:, 0], torch.promote_types(dtype, torch.float32)
        hidden = self.args["hidden"][rows].to(dtype).to(wide)
        return rows, (hidden @ self.args["weight"][first:last].to(dtype).to(wide).mT).to(dtype).to(wide)

    def judged(self, found: Values, eager: Values, exact: Values) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield every result. A reduced loss is one number, whose eager error is luck: the rows' error bounds it.

        Whether a target has the highest logit is judged where rounding does not decide it.
        """
        for name, value, low, high in super().judged(found, eager, exact):
            if name == "loss" and value.dim() == 0 and len(exact["nll"]):
                count = int(self._targets().sum()) if self.args["reduction"] == "sum" else 1
                spread = (eager["nll"] - exact["nll"]).abs().max() * count
                low = high + torch.maximum((low - high).abs(), spread)
            yield name, value, low, high
        rows, high = self._target_logits(torch.float64)
        if len(rows):
            low = self._target_logits(self.args["hidden"].dtype)[1].to(high)
            tied, _ = first_of_ties(low, high)
            target = self.args["labels"][rows, None] - self.args["classes"][0]
            logit = high.gather(1, target)
            others = high.scatter(1, target, -torch.inf).amax(1, keepdim=True)
            clear = (logit - others).abs() > 4 * (low - high).abs().max()
            clear = torch.where(tied, True, clear[:, 0])
            correct = exact["correct"][rows][clear].double()
            yield "correct", found["correct"][rows][clear].double(), correct, correct

    def changes(self) -> Iterator[Change]:
        """Yield the change of the ignored rows and of the other classes, which must not reach anything."""
        first, _ = self.args["classes"]
        targets = self._targets()
        changed = self.replace(
            hidden=spoiled(self.args["hidden"], ~targets), weight=spoiled(self.args["weight"], slice(0, first))
        )
        everything = ...
        names = ("loss", "nll", "lse", "correct", *(f"d{leaf}" for leaf in self.leaves))
        yield Change("ignored rows and other classes", self, changed, dict.fromkeys(names, everything))

    def _targets(self) -> Tensor:
        first, last = self.args["classes"]
        targets: Tensor = (self.args["labels"] >= first) & (self.args["labels"] < last)
        return targets


def examples(dtype: torch.dtype, head_dim: int, device: torch.device) -> Iterator[LossExample]:
    """Yield sums, means and row losses in one chunk and in two, over slices of whole vectors and ragged ones.

    LONG classes take more than one block of a row, whatever its dtype. The weight of one example has another dtype.
    """
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    two_chunks = Limits(chunk_bytes=1)  # the least that a chunk holds, 128 rows
    ragged, both = VOCABULARY - 3, ("hidden", "weight")
    for name, tokens, last, reduction, leaves, weight_dtype, lowered in (
        ("mean, row weights, ragged slice, two chunks", 300, ragged, "mean", both, dtype, two_chunks),
        ("sum, long rows, weight of another dtype", 40, FIRST + LONG, "sum", both, other, USUAL),
        ("row losses, ragged slice, two chunks", 301, ragged, "none", both, dtype, two_chunks),
        ("row losses, long rows, given in any order", 41, FIRST + LONG, "none", both, dtype, USUAL),
        ("only the gradient of hidden", 20, VOCABULARY, "mean", both[:1], dtype, USUAL),
        ("only the gradient of weight", 21, VOCABULARY, "none", both[1:], dtype, USUAL),
        ("no targets", 9, VOCABULARY, "sum", both, dtype, USUAL),
        ("no tokens", 0, VOCABULARY, "mean", both, dtype, USUAL),
        ("one class", 22, FIRST + 1, "sum", both, dtype, USUAL),
    ):
        draw = Draw(tokens, dtype, device)
        width = 32 if last > VOCABULARY else 128
        hidden = draw.normal(tokens, width)
        weight = draw.normal(max(VOCABULARY, last), width, std=0.1)
        labels = _labels(draw, hidden, weight, last, 0 if name == "no targets" else 60)
        args = {
            "hidden": hidden,
            "weight": weight.to(weight_dtype),
            "labels": labels,
            "classes": (FIRST, last),
            "reduction": reduction,
            "z_loss_weight": Z_LOSS_WEIGHT,
            "token_weight": draw.normal(tokens, mean=1.0, std=0.2).float() if reduction == "mean" else None,
        }
        if "any order" in name:
            args["rows"] = ((labels >= FIRST) & (labels < last)).nonzero()[:, 0].flip(0).int()
        upstream = {"loss": draw.normal(*((tokens,) if reduction == "none" else ()), mean=1.7, std=0.5).float()}
        if reduction == "none":
            upstream["nll"] = draw.normal(tokens).float()
            upstream["lse"] = draw.normal(tokens, std=10.0).float()
        yield LossExample(name, args, leaves, upstream, lowered=lowered)


def _labels(draw: Draw, hidden: Tensor, weight: Tensor, last: int, percent: int) -> Tensor:
    """Return labels, and make ties in hidden and weight. Every fourth target has the highest logit, or a tied one."""
    tokens, classes = len(hidden), last - FIRST
    targets = draw.integers(0, 100, tokens) < percent
    label = draw.integers(0, classes, tokens)
    if tokens > 2 * len(TIES) and percent and classes > 5_000:
        tie(draw, (hidden,), weight[FIRST:last])
        hidden[len(TIES) : 2 * len(TIES)] = hidden[: len(TIES)]
        label[: 2 * len(TIES)] = torch.tensor(TIES, device=label.device).T.flatten()
        targets[: 2 * len(TIES)] = True
        best = (hidden.cpu().double() @ weight[FIRST:last].cpu().double().mT).argmax(1).to(label.device)
        row = torch.arange(tokens, device=label.device)
        label = torch.where((row >= 2 * len(TIES)) & (row % 4 == 0), best, label)
    return torch.where(targets, FIRST + label, -100)
