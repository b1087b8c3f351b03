"""Training on several processes: FSDP2 and HSDP over torch.distributed, context parallelism over heads (Ulysses).

The processes of a run form a grid, replicate x shard x context, the context ranks of one stream side by side. Ranks of
one context group see the same micro-batches and compute a slice of their tokens each; all other ranks see micro-batches
of their own. Parameters, gradients and optimizer state are sharded over shard x context and repeated over replicate.

Legend of the shape suffixes: as in lumos.model, with T the tokens of the whole stream, S = T / context those of a rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lumos.config import LumosConfig
from lumos.masking import MaskedBatch
from lumos.model import Lumos
from lumos.tokens import IGNORED, TEXT_START
from lumos_kernels import FrameLayout

if TYPE_CHECKING:  # lumos.train builds on this module
    from lumos.train.batches import MicroBatch


@dataclass(frozen=True)
class Parallel:
    """The place of this process in the run. Made by Parallel.start; Parallel(device) is a run of one process.

    mesh: of the parameters, (shard,) or (replicate, shard); None in a run of one process.
    context: the exchange between the ranks that share a stream, None where each has its own.
    host_group: gloo group of all ranks, for what the hosts tell each other without their devices.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    context: HeadExchange | None = None
    host_group: dist.ProcessGroup | None = None

    @classmethod
    def start(cls, device: str = "auto", replicate: int = 1, context: int = 1) -> Parallel:
        """Joins the run that torchrun's environment describes; without one, or alone in it, a single process.

        device: cpu, cuda (the GPU of the local rank), or auto. CUDA tensors go through nccl, CPU tensors through gloo.
        replicate: copies of the sharded model; their gradients are all-reduced (HSDP).
        context: ranks that share each packed stream. replicate * context must divide the number of processes.
        """
        device = _device(device)
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        for name, degree in (("replicate", replicate), ("context", context)):
            if degree < 1 or world_size % degree:
                raise ValueError(f"{name} must divide the number of processes, {world_size}, got {degree}")
        if world_size % (replicate * context):
            raise ValueError(
                f"replicate * context must divide the number of processes, {world_size}, got {replicate} * {context}"
            )
        if world_size == 1:
            return cls(device)
        if not dist.is_initialized():
            _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        sizes = (world_size // replicate,) if replicate == 1 else (replicate, world_size // replicate)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
        exchange = None
        if context > 1:
            grid = init_device_mesh(device.type, (world_size // context, context), mesh_dim_names=("data", "context"))
            exchange = HeadExchange(grid.get_group("context"))
        return cls(device, dist.get_rank(), world_size, mesh, exchange, dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs."""
        return self.rank == 0

    @property
    def context_size(self) -> int:
        return 1 if self.context is None else self.context.size

    @property
    def context_rank(self) -> int:
        return 0 if self.context is None else self.context.rank

    @property
    def data_size(self) -> int:
        """Ranks with micro-batches of their own."""
        return self.world_size // self.context_size

    @property
    def data_rank(self) -> int:
        """0 <= data_rank < data_size, the same for the ranks that share a stream."""
        return self.rank // self.context_size

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks of a tensor of one shape, on its device, without a host sync."""
        if self.mesh is not None:
            tensor = tensor.contiguous().clone()
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. The hosts wait for each other, not for their devices."""
        return bool(self.largest(int(flag))())

    def largest(self, number: int) -> Callable[[], int]:
        """Starts finding the largest `number` of all ranks; calling the result waits for the other hosts."""
        if self.mesh is None:
            return lambda: number
        found = torch.tensor(number)
        work = dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host_group, async_op=True)

        def wait() -> int:
            work.wait()
            return int(found)

        return wait

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier(group=self.host_group)

    def close(self) -> None:
        """Leaves the run: the last call."""
        if self.mesh is not None:
            dist.destroy_process_group()

    def apply(self, model: Lumos, dtype: torch.dtype = torch.float32) -> Lumos:
        """Shards a model in place, each layer and the rest on its own (FSDP2), and moves it to the device.

        model: fp32, with the same weights on every rank; its own fp32 weights stay the ones that are optimised.
        dtype: of the gathered weights and the computation. Gradients are reduced in fp32, summed and not averaged:
            each rank's loss is its share of the mean over all targets (lumos.train.training_step).
        In a run of one process the model only moves: training_step computes in `dtype` by autocast.

        Raises ValueError for heads that the context ranks cannot share equally.
        """
        check_heads(model.config, self.context_size)
        if self.mesh is None:
            return model.to(self.device)
        policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
        last = model.model.layers[-1]
        for layer in model.model.layers:  # the last one's backward follows its forward: it stays gathered
            fully_shard(layer, mesh=self.mesh, mp_policy=policy, reshard_after_forward=layer is not last)
        # What is left, embedding, final norm and lm_head, is gathered while Lumos.forward and its backward run: the
        # loss reads lm_head.weight there as a plain tensor.
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def autocast(self, dtype: torch.dtype) -> contextlib.AbstractContextManager:
        """Where the forward pass runs: autocast in a run of one process, FSDP2's own mixed precision in others."""
        return torch.autocast(self.device.type, dtype, enabled=self.mesh is None and dtype != torch.float32)

    def reduce_gradients(self, model: Lumos, reduce: bool) -> None:
        """Whether the next backward pass of the model reduces its gradients or only adds them up on the rank."""
        if self.mesh is not None:
            model.set_requires_gradient_sync(reduce)

    def split(self, batch: MicroBatch) -> MicroBatch:
        """What this rank computes of a micro-batch on the CPU: its slice of the tokens, and the whole layout.

        A stream whose length context_size does not divide is padded by a document of padding tokens, without targets.
        """
        if self.context is None:
            return batch
        masked, layout = _padded(batch, self.context_size)
        first = self.context_rank * (layout.num_tokens // self.context_size)
        mine = (masked.rows >= first) & (masked.rows < first + layout.num_tokens // self.context_size)
        ids, labels = (self.context.own(x.reshape(-1)) for x in (masked.input_ids, masked.labels))
        masked = MaskedBatch(ids, labels, masked.rows[mine] - first, masked.mask_prob)
        return replace(batch, masked=masked, layout=layout)


class HeadExchange:
    """Context parallelism by heads: between the tokens of a rank and the heads of a rank (DeepSpeed-Ulysses).

    Rank r of the group holds the tokens r S .. (r + 1) S - 1 of a stream; in attention, all tokens and the query and
    key heads r H / size .. and r K / size .. .

    Source: arXiv 2309.14509, section 3.1.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def own(self, x: Tensor) -> Tensor:
        """[..., T] -> [..., S]: the rank's tokens of something known of all."""
        length = x.shape[-1] // self.size
        return x.narrow(-1, self.rank * length, length).contiguous()

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[S, heads, D] each -> [T, heads / size, D] each, views of what one all-to-all brought."""
        parts = [x.unflatten(1, (self.size, -1)).transpose(0, 1) for x in tensors]
        received = _AllToAll.apply(torch.cat(parts, dim=2), self.group)
        return received.flatten(0, 1).split([part.shape[2] for part in parts], dim=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[T, heads / size, D] -> [S, heads, D]."""
        received = _AllToAll.apply(x.unflatten(0, (self.size, -1)), self.group)
        return received.transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """x [size, ...]: part i goes to rank i; the result's part i came from rank i. Its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: the shard of a sharded one, the tensor itself otherwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_heads(config: LumosConfig, context: int) -> None:
    """Raises ValueError where `context` ranks cannot take an equal number of heads."""
    if config.num_key_value_heads % context:
        raise ValueError(
            f"context must divide the {config.num_key_value_heads} key/value heads of the model "
            f"({config.num_attention_heads} query heads), got {context}: each rank attends with its share of the heads"
        )


def _padded(batch: MicroBatch, multiple: int) -> tuple[MaskedBatch, FrameLayout]:
    masked, layout = batch.masked, batch.layout
    padding = -layout.num_tokens % multiple
    if not padding:
        return masked, layout
    ids = F.pad(masked.input_ids.reshape(-1), (0, padding), value=TEXT_START)
    labels = F.pad(masked.labels.reshape(-1), (0, padding), value=IGNORED)
    cu_seqlens = F.pad(layout.cu_seqlens, (0, 1), value=ids.shape[0])
    masked = MaskedBatch(ids, labels, masked.rows, F.pad(masked.mask_prob, (0, 1)))
    return masked, FrameLayout.from_tokens(ids, cu_seqlens)


def _join(backend: str) -> None:
    """Joins the other processes, also after torchrun has restarted them.

    torchrun (torch 2.13) lets restarted processes meet in the store of those before them, where they would find the
    addresses of dead processes and wait for them: each start gets keys of its own.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    if os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):  # its nodes count restarts apart
        raise RuntimeError(
            "torchrun cannot restart processes on several nodes through the store it shares with them: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes, or restart the whole run"
        )
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"restart-{restarts}", store)
    dist.init_process_group(
        backend, store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
