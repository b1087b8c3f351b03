"""The exponential moving average of the weights, the model to sample from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from lumos.parallel import local


class WeightAverage(Stateful):
    """Average of a model's trainable weights: average = decay * average + (1 - decay) * weights after each step.

    Computes what torch.optim.swa_utils.get_ema_multi_avg_fn computes, bit for bit, but keeps out the steps that a
    StepGuard kept off the weights, without a host sync. AveragedModel would copy the module, which FSDP2 refuses; here
    each rank averages the shards it has. Takes as much memory as the fp32 weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """After an optimizer step. skipped: bool scalar on the weights' device: leave the average alone."""
        weight = torch.where(skipped, 0.0, 1 - self.decay)
        for average, parameter in zip(self._average.values(), self._weights.values(), strict=True):
            local(average).lerp_(local(parameter), weight)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; behind, its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._average.values(), self._weights.values(), strict=True):
            kept = local(parameter).clone()
            local(parameter).copy_(local(average))
            local(average).copy_(kept)
