"""The Lumos-1 network: a Llama-like decoder over a packed stream of text and frames (arXiv 2507.08801, section 3).

Parameters carry the official names, so official checkpoints load as they are. What is particular to the model is in
three ops of lumos_kernels: mm_rope (q/k LayerNorm and 3-axis rotation), frame_attention (causal over text and frames,
bidirectional inside a frame) and tube_masked_loss (masked slots against the visual columns only).

Legend of the shape suffixes: T tokens of the packed stream (B rows x L tokens where the input is [B, L]), C hidden,
H query heads, K key/value heads, D head_dim, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lumos.config import LumosConfig
from lumos.head import LMHead, class_logits, class_loss
from lumos.output import LumosOutput as LumosOutput
from lumos.stream import ContextExchange, Stream, check_impl, choose_impl, own_layout
from lumos_kernels import FrameLayout, frame_attention, mm_rope, tube_masked_loss
from lumos_kernels.errors import describe, is_number, require_number

QK_NORM_EPS = 1e-5


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to x's dtype, then times weight. weight: [C]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class HeadNorm(nn.Module):
    """Parameters of the LayerNorm over head_dim that mm_rope applies: weight and bias [model_parallel_size, D].

    forward takes the heads, which it does not need: wrappers such as peft's modules_to_save hand on a first argument.
    """

    def __init__(self, groups: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, head_dim))
        self.bias = nn.Parameter(torch.empty(groups, head_dim))

    def forward(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(self, "unshard"):  # FSDP2 frees the weights of a group of their own behind this call
            return self.weight.clone(), self.bias.clone()
        return self.weight, self.bias


class Attention(nn.Module):
    def __init__(self, config: LumosConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        q_size, kv_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = HeadNorm(config.model_parallel_size, self.head_dim)
        self.k_norm = HeadNorm(config.model_parallel_size, self.head_dim)

    def forward(self, x_TC: Tensor, stream: Stream) -> Tensor:
        x_TC = cast_once(x_TC)
        q_THD = self.q_proj(x_TC).unflatten(-1, (-1, self.head_dim))
        k_TKD = self.k_proj(x_TC).unflatten(-1, (-1, self.head_dim))
        v_TKD = self.v_proj(x_TC).unflatten(-1, (-1, self.head_dim))
        q_THD, k_TKD = mm_rope(
            q_THD,
            k_TKD,
            stream.positions,
            theta=self.theta,
            q_norm=self.q_norm(q_THD),
            k_norm=self.k_norm(k_TKD),
            eps=QK_NORM_EPS,
            impl=choose_impl(stream.impl, "mm_rope"),
        )
        if stream.cache is not None:
            k_TKD, v_TKD = stream.cache.update(self.layer, k_TKD, v_TKD)
        if stream.context is not None:
            q_THD, k_TKD, v_TKD = stream.context.to_heads(q_THD, k_TKD, v_TKD)
        o_THD = frame_attention(
            q_THD,
            k_TKD,
            v_TKD,
            stream.limits,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            impl=choose_impl(stream.impl, "frame_attention"),
        )
        if stream.context is not None:
            o_THD = stream.context.to_tokens(o_THD)
        return self.o_proj(o_THD.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        x_TC = cast_once(x_TC)
        return self.down_proj(F.silu(self.gate_proj(x_TC)) * self.up_proj(x_TC))


class Block(nn.Module):
    """One layer. swin_norm puts the norms behind the branches instead of before them."""

    def __init__(self, config: LumosConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.swin_norm, self.dropout = config.swin_norm, config.dropout
        self.mlp_size = config.intermediate_size
        self.checkpointed = self.selective = False

    def forward(self, x_TC: Tensor, stream: Stream) -> Tensor:
        if not (self.checkpointed and self.training and torch.is_grad_enabled()):
            return self._forward(x_TC, stream)
        keep = {"context_fn": partial(create_selective_checkpoint_contexts, self._policy)} if self.selective else {}
        random = self.dropout > 0
        return checkpoint(self._forward, x_TC, stream, use_reentrant=False, preserve_rng_state=random, **keep)

    def _forward(self, x_TC: Tensor, stream: Stream) -> Tensor:
        if self.swin_norm:
            x_TC = x_TC + self._drop(self.input_layernorm(self.self_attn(x_TC, stream)))
            return x_TC + self._drop(self.post_attention_layernorm(self.mlp(x_TC)))
        x_TC = x_TC + self._drop(self.self_attn(self.input_layernorm(x_TC), stream))
        return x_TC + self._drop(self.mlp(self.post_attention_layernorm(x_TC)))

    def _policy(self, _, op: torch._ops.OpOverload, *args, **__) -> CheckpointPolicy:
        """Selective checkpointing keeps what matmuls and attention put out, except what backward never reads: the
        output of down_proj, unless a norm or dropout comes behind it.
        """
        costly = op in (torch.ops.aten.mm.default, torch.ops.lumos_kernels.frame_attention.default)
        if costly and (self.swin_norm or self.dropout or args[0].shape[1] != self.mlp_size):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def _drop(self, x_TC: Tensor) -> Tensor:
        return F.dropout(x_TC, self.dropout, self.training) if self.dropout else x_TC


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: LumosConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, stream: Stream) -> Tensor:
        """Return the hidden states [..., C] after the final norm. input_ids: int64 [T] or [B, L], T = B L."""
        x_TC = self.embed_tokens(input_ids.reshape(-1))
        for layer in self.layers:
            x_TC = layer(x_TC, stream)
        # The norm makes a new tensor in the final shape: FSDP2 warns of an output that is a view.
        return self.norm(x_TC if input_ids.dim() == 1 else x_TC.view(*input_ids.shape, x_TC.shape[-1]))


class Lumos(nn.Module):
    """Lumos-1 with its loss.

    impl: implementation of the ops, one name for all or a mapping by op name ("mm_rope", "frame_attention",
        "tube_masked_loss", "masked_sample"); an attribute that may be changed at any time. ValueError for a name that
        does not exist.
    Parameters are made on torch's default device and drawn by reset_parameters; on the meta device nothing is.
    """

    def __init__(self, config: LumosConfig, impl: str | Mapping[str, str] = "auto") -> None:
        super().__init__()
        self.config, self.impl = config, impl
        device = torch.get_default_device()
        with torch.device("meta"):  # so that torch's own initialisation does not run first
            self.model = Decoder(config)
            self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.to_empty(device=device)
        self.reset_parameters()

    @property
    def impl(self) -> str | Mapping[str, str]:
        """The implementation of the ops."""
        return self._impl

    @impl.setter
    def impl(self, impl: str | Mapping[str, str]) -> None:
        check_impl(impl)
        self._impl = impl if isinstance(impl, str) else dict(impl)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> Lumos:
        """Loads an official checkpoint, a folder or a Hugging Face repository: lumos.checkpoint.load_pretrained."""
        from lumos.checkpoint import load_pretrained

        return load_pretrained(cls, path, subfolder=subfolder, dtype=dtype, device=device, revision=revision)

    def save_pretrained(self, path: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Writes an official checkpoint folder (lumos.checkpoint.save_pretrained)."""
        from lumos.checkpoint import save_pretrained

        save_pretrained(self, path, max_shard_size=max_shard_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights for training from scratch: normal with std initializer_range, norms 1, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=self.config.initializer_range)
            elif isinstance(module, (RMSNorm, HeadNorm)):
                module.weight.fill_(1)
                if isinstance(module, HeadNorm):
                    module.bias.zero_()

    def checkpoint_layers(self, every: int = 1, selective: bool = False) -> None:
        """Recompute every n-th layer in the backward pass instead of keeping its activations; 0 keeps all of them.

        selective: keep the outputs of matmuls and attention and recompute the rest, which is cheap.
        """
        for number, layer in enumerate(self.model.layers):
            layer.checkpointed = bool(every) and number % every == 0
            layer.selective = selective

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        layout: FrameLayout | None = None,
        rows: Tensor | None = None,
        *,
        z_loss_weight: float | None = None,
        focal_gamma: float = 0.0,
        decay_start: float | None = None,
        context: ContextExchange | None = None,
    ) -> LumosOutput:
        """Hidden states of a batch and, with labels, its loss: mean cross entropy over the target slots.

        input_ids: int64 [B, L], documents padded at the end; or packed [T], then with layout.
        labels: int64, same shape. Target slots are those whose label is a visual code (in config.classes); every
            other label is ignored. No shift: slot i predicts its own token.
        layout: of input_ids, on its device; made from them where left out.
        rows: int32 [N], exactly the target slots as indices into the stream (MaskedBatch.rows): saves counting them.
            Without them, labels that are neither -100 nor new lines (8803), none of them a visual code, are an error.
        z_loss_weight: of mean(logsumexp^2) over the class slice, None for config.z_loss_weight.
        focal_gamma: 0, or >= 1 (upstream 2): each slot's cross entropy is scaled by (1 - p_target)^gamma.
        decay_start: weight of the first frame's slots; the weights rise linearly to 1 in the document's last frame
            and the mean still divides by the number of slots (upstream's CEDecay). Neither option scales the z-loss.
        context: of a stream that several ranks share (lumos.parallel): input_ids, labels and rows are then those of
            the rank's own tokens, layout that of the whole stream; so is the output the rank's own, its loss the mean
            over the rank's own target slots.

        Raises ValueError for a shape, a layout or an option that does not fit, and for documents longer than
        config.max_position_embeddings (upstream cuts them silently). Documents of a packed stream are measured
        where the layout is on the CPU: on a GPU that would make the host wait.
        """
        if decay_start is not None:
            require_number("decay_start", decay_start, "None or a finite number")
        layout = self._checked_layout(input_ids, layout, 1 if context is None else context.size)
        weight_T = None if labels is None or decay_start is None else frame_decay(layout, decay_start)
        if context is not None:
            layout = own_layout(layout, context)
            weight_T = None if weight_T is None else context.own(weight_T)
        stream = Stream(layout.positions, layout.limits, self.impl, context=context)
        hidden = self.model(input_ids, stream)
        output = LumosOutput(None, hidden, layout)
        if labels is not None:
            if not isinstance(labels, Tensor):
                raise ValueError(f"labels must be None or a tensor, got {describe(labels)}")
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels must have the shape of input_ids {[*input_ids.shape]}, got {[*labels.shape]}")
            z_loss_weight = self.config.z_loss_weight if z_loss_weight is None else z_loss_weight
            hidden_TC = hidden.reshape(-1, hidden.shape[-1])
            self._add_loss(output, hidden_TC, labels.reshape(-1), rows, z_loss_weight, focal_gamma, weight_T)
        return output

    def logits(self, hidden: Tensor, classes: tuple[int, int] | None = None) -> Tensor:
        """hidden [..., C] -> [..., hi - lo], logits of the ids lo..hi-1. classes: (lo, hi), None for config.classes."""
        return class_logits(self.lm_head, hidden, self.config.classes if classes is None else classes)

    def _replicate_for_data_parallel(self) -> None:
        raise TypeError(
            "nn.DataParallel cannot put together the layouts and losses of Lumos from several GPUs: "
            "use torch.nn.parallel.DistributedDataParallel, or lumos.parallel"
        )

    def _add_loss(
        self,
        output: LumosOutput,
        hidden_TC: Tensor,
        labels_T: Tensor,
        rows: Tensor | None,
        z_loss_weight: float,
        focal_gamma: float,
        weight_T: Tensor | None,
    ) -> None:
        """Fills loss, nll and targets."""
        require_number("z_loss_weight", z_loss_weight, "a finite number")
        if not is_number(focal_gamma) or not (focal_gamma == 0 or 1 <= focal_gamma < math.inf):
            raise ValueError(
                f"focal_gamma must be 0 or >= 1 (its gradient at p = 1 is infinite below), got {focal_gamma}"
            )
        hidden_TC = cast_once(hidden_TC)
        lo, hi = self.config.classes
        output.targets = (labels_T >= lo) & (labels_T < hi)
        loss, stats = class_loss(
            tube_masked_loss,
            self.lm_head,
            hidden_TC,
            labels_T,
            classes=(lo, hi),
            rows=rows,
            reduction="none" if focal_gamma else "mean",
            z_loss_weight=z_loss_weight,
            token_weight=weight_T,
            impl=choose_impl(self.impl, "tube_masked_loss"),
        )
        if focal_gamma:
            focal_T = (-torch.expm1(-stats.nll)) ** focal_gamma * stats.nll
            focal_T = focal_T if weight_T is None else focal_T * weight_T
            loss = (focal_T + z_loss_weight * stats.lse.square()).sum() / output.targets.sum().clamp_min(1)
        output.loss, output.nll = loss, stats.nll.detach()

    def _checked_layout(self, input_ids: Tensor, layout: FrameLayout | None, ranks: int) -> FrameLayout:
        if not isinstance(input_ids, Tensor):
            raise ValueError(f"input_ids must be a tensor [B, L] or [T], got {describe(input_ids)}")
        if layout is not None and not isinstance(layout, FrameLayout):
            raise ValueError(f"layout must be None or a FrameLayout, got {describe(layout)}")
        if layout is None:
            if ranks > 1:
                raise ValueError("context needs layout, that of the whole stream: input_ids are a part of it")
            if input_ids.dim() != 2:
                raise ValueError(
                    f"packed input_ids {[*input_ids.shape]} need layout=FrameLayout.from_tokens(input_ids, cu_seqlens)"
                )
            layout = FrameLayout.from_tokens(input_ids)
        elif layout.num_tokens != ranks * input_ids.numel() or layout.positions.device != input_ids.device:
            of = "" if ranks == 1 else f" on each of the {ranks} ranks of context"
            raise ValueError(
                f"layout must describe the {input_ids.numel()} tokens of input_ids{of} on {input_ids.device}, "
                f"got {layout.num_tokens} on {layout.positions.device}"
            )
        limit = self.config.max_position_embeddings
        longest = ranks * input_ids.shape[-1]
        if input_ids.dim() == 1 and longest > limit and layout.cu_seqlens.device.type == "cpu":
            longest = int(layout.cu_seqlens.diff().max())
        elif input_ids.dim() == 1:
            longest = 0
        if longest > limit:
            raise ValueError(f"a document has {longest} tokens, more than max_position_embeddings {limit}")
        return layout


def cast_once(x: Tensor) -> Tensor:
    """x in autocast's dtype: fp32 weights of norms promote, and each matmul would cast and keep a copy of its own."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def frame_decay(layout: FrameLayout, start: float) -> Tensor:
    """fp32 [T]: on content linspace(start, 1) over the frames of its document (one frame: start), 1 elsewhere."""
    frame_T = layout.frame_index
    token_T = torch.arange(layout.num_tokens, dtype=torch.int32, device=frame_T.device)
    document_T = torch.searchsorted(layout.cu_seqlens[1:], token_T, right=True)
    last_B = torch.zeros_like(layout.cu_seqlens[1:]).scatter_reduce(0, document_T, frame_T, "amax")
    step_T = frame_T / last_B[document_T].clamp_min(1)
    return torch.where(frame_T >= 0, start + (1 - start) * step_T, 1.0)
