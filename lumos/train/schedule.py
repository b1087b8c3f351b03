"""The learning rate of each optimizer step."""

from __future__ import annotations

import math

import torch

from lumos.train.config import TrainConfig


def lr_factor(config: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` >= 0 over config.lr.

    Rises linearly over the first `warmup` steps, the last of which has the whole; then stays, or falls in a half
    cosine or a line, at whose end, the last step, stands min_lr.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup + 1) / max(config.steps - config.warmup, 1))
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    least = config.min_lr / config.lr
    return least + (1 - least) * left


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Sets the optimizer's learning rates by lr_factor; its state_dict is the number of steps done."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(config, step))
