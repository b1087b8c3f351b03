"""Memory, bytes on the wire and time of a training step on many GPUs, from formulas.

The bytes are checked against runs of 2 and 4 processes (tests/test_parallel.py, tests/test_scaling.py); times are
predictions from the assumptions that Cluster names, and no GPU has confirmed them.

Legend: E elements of parameters, n ranks that shard them, S tokens of a rank, C hidden, Q and K channels of all query
and of all key heads, I channels of the MLP, e bytes of an element in the compute dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lumos.config import LumosConfig
from lumos.model import Lumos
from lumos_kernels import FrameLayout

FP32 = 4
LOGIT_ROWS = 4096  # rows of logits that the loss holds at once on a GPU
RECOMPUTATION = ("none", "selective", "full")


@dataclass(frozen=True)
class Cluster:
    """GPUs and links, and what is assumed of them. Defaults: nodes of 8 H100 SXM with 400 Gb/s of network a GPU.

    flops: dense bf16 peak; memory: bytes of a GPU; memory_rate, nvlink, network: bytes/s a GPU, one direction.
    compute_share: share of the peak that the matmuls and kernels of a step reach, communication left out. Assumed.
    link_share: share of a link's rate that collectives reach. Assumed.
    latency: seconds of a collective between two ranks; it grows with the logarithm of their number. Assumed.
    overlap: share of the computing time behind which FSDP's collectives can hide. Assumed.
    usable: share of the memory that tensors may take; the rest is for CUDA, nccl and fragments. Assumed.
    """

    gpus_per_node: int = 8
    flops: float = 989e12
    memory: float = 80e9
    memory_rate: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    compute_share: float = 0.45
    link_share: float = 0.75
    latency: float = 15e-6
    overlap: float = 0.8
    usable: float = 0.9

    def seconds(self, sent: float, ranks: int, neighbours: bool = True) -> float:
        """Time of a collective in which each rank sends `sent` bytes.

        neighbours: ring collectives over whole nodes, which cross between nodes on all network cards of a node at
            once, each carrying its part; otherwise every rank sends to every other (all-to-all).
        """
        if ranks == 1:
            return 0.0
        rate = self.nvlink
        if ranks > self.gpus_per_node:
            rate = min(rate, self.network * (self.gpus_per_node if neighbours else 1))
        return self.latency * math.ceil(math.log2(ranks)) + sent / (rate * self.link_share)


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU. Parameters, gradients and optimizer state stay between steps.

    gathered: the weights of the rest of the model and of two layers in the compute dtype.
    accumulated: gradients of the whole model that wait for the last micro-batch.
    activations, loss: what the forward pass keeps; a recomputed layer; a chunk of logits; the gradient of lm_head.
    reduction: the gradients of the rest of the model on their way to the ranks, when backward has used up activations.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    accumulated: int
    activations: int
    loss: int
    reduction: int

    @property
    def total(self) -> int:
        """At the most: the two ends of a backward pass do not come at once."""
        return sum(vars(self).values()) - min(self.activations + self.loss, self.reduction)


@dataclass(frozen=True)
class Collectives:
    """Bytes of the largest tensor of each collective of a step, summed by kind; statistics left out (below 1 kB)."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int
    all_to_all: int


