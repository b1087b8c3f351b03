"""The runs of two processes that test_wrapper_ranks.py compares with runs of one: each wrapper around the same model.

`python wrapper_runs.py OUT` runs every case on two ranks over gloo and writes the gradients that rank 0 and rank 1 saw.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import official_double as official
import parallel_runs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lumos import Lumos, apply_lumos_kernels
from lumos.head import LMHead
from lumos.model import Block, Decoder, HeadNorm, RMSNorm

RANKS, STEPS = 2, 3
BATCHES = ((0, 3), (2, 4))  # micro-batches of each rank
LOSS = {"decay_start": 0.25, "z_loss_weight": 0.01}


def make_model(dtype: torch.dtype = torch.float64) -> Lumos:
    torch.manual_seed(0)
    return Lumos(parallel_runs.config()).to(dtype).train()


def with_adapters(model: Lumos) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["lm_head", "embed_tokens", "q_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return adapted.to(model.lm_head.weight.dtype)


def loss_of(model: nn.Module, number: int, labels: bool = True) -> Tensor:
    batch = parallel_runs.micro_batch(number)
    masked = batch.masked
    if not labels:
        return model(masked.input_ids, layout=batch.layout).hidden_states.square().mean()
    return model(masked.input_ids, labels=masked.labels, layout=batch.layout, rows=masked.rows, **LOSS).loss


def official_model() -> nn.Module:
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        return official.TrainingModel(official.config()).double()
    finally:
        torch.set_default_dtype(torch.float32)


def official_loss(model: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    codes = torch.randint(official.VISUAL_START, official.VOCABULARY, (4, 4), generator=generator)
    rows = [token for row in codes.tolist() for token in (*row, 8803)]
    frame = [8197, 8805, 8805, *rows, 8196]
    ids = [0, *range(100, 103 + number), 8710, 9004, 8805, 8807, *frame, *frame, 9005, 8710]
    labels = [-100] * ids.index(8197) + ids[ids.index(8197) :]
    options = official.training_options(seeded=True)
    schedule = lambda u: torch.cos(u * math.pi / 2)  # noqa: E731
    return model([ids], [labels], cfg=options, mask_schedule=schedule, special_token=official.SPECIAL)[0]


def ddp(loss: Callable = loss_of, make: Callable[[], nn.Module] = make_model, **options) -> list[dict[str, Tensor]]:
    wrapped = DistributedDataParallel(make(), **options)
    return steps(wrapped, wrapped.module, loss)


def ddp_accumulating() -> list[dict[str, Tensor]]:
    wrapped, (first, second) = DistributedDataParallel(make_model()), BATCHES[dist.get_rank()]
    with wrapped.no_sync():
        loss_of(wrapped, first).backward()
    loss_of(wrapped, second).backward()
    return [gradients(wrapped.module)]


def fsdp1(policy: ModuleWrapPolicy | None, make: Callable[[], nn.Module] = make_model, **options) -> list[dict]:
    """The gradients as steps of SGD with rate 1: flat parameters hide them."""
    wrapped = FullyShardedDataParallel(make(), auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
    found, optimizer = [], torch.optim.SGD(wrapped.parameters(), lr=1.0)
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        before = {clean(name): p.detach().clone() for name, p in wrapped.named_parameters()}
    loss_of(wrapped, BATCHES[dist.get_rank()][0]).backward()
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        found.append({clean(name): before[clean(name)] - p.detach() for name, p in wrapped.named_parameters()})
    return found


def fsdp2(*kinds: type[nn.Module], make: Callable[[], nn.Module] = make_model, names: tuple[str, ...] = (), **options):
    """Each module of a kind, or with a name, in a group of its own, and the rest in the root's."""
    model = make()
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, kinds) or name.rpartition(".")[2] in names:
            fully_shard(module, **options)
    fully_shard(model, **options)
    return steps(model, model)


def offloaded(wrapper: Callable) -> list[dict[str, Tensor]]:
    model = make_model()
    apply_activation_checkpointing(model, wrapper, check_fn=lambda module: isinstance(module, (Block, LMHead)))
    wrapped = DistributedDataParallel(model, static_graph=True)
    return steps(wrapped, model)


def steps(wrapped: nn.Module, model: nn.Module, loss: Callable = loss_of) -> list[dict[str, Tensor]]:
    found = []
    for _ in range(STEPS):
        wrapped.zero_grad(set_to_none=True)
        loss(wrapped, BATCHES[dist.get_rank()][0]).backward()
        found.append(gradients(model))
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[clean(name)] = grad.detach().clone()
    return found


def clean(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_fsdp_wrapped_module.", "")


def patched() -> nn.Module:
    model = official_model()
    apply_lumos_kernels(model)
    return model


def adapted() -> nn.Module:
    return with_adapters(make_model())


no_labels = functools.partial(loss_of, labels=False)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES: dict[str, Callable[[], list[dict[str, Tensor]]]] = {
    "ddp": ddp,
    "ddp, bucket view": lambda: ddp(gradient_as_bucket_view=True),
    "ddp, find unused": lambda: ddp(find_unused_parameters=True),
    "ddp, static graph": lambda: ddp(static_graph=True),
    "ddp, find unused, no labels": lambda: ddp(no_labels, find_unused_parameters=True),
    "ddp, static graph, no labels": lambda: ddp(no_labels, static_graph=True),
    "ddp, static graph, official": lambda: ddp(official_loss, patched, static_graph=True),
    "ddp, static graph, adapters": lambda: ddp(make=adapted, static_graph=True),
    "ddp, accumulating": ddp_accumulating,
    "offloaded": lambda: offloaded(offload_wrapper),
    "checkpointed": lambda: offloaded(checkpoint_wrapper),
    "fsdp1": lambda: fsdp1(None),
    "fsdp1, lm_head alone": lambda: fsdp1(ModuleWrapPolicy({Block, LMHead, nn.Embedding})),
    "fsdp1, original parameters": lambda: fsdp1(ModuleWrapPolicy({Block, LMHead}), use_orig_params=True),
    "fsdp2": fsdp2,
    "fsdp2, layers": lambda: fsdp2(Block),
    "fsdp2, all alone": lambda: fsdp2(Block, LMHead, nn.Embedding, RMSNorm),
    "fsdp2, decoder and head norms": lambda: fsdp2(Decoder, LMHead, Block, HeadNorm),
    "fsdp2, adapters": lambda: fsdp2(Block, make=adapted),
    "fsdp2, adapters, lm_head alone": lambda: fsdp2(Block, make=adapted, names=("lm_head", "embed_tokens")),
    "fsdp2, bfloat16": lambda: fsdp2(Block, LMHead, make=functools.partial(make_model, torch.float32), mp_policy=BF16),
}


def alone(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The gradient of one process: the mean over the ranks of their losses' gradients."""
    make, loss, batches = functools.partial(make_model, dtype), loss_of, [numbers[:1] for numbers in BATCHES]
    if "official" in name:
        make, loss = patched, official_loss
    if "adapters" in name:
        make = adapted
    if "no labels" in name:
        loss = no_labels
    if "accumulating" in name:
        batches = BATCHES
    model = make()
    for numbers in batches:
        for number in numbers:
            (loss(model, number) / RANKS).backward()
    return gradients(model)


def as_rank(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, case in CASES.items():
        torch.manual_seed(0)
        try:
            found = copy.copy(case())
        except Exception as error:  # one case that fails leaves the others their turn; its test shows the error
            found = f"{type(error).__name__}: {error}"
        torch.save(found, out / f"{name}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(parallel_runs.fork(Path(sys.argv[1]), RANKS, as_rank))
