"""One optimizer step of AR-DF training (arXiv 2507.08801, sections 3.3 and 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lumos.model import Lumos, LumosOutput
from lumos.parallel import Parallel
from lumos.train.batches import MicroBatch
from lumos.train.nonfinite import StepGuard


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step measured over all ranks, on the device: reading a tensor waits for it.

    loss: mean over the step's target slots; frame_losses: [F], nan for a frame without targets; grad_norm: before
    clipping; targets: fp64, the number of target slots; skipped: bool, whether a guard kept the step off the weights.
    """

    loss: Tensor
    frame_losses: Tensor
    grad_norm: Tensor
    targets: Tensor
    skipped: Tensor


def training_step(
    model: Lumos,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    clip: float,
    dtype: torch.dtype = torch.float32,
    parallel: Parallel | None = None,
    loss: Mapping[str, float | None] | None = None,
    guard: StepGuard | None = None,
) -> StepStats:
    """One optimizer step over micro-batches, without a host sync.

    The gradient is that of the mean over the target slots of all micro-batches of all ranks, whatever their sizes.
    batches: the rank's own micro-batches, whole: the ranks of a context group get the same, and every rank as many.
    dtype: bfloat16 computes in it; the weights that are optimised keep their dtype.
    parallel: of a model that parallel.apply has sharded; None for a run of one process.
    loss: options of Lumos.forward, z_loss_weight, focal_gamma and decay_start (TrainConfig.loss_options).
    guard: keeps steps that are not finite off the weights; the optimizer must be fused (make_optimizer).
    """
    device = next(model.parameters()).device
    parallel = parallel or Parallel(device)
    batches = [parallel.split(batch) for batch in batches]
    num_frames = max(batch.layout.num_frames for batch in batches)
    frames_of_all = parallel.largest(num_frames)
    own_targets = sum(batch.num_targets for batch in batches)
    targets = parallel.sum(torch.full((), own_targets, dtype=torch.float64, device=device))
    optimizer.zero_grad(set_to_none=True)
    losses, sums, counts = 0.0, 0.0, 0.0
    for number, batch in enumerate(batches, start=1):
        parallel.reduce_gradients(model, number == len(batches))
        batch = batch.to(device)
        with parallel.autocast(dtype):
            out: LumosOutput = model(
                batch.masked.input_ids,
                labels=batch.masked.labels,
                layout=batch.layout,
                rows=batch.masked.rows,
                context=parallel.context,
                **(loss or {}),
            )
        share = out.loss * (batch.num_targets / targets.clamp_min(1)).to(out.loss.dtype)
        losses = losses + share.detach()
        more_sums, more_counts = out.frame_sums(num_frames)
        sums, counts = sums + more_sums, counts + more_counts
        del out  # and its hidden states: the loss keeps what backward reads of them
        share.backward()
    frames = frames_of_all()
    sums, counts = (F.pad(x, (0, frames - num_frames)) for x in (sums, counts))
    mean, sums, counts = parallel.sum(torch.cat([losses.double()[None], sums, counts])).split([1, frames, frames])
    grad_norm = clip_gradients(model, clip)
    if guard is None:
        optimizer.step()
        skipped = torch.zeros((), dtype=torch.bool, device=device)
    else:
        skipped = guard.step(optimizer, mean[0], grad_norm)
    return StepStats(mean[0].to(losses.dtype), (sums / counts).float(), grad_norm, targets, skipped)


def clip_gradients(model: Lumos, clip: float) -> Tensor:
    """Scales the gradients down to the norm `clip` over all ranks; returns their norm before, without a host sync."""
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    if isinstance(norm, DTensor):  # of sharded gradients: the ranks' parts have to be put together
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    return norm


def make_optimizer(model: Lumos, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of the weights that are trained, with weight decay on the matrices; norms and biases have none."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (others if parameter.dim() < 2 or "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
