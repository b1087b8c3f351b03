"""Steps whose loss or gradient is not finite: kept off the weights by the device, named by the host when it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumos.parallel import Parallel, local
from lumos_kernels import FrameLayout

if TYPE_CHECKING:  # lumos.train.step builds on this module
    from lumos.train.batches import MicroBatch

NAMED = 5


class StepGuard:
    """Lets an optimizer step change weights and state only where loss and gradient norm are finite.

    The decision stays on the device: the fused optimizer kernels take it as a tensor, so that no host ever waits.
    stop: after the first step that is not finite, every later one is kept off too. Whenever the host looks, the weights
        are those before the bad step.
    """

    def __init__(self, stop: bool, device: torch.device | str) -> None:
        self.stop = stop
        self._stopped = torch.zeros((), device=device)

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """optimizer.step(), of a fused optimizer; returns a bool scalar on the device: whether it changed nothing.

        loss, grad_norm: scalars over all ranks, the same on each, so that all decide alike.
        """
        if not optimizer.defaults.get("fused"):
            raise ValueError("optimizer must be a fused one, whose kernels can leave a step out")
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        if self.stop:
            self._stopped = torch.maximum(self._stopped, bad.float())
            bad = self._stopped.bool()
        optimizer.found_inf = bad.float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        return bad


def explain(
    model: nn.Module,
    batches: Sequence[MicroBatch],
    documents: Sequence[Sequence[str]],
    dtype: torch.dtype,
    parallel: Parallel | None = None,
    loss: Mapping[str, float | None] | None = None,
) -> str:
    """Runs the micro-batches of a bad step again, one by one, and says where it stops being finite.

    documents: the names of each micro-batch's documents, in the order of the stream. The weights must be those the step
    began with. Every rank calls it, with as many micro-batches as the others, and gets the findings of all of them.
    Clears the gradients.
    """
    parallel = parallel or Parallel(next(model.parameters()).device)
    in_loss: list[str] = []
    in_gradient: list[str] = []
    bad_gradients: list[str] = []
    bad_weights = _not_finite(model, lambda parameter: parameter)

    def compute(batch: MicroBatch) -> Tensor:
        part = parallel.split(batch).to(parallel.device)
        with parallel.autocast(dtype):
            return model(
                part.masked.input_ids,
                labels=part.masked.labels,
                layout=part.layout,
                rows=part.masked.rows,
                context=parallel.context,
                **(loss or {}),
            ).loss

    for batch, names in zip(batches, documents, strict=True):
        model.zero_grad(set_to_none=True)
        parallel.reduce_gradients(model, True)
        value = compute(batch)
        value.backward()
        bad = _not_finite(model, lambda parameter: parameter.grad)
        bad_gradients += [name for name in bad if name not in bad_gradients]
        if parallel.any(not value.isfinite()):
            # In a shared stream one document spoils others: attention multiplies what a row does not see by zero.
            with torch.no_grad():
                alone = [bool(compute(one).isfinite()) for one in _alone(batch, len(names), parallel)]
            in_loss += [name for name, finite in zip(names, alone, strict=False) if not finite]
        elif bad:
            in_gradient += names
    model.zero_grad(set_to_none=True)
    parts = zip(*_gather((in_loss, in_gradient, bad_gradients, bad_weights), parallel), strict=True)
    in_loss, in_gradient, bad_gradients, bad_weights = map(_once, parts)
    if bad_weights:
        return f"weights that are not finite before the step: {_shortened(bad_weights)}; no step after it can be finite"
    if not (in_loss or in_gradient or bad_gradients):
        return "computed again, the step is finite: a fault of the machine, or an op that is not deterministic"
    where = f"the gradient of {_shortened(in_gradient)}" if in_gradient else "the loss of documents in one stream only"
    where = f"the loss of {_shortened(in_loss)}" if in_loss else where
    parameters = f"; first parameters with such gradients: {_shortened(bad_gradients)}" if bad_gradients else ""
    return f"not finite: {where}{parameters}"


def _alone(batch: MicroBatch, documents: int, parallel: Parallel) -> Iterator[MicroBatch]:
    """The first documents of a micro-batch, each as a stream of its own.

    The last one comes again until every rank has computed as many: where the weights are sharded they compute together.
    """
    masked, ends = batch.masked, batch.layout.cu_seqlens.tolist()
    for number in range(parallel.largest(documents)()):
        first, last = ends[min(number, documents - 1)], ends[min(number, documents - 1) + 1]
        ids, labels = (x.reshape(-1)[first:last] for x in (masked.input_ids, masked.labels))
        rows = masked.rows[(masked.rows >= first) & (masked.rows < last)] - first
        layout = FrameLayout.from_tokens(ids, torch.tensor([0, last - first], dtype=torch.int32))
        yield replace(batch, masked=replace(masked, input_ids=ids, labels=labels, rows=rows), layout=layout)


def _not_finite(model: nn.Module, part: Callable[[nn.Parameter], Tensor | None]) -> list[str]:
    """Names of the parameters whose part, on this rank, is not finite, in the order of the model."""
    names, finite = [], []
    for name, parameter in model.named_parameters():
        tensor = part(parameter)
        if tensor is not None:
            names.append(name)
            finite.append(local(tensor).detach().isfinite().all())
    flags = torch.stack(finite).tolist() if finite else []
    return [name for name, good in zip(names, flags, strict=True) if not good]


def _gather(value: tuple, parallel: Parallel) -> list[tuple]:
    if parallel.mesh is None:
        return [value]
    values: list = [None] * parallel.world_size
    dist.all_gather_object(values, value, group=parallel.host_group)
    return values


def _once(lists: Iterable[Sequence[str]]) -> list[str]:
    """What the lists name, once each."""
    return list(dict.fromkeys(name for part in lists for name in part))


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
