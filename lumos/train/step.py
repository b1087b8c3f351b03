"""One optimizer step of AR-DF training (arXiv 2507.08801, sections 3.3 and 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lumos.model import Lumos, LumosOutput
from lumos.train.batches import MicroBatch


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step measured, on the device: reading a tensor waits for it.

    loss: mean over the step's target slots; frame_losses: [F], nan for a frame without targets; grad_norm: before
    clipping.
    """

    loss: Tensor
    frame_losses: Tensor
    grad_norm: Tensor


def training_step(
    model: Lumos,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    clip: float,
    dtype: torch.dtype = torch.float32,
) -> StepStats:
    """One optimizer step over micro-batches, without a host sync.

    The gradient is that of the mean over the target slots of all micro-batches, whatever their sizes.
    dtype: bfloat16 runs the forward pass under autocast; the weights keep their dtype.
    """
    device = next(model.parameters()).device
    total = max(sum(batch.num_targets for batch in batches), 1)
    num_frames = max(batch.layout.num_frames for batch in batches)
    optimizer.zero_grad(set_to_none=True)
    loss, sums, counts = 0.0, 0.0, 0.0
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out: LumosOutput = model(
                batch.masked.input_ids, labels=batch.masked.labels, layout=batch.layout, rows=batch.masked.rows
            )
        share = out.loss * (batch.num_targets / total)
        share.backward()
        loss = loss + share.detach()
        more_sums, more_counts = out.frame_sums(num_frames)
        sums, counts = sums + more_sums, counts + more_counts
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return StepStats(loss, (sums / counts).float(), grad_norm)


def make_optimizer(model: Lumos, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices; norms and biases have none."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.dim() < 2 or "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
