"""The runs of several processes that test_parallel.py compares with runs of one.

`torchrun --nproc-per-node N parallel_runs.py OUT` steps each case for N processes and writes what came out to OUT, a
file a rank; `python parallel_runs.py OUT N` does the same without torchrun, and imports torch once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from live_bytes import PeakBytes
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumos import Lumos, LumosConfig
from lumos.masking import mask_tokens
from lumos.parallel import Parallel
from lumos.tokens import TEXT_START, VISUAL_START, build_document
from lumos.train import MicroBatch, StepStats, make_optimizer, training_step
from lumos_kernels import FrameLayout

CODES = 40
FIRST_CODE = 9100  # a small vocabulary, so that the runs are short
STEPS = 3
CLIP = 0.3  # below the norm of the first gradient, above that of the last


@dataclass(frozen=True)
class Case:
    processes: int
    replicate: int = 1
    context: int = 1
    dtype: torch.dtype = torch.float32
    loss: dict[str, float] = field(default_factory=dict)
    checkpointing: str = "none"
    micro_batches: int = 8


SHAPED = {"focal_gamma": 2.0, "decay_start": 0.25, "z_loss_weight": 0.01}
CASES = {
    "fsdp 2": Case(2),
    "context 2": Case(2, context=2),
    "fsdp 2, shaped loss, selective": Case(2, loss=SHAPED, checkpointing="selective"),
    "fsdp 2, bfloat16": Case(2, dtype=torch.bfloat16),
    "fsdp 4": Case(4),
    "hsdp 2 x 2": Case(4, replicate=2),
    "fsdp 2 x context 2, shaped loss": Case(4, context=2, loss=SHAPED),
    "hsdp 2 x context 2, full": Case(4, replicate=2, context=2, checkpointing="full"),
    "context 4": Case(4, context=4),
}


def config() -> LumosConfig:
    """Two query heads a key/value head, two groups of norms, a class slice that a test can afford."""
    return LumosConfig(
        vocab_size=FIRST_CODE + CODES,
        visual_start=FIRST_CODE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        model_parallel_size=2,
    )


def micro_batch(number: int) -> MicroBatch:
    """Streams of 1 to 3 documents of 1 to 4 frames, some without text, one that is mostly text, one with no frames."""
    random = torch.Generator().manual_seed(number)
    documents = []
    for document in range(1 + number % 3):
        codes = torch.randint(0, CODES, (1 + (number + document) % 4, 4, 8), generator=random)
        text = torch.randint(10, 4000, (300 if number == 1 else 3 * number + document,), generator=random)
        ids = build_document(None if (number + document) % 3 == 0 else text, codes, seconds=1, fps=4)
        documents.append(torch.where(ids >= VISUAL_START, ids - VISUAL_START + FIRST_CODE, ids))
    if number == 5:
        documents = [torch.full((7,), TEXT_START)]
    cu_seqlens = torch.tensor([0, *(len(ids) for ids in documents)]).cumsum(0)
    ids = torch.cat(documents)
    layout = FrameLayout.from_tokens(ids, cu_seqlens)
    seeds = [100 * number + document for document in range(len(documents))]
    return MicroBatch(mask_tokens(ids, layout, seeds=seeds, kind="DiffForcing", classes=config().classes), layout)


def make_model(case: Case, dtype: torch.dtype = torch.float32) -> Lumos:
    torch.manual_seed(0)
    model = Lumos(config()).to(dtype).train()
    model.checkpoint_layers(int(case.checkpointing != "none"), selective=case.checkpointing == "selective")
    return model


def run(case: Case, parallel: Parallel, model: Lumos, dtype: torch.dtype) -> dict[str, Any]:
    """Three steps: gradients (clipped) of the first, weights after the last, statistics and collectives of all."""
    optimizer = make_optimizer(model, 1e-3, 0.1)
    batches = [micro_batch(number) for number in range(case.micro_batches)]
    mine = batches[parallel.data_rank :: parallel.data_size]
    found: dict[str, Any] = {"stats": []}
    with Collectives() as collectives:
        for step in range(STEPS):
            stats: StepStats = training_step(model, optimizer, mine, CLIP, dtype, parallel, loss=case.loss)
            found["stats"].append(stats)
            if step == 0:
                found["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters()}
    found["weights"] = {name: whole(p) for name, p in model.named_parameters()}
    found["collectives"] = collectives.calls
    state = [x for values in optimizer.state.values() for x in values.values()]
    found["bytes"] = [own_bytes(x) for x in (model.parameters(), (p.grad for p in model.parameters()), state)]
    if case.processes > 1:
        optimizer.zero_grad()
        with PeakBytes([*model.parameters(), *state]) as live:
            training_step(model, optimizer, mine, CLIP, dtype, parallel, loss=case.loss)
        found["peak"] = live.peak
    return found


def own_bytes(tensors: Iterable[Tensor]) -> int:
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Collectives(TorchDispatchMode):
    """Records (name, bytes of the largest tensor) of every collective inside, except those that DTensor makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.calls.append((func.overloadpacket.__name__, max(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


def main(out: Path) -> None:
    torch.set_num_threads(1)
    parallel = Parallel.start("cpu")
    for name, case in CASES.items():
        if case.processes != parallel.world_size:
            continue
        place = Parallel.start("cpu", case.replicate, case.context)
        model = place.apply(make_model(case), case.dtype)
        found = run(case, place, model, case.dtype)
        found["place"] = (place.data_rank, place.data_size, place.context_rank, place.context_size)
        found["any"] = place.any(place.rank == 1), place.any(False)
        if not place.is_main:  # the same on all ranks, and large
            del found["weights"], found["gradients"]
        torch.save(found, out / f"{name}.{place.rank}.pt")
    parallel.close()


def _as_rank(rank: int, processes: int, port: int, run: Callable[[Path], object], out: Path) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in {**environment, "MASTER_PORT": port}.items()}
    run(out)


def fork(out: Path, processes: int, run: Callable[[Path], object] = main) -> int:
    """Run `run(out)` in so many ranks, whose environment torchrun would have set. Return the worst exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_as_rank, args=(rank, processes, port, run, out)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode) for rank in ranks)


if __name__ == "__main__":
    folder, *number = sys.argv[1:]
    sys.exit(fork(Path(folder), int(number[0])) if number else main(Path(folder)))