@dataclass(frozen=True)
class Step:
    """One optimizer step of a model on `processes` GPUs, laid out as lumos.parallel does.

    layouts: of the streams of one data-parallel rank, its micro-batches, before any padding.
    targets: target slots of each stream.
    recomputation: activation_checkpointing of TrainConfig.
    element_size: of the compute dtype, 2 for bfloat16.
    """

    config: LumosConfig
    layouts: tuple[FrameLayout, ...]
    targets: tuple[int, ...]
    processes: int = 1
    replicate: int = 1
    context: int = 1
    recomputation: str = "none"
    element_size: int = 2

    @property
    def shards(self) -> int:
        """n, the ranks over which each copy of the parameters is spread."""
        return self.processes // self.replicate

    @property
    def _residual_size(self) -> int:
        """Bytes of an element of the weights and between the layers: autocast, by which one process computes, leaves
        them in fp32.
        """
        return FP32 if self.processes == 1 else self.element_size

    def own_tokens(self, layout: FrameLayout) -> int:
        """S of a stream, padding included."""
        return -(-layout.num_tokens // self.context)

    # Memory

    def memory(self) -> Memory:
        own, tensors = self._elements(own=True), len(self._shapes[1])
        layer, rest = self._group_elements(own=False)
        layers, e, sharded = self.config.num_hidden_layers, self.element_size, self.shards > 1
        tensors += layers * len(self._shapes[0])
        tokens = max(map(self.own_tokens, self.layouts))
        logits = e * (self.config.num_classes + self.config.hidden_size) * min(tokens, LOGIT_ROWS)
        # The gradient of lm_head, which the loss makes, is among the gradients where nothing has to be reduced.
        lm_head = 0 if sharded else FP32 * self.config.vocab_size * self.config.hidden_size
        return Memory(
            parameters=FP32 * own,
            gradients=FP32 * own,
            optimizer=2 * FP32 * own + FP32 * tensors,
            gathered=e * (2 * layer + rest) if sharded else (e < FP32) * e * layers * layer,
            accumulated=(sharded and len(self.layouts) > 1) * FP32 * self._elements(own=False),
            activations=self.activation_bytes(tokens) + self._recomputed_bytes(tokens),
            loss=self.loss_bytes(tokens) + logits - lm_head,
            reduction=sharded * (e * (layer + rest) + FP32 * rest),
        )

    def activation_bytes(self, tokens: int) -> int:
        """What the forward pass keeps for backward in layers and norms, for S tokens."""
        layer = tokens * self._layer_bytes(self.recomputation)
        final_norm = tokens * (2 * self._residual_size * self.config.hidden_size + FP32)
        return self.config.num_hidden_layers * layer + final_norm

    def loss_bytes(self, tokens: int) -> int:
        """What the loss keeps: the hidden states, and the gradients of them and of lm_head, made in the forward pass.
        The latter holds the class slice in fp32 until it is whole and in the dtype of the weights.
        """
        lm_head = max(self._residual_size * self.config.vocab_size, FP32 * self.config.num_classes)
        return self.config.hidden_size * (2 * tokens * self.element_size + lm_head)

    def _layer_bytes(self, recomputation: str) -> int:
        """Of one token. In the order of the computation, unless all of it comes from the layer's input."""
        c, e, r = self.config, self.element_size, self._residual_size
        hidden, mlp, heads = c.hidden_size, c.intermediate_size, c.num_attention_heads
        q, k = heads * c.head_dim, c.num_key_value_heads * c.head_dim
        if recomputation == "full":
            return r * hidden
        if recomputation == "selective":  # input; q, k, v; attention; o_proj; gate, up; down_proj where read
            return (
                r * hidden
                + e * ((q + 2 * k) + q + hidden + 2 * mlp + (c.swin_norm or c.dropout > 0) * hidden)
                + FP32 * heads
            )
        # Before the norm, before its weight, and what the matmuls take; behind a branch all in the compute dtype.
        norms = 2 * ((3 * e if c.swin_norm else 2 * r + e) * hidden + FP32)
        projected = q + 2 * k if self.context == 1 else q + k  # v travels on to the ranks of its heads
        attended = q + (q + k if self.context == 1 else q + 2 * k) + (self.context > 1) * q
        return norms + e * (projected + attended + 4 * mlp) + FP32 * heads

    def _recomputed_bytes(self, tokens: int) -> int:
        """One layer at a time is recomputed whole."""
        return 0 if self.recomputation == "none" else tokens * self._layer_bytes("none")

    # Bytes on the wire

    def collectives(self) -> Collectives:
        layers, micro_batches = self.config.num_hidden_layers, len(self.layouts)
        layer, rest = self._group_elements(own=False)
        sharded = self.shards > 1
        return Collectives(
            # The last layer stays gathered between forward and backward.
            all_gather=sharded * self.element_size * micro_batches * (rest + (2 * layers - 1) * layer),
            reduce_scatter=sharded * FP32 * (rest + layers * layer),
            all_reduce=(self.replicate > 1) * FP32 * (rest + layers * layer) // self.shards,
            all_to_all=sum(self._exchanged(self.own_tokens(layout)) for layout in self.layouts),
        )

    def bytes_sent(self) -> dict[str, float]:
        """Bytes a rank sends in a step, by kind of collective, by ring algorithms and direct exchange."""
        calls, n, r, c = self.collectives(), self.shards, self.replicate, self.context
        return {
            "all_gather": calls.all_gather * (n - 1) / n,
            "reduce_scatter": calls.reduce_scatter * (n - 1) / n,
            "all_reduce": calls.all_reduce * 2 * (r - 1) / r,
            "all_to_all": calls.all_to_all * (c - 1) / c,
        }

    def _exchanged(self, tokens: int) -> int:
        """q, k, v there and the output back, in forward, in backward, and in a recomputed forward."""
        if self.context == 1:
            return 0
        c = self.config
        channels = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        passes = 2 if self.recomputation == "none" else 3
        return passes * c.num_hidden_layers * tokens * channels * self.element_size

    # Time: predictions

    def flops(self) -> int:
        """Useful FLOPs of a rank (LumosConfig.training_flops), recomputation not counted."""
        useful = sum(self.config.training_flops(x, n) for x, n in zip(self.layouts, self.targets, strict=True))
        return useful // self.context

    def seconds(self, cluster: Cluster) -> dict[str, float]:
        """Predicted seconds of a step by cause; "total" is their sum."""
        work, sent, n = self.flops(), self.bytes_sent(), self.shards
        # The forward of the layers once more; selective repeats norms, rope and products, which are memory traffic.
        repeated = {"none": 0.0, "selective": 0.05, "full": 1 / 3}[self.recomputation]
        compute = work * (1 + repeated) / (cluster.flops * cluster.compute_share)
        _, rest = self._group_elements(own=False)
        first = cluster.seconds(self.element_size * rest * (n - 1) / n, n)  # before the first layer: nothing hides it
        collectives = (2 * self.config.num_hidden_layers - 1) * len(self.layouts) + self.config.num_hidden_layers
        sharding = cluster.seconds(sent["all_gather"] + sent["reduce_scatter"], n)
        sharding += (collectives - 1) * cluster.seconds(0, n) - first
        if self.replicate > 1:  # between GPUs of different nodes, where there are several
            sharding += cluster.seconds(sent["all_reduce"], self.processes, neighbours=False)
        exchanges = (4 if self.recomputation == "none" else 6) * self.config.num_hidden_layers * len(self.layouts)
        exchange = cluster.seconds(sent["all_to_all"], self.context, neighbours=False)
        exchange += (exchanges - 1) * cluster.seconds(0, self.context)
        parts = {
            "compute": compute,
            "optimizer": 7 * FP32 * self._elements(own=True) / cluster.memory_rate,
            "first gather": len(self.layouts) * first,
            "sharding beyond compute": max(0.0, sharding - cluster.overlap * compute),
            "exchange": exchange,
        }
        return {**parts, "total": sum(parts.values())}

    def mfu(self, cluster: Cluster) -> float:
        """Predicted share of the peak that useful FLOPs reach."""
        return self.flops() / (self.seconds(cluster)["total"] * cluster.flops)

    # Parameters

    def _group_elements(self, own: bool) -> tuple[int, int]:
        """Elements of one layer and of the rest, as FSDP2 gathers them or as it stores a rank's part of them.

        FSDP2 cuts the first dimension into n equal parts, the last ones padded: rank 0 holds full parts.
        """
        layer, rest = (
            sum(-(-rows // self.shards) * math.prod(columns) for rows, *columns in shapes) for shapes in self._shapes
        )
        return (layer, rest) if own else (layer * self.shards, rest * self.shards)

    def _elements(self, own: bool) -> int:
        layer, rest = self._group_elements(own)
        return rest + self.config.num_hidden_layers * layer

    @property
    def _shapes(self) -> tuple[list[torch.Size], list[torch.Size]]:
        return _parameter_shapes(*(getattr(self.config, name) for name in _SHAPING))


def fitting_steps(step_of: Callable[..., Step], cluster: Cluster, gpus: int) -> list[Step]:
    """Steps on `gpus` GPUs whose tensors fit, those first that train on most tokens a second by prediction.

    step_of(**options) makes a Step of the processes, replicate, context and recomputation given. Tried are context
    groups inside a node, copies of the model on a node, on 8 nodes and on all of them, and every recomputation.
    """
    found = []
    for context, shards, recomputation in itertools.product((1, 2, 4, 8), sorted({gpus, 8, 64}), RECOMPUTATION):
        if gpus % shards or shards % context:
            continue
        step = step_of(processes=gpus, replicate=gpus // shards, context=context, recomputation=recomputation)
        fits = step.memory().total <= cluster.usable * cluster.memory
        if fits and not step.config.num_key_value_heads % context:
            found.append(step)
    return sorted(found, key=lambda step: step.seconds(cluster)["total"] * step.context)


_SHAPING = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "model_parallel_size",
)


@functools.cache
def _parameter_shapes(*sizes: int) -> tuple[list[torch.Size], list[torch.Size]]:
    """Of the parameters of one layer, and of those outside the layers. sizes: of _SHAPING."""
    with torch.device("meta"):
        model = Lumos(LumosConfig(**dict(zip(_SHAPING, sizes, strict=True)), num_hidden_layers=1, visual_start=9006))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    layer = [shape for name, shape in shapes.items() if name.startswith("model.layers.")]
    return layer, [shape for name, shape in shapes.items() if not name.startswith("model.layers.")]
