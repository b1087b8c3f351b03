"""apply_lumos_kernels: the ops of lumos_kernels inside one live model of the official Lumos-1 code.

The official modules keep their parameters, names and hooks. Replaced are a few methods, on the instances themselves,
so that another model of the same process stays as it is:

    forward_mask               training: describes the batch by row limits instead of an L x L mask, and asks lm_head
                               for the loss of the target rows instead of logits
    lm_head.forward            lends its weight to that loss, where it is whole (FSDP gathers it there): lumos/head.py
    model._update_causal_mask  sampling: reads the row limits off the mask that the caller built
    model.generate_mm_position_ids   the positions, without a Python loop over tokens
    self_attn.forward          mm_rope and frame_attention, where the layer finds a _Stream in place of its mask

What the ops cannot serve exactly goes the official way, call by call: docs/official-code.md has the list.
Official code: alibaba-damo-academy/Lumos f7c9cd2. Shape suffixes: as in lumos.model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lumos.head import class_loss, lend
from lumos.model import QK_NORM_EPS, cast_once
from lumos.official import TOKEN_IDS, check_model, exact_frequencies, names_of, plain_linears, trains
from lumos.stream import check_impl, choose_impl
from lumos.tokens import IGNORED, VIDEO_END, VIDEO_START
from lumos.wrappers import unwrap
from lumos_kernels import FrameLayout, frame_attention, mm_rope, tube_masked_loss
from lumos_kernels.frame_layout.frames import TIME_STRIDE
from lumos_kernels.layout import RowLimits
from lumos_kernels.token_ids import TEXT_START

logger = logging.getLogger("lumos")

COMPAT = ("official", "fixed")
FOCAL_GAMMA = 2  # upstream knows no other
HIDDEN_SCORE = -65504.0  # added to a score, it hides the key in every dtype that the official code runs in


def apply_lumos_kernels(
    model: nn.Module,
    *,
    rope: bool = True,
    attention: bool = True,
    loss: bool = True,
    impl: str | Mapping[str, str] = "auto",
    compat: str = "official",
) -> Callable[[], None]:
    """Makes one live model of the official code compute with mm_rope, frame_attention and tube_masked_loss.

    Losses, gradients and sampled tokens stay the official ones up to rounding, what is a bug there included;
    parameters, state dict and optimizers see no change. Other models of the process are not touched.

    model: an official ChameleonXLLMXForConditionalGeneration (training) or ChameleonMMRoPEForConditionalGeneration
        (sampling), or either inside FSDP, DDP, torch.compile or peft. It may as well be wrapped afterwards.
    rope, attention, loss: which of the three to replace. loss concerns training only.
    impl: implementation of the ops, one name for all or a mapping by op name ("mm_rope", "frame_attention",
        "tube_masked_loss"). ValueError for a name that does not exist.
    compat: "official": in a batch every sample sees the frames of all samples in its mask, as upstream has it;
        "fixed": its own frames only. They differ where text lengths or frame sizes differ inside a batch.

    Returns a function that restores the official model; further calls of it do nothing. It raises RuntimeError, and
    restores nothing, where a method was replaced once more since. Applying again replaces the options and adds nothing;
    then either function restores.

    Raises TypeError for another model, naming the parts that it lacks; ValueError for an option, or for a
    configuration of the model that the ops do not compute.
    """
    if compat not in COMPAT:
        raise ValueError(f"compat must be one of {', '.join(COMPAT)}, got {compat!r}")
    check_impl(impl)
    model = unwrap(model)
    check_model(model)
    decoder = unwrap(model.model)
    patch = decoder.__dict__.get("_lumos")
    if patch is None:
        patch = _Patch()
        patch.replace(decoder, "_update_causal_mask", _update_causal_mask)
        patch.replace(decoder, "generate_mm_position_ids", _generate_mm_position_ids)
        for layer in decoder.layers:
            patch.replace(unwrap(layer.self_attn), "forward", _attention)
        if trains(model):
            patch.replace(model, "forward_mask", _forward_mask)
            for linear in plain_linears(model.lm_head):
                patch.replace(linear, "forward", _lm_head, shared=False)
    patch.options = SimpleNamespace(rope=rope, attention=attention, loss=loss, impl=impl, compat=compat)
    return patch.undo


@dataclass
class _Patch:
    """One patched model: its options, shared by its modules, and what was replaced. They have it as _lumos."""

    options: SimpleNamespace | None = None
    replaced: list[tuple[nn.Module, str, Callable, Callable | None]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def replace(self, module: nn.Module, name: str, function: Callable, shared: bool = True) -> None:
        """function(module, ...) becomes module.<name>; the official one stays at hand as module._lumos_<name>.

        shared: the module gets this patch too, which knows all others. peft copies lm_head, and must not copy them all.
        """
        self.replaced.append((module, name, function, module.__dict__.get(name)))
        module.__dict__.update({f"_lumos_{name}": getattr(module, name), **({"_lumos": self} if shared else {})})
        module.__dict__[name] = partial(function, module)  # a bound method would be pickled by a name that no class has

    def undo(self) -> None:
        for module, name, function, _ in self.replaced:
            if getattr(module.__dict__.get(name), "func", None) is not function:
                raise RuntimeError(
                    f"{name} of {type(module).__name__} was replaced again after apply_lumos_kernels: undo that first"
                )
        for module, name, _, before in self.replaced:
            for key in (name, f"_lumos_{name}", "_lumos"):
                module.__dict__.pop(key, None)
            if before is not None:
                module.__dict__[name] = before
        self.replaced.clear()

    def tell(self, reason: str) -> None:
        """Says once why something goes the official way."""
        if reason not in self.told:
            self.told.add(reason)
            logger.warning("apply_lumos_kernels: %s, so it goes the official way", reason)


class _Stream:
    """Stands where the official layers expect their mask: what the ops need to know of the batch.

    limits: None where the official mask is to be used; dense is then that mask ([B, 1, Lq, Lk], or None for causal).
    """

    def __init__(self, limits: RowLimits | None = None, dense: Tensor | None = None) -> None:
        self.limits, self.dense = limits, dense
        self._positions: Tensor | None = None

    def positions(self, position_ids: tuple[Tensor, ...] | Tensor, batch: int) -> Tensor:
        """int32 [3, B L], made once for all layers.

        position_ids: the official (text, t, h, w, content) or, for plain RoPE, one tensor; int64 [B or 1, L] each.
        """
        if self._positions is None:
            axes = position_ids
            if isinstance(position_ids, tuple):
                text, *axes, content = position_ids
                axes = torch.where(content.bool(), torch.stack(axes), text)
            self._positions = axes.expand(3, batch, -1).reshape(3, -1).to(torch.int32)
        return self._positions


def _forward_mask(self: nn.Module, input_ids=None, labels=None, training: bool = True, **kwargs) -> tuple[Tensor, dict]:
    """A training step: lists of token ids and labels -> the loss and a dictionary of named (value, weight)."""
    options = self._lumos.options
    if not options.attention and not options.loss:
        return self._lumos_forward_mask(input_ids, labels, training, **kwargs)
    names, cfg, tokens = names_of(self), kwargs["cfg"], kwargs["special_token"]
    length = min(max(map(len, input_ids)), self.config.max_position_embeddings)
    ids, labels, weight, _ = names["mask_or_random_replace_tokens_video"](
        input_ids=_padded(input_ids, length, TEXT_START, self.device),
        labels=_padded(labels, length, IGNORED, self.device),
        mask_id=tokens["mask_token"],
        config=cfg,
        mask_schedule=kwargs["mask_schedule"],
        special_token=tokens,
        is_train=True,
    )
    ends = _frame_ends(self, ids, tokens, shared=options.compat == "official") if options.attention else None
    if ends is not None:
        mask = _Stream(_limits(ends, length))
    else:
        mask = names["create_attention_mask_t2v"](sequence=ids, special_token=tokens, pad_id=0)
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if not options.loss or not _computes_loss(self, cfg, weight):
        logits = names["ChameleonForConditionalGeneration"].forward(self, **call)[0]
        return self.calculate_closs_ntp_mar(logits, labels, **{**kwargs, "mar_loss_weight": weight})

    first = cfg.vis_tok_start
    rows = (labels.flatten() >= first).nonzero().flatten()
    _, stats = class_loss(
        tube_masked_loss,
        self.lm_head,
        cast_once(self.model(**call)[0]),
        labels.flatten(),
        classes=(first, self.config.vocab_size),
        reduction="none",
        rows=rows,
        impl=choose_impl(options.impl, "tube_masked_loss"),
    )
    nll, lse = stats.nll[rows], stats.lse[rows]
    if cfg.train_loss == "Focal":  # upstream drops a slot whose probability is 0 in fp32: its logarithm is infinite
        nll = torch.where(torch.exp(-nll) > 0, (-torch.expm1(-nll)) ** FOCAL_GAMMA * nll, 0)
    extra = {}
    if self.config.z_loss_weight > 0:
        extra["z_loss"] = (lse.square().mean(), self.config.z_loss_weight)
    if cfg.frame_closs_recorder:
        extra = self.calculate_frame_wise_closs(nll, labels, len(labels), tokens, first, cfg.mask_type, extra)
    return nll[nll != 0].mean(), extra  # without exact zeros, as upstream


def _frame_ends(self: nn.Module, ids: Tensor, tokens: Mapping[str, int], shared: bool) -> Tensor | None:
    """int [B, L]: the official mask lets token i of a sample see the tokens before ends[i]. None where it does not.

    shared: the mask of every sample has the frames of all (upstream writes them into one mask that they share).
    """
    layout = _layout(ids) if all(tokens[name] == value for name, value in TOKEN_IDS.items()) else None
    if layout is None or self.config.output_attentions:
        self._lumos.tell("a batch has malformed frames, other token ids or wants attention weights")
        return None
    start, end = ids == VIDEO_START, ids == VIDEO_END
    in_video = (start.cumsum(1) > end.cumsum(1)) | ~(start.any(1) & end.any(1))[:, None]
    if not (in_video | ~layout.content.view_as(ids)).all():
        self._lumos.tell("a sample has frames outside its video, which upstream leaves causal")
        return None
    ends = (layout.limits.kv_end - layout.limits.kv_start).view_as(ids)
    return ends.amax(0, keepdim=True).expand_as(ends) if shared else ends


def _computes_loss(self: nn.Module, cfg: Any, weight: object) -> bool:
    """Whether the official loss of these options is one of rows with a visual label over the visual columns."""
    hidden_ids = self.model.vocabulary_mapping.image_tokens if self.config.mask_image_logits else ()
    computes = (
        cfg.train_with_vis_tok
        and cfg.train_loss in ("CE", "CEChunked", "Focal")
        and not cfg.compute_ntp_loss
        and weight is None
        and max(hidden_ids, default=-1) < cfg.vis_tok_start
    )
    if not computes:
        self._lumos.tell(f"the loss {cfg.train_loss} of these options is not one over the visual columns alone")
    return computes


def _lm_head(self: nn.Linear, hidden: Tensor, use: Callable | None = None) -> Any:
    """Logits, or what `use` makes of the hidden states and the weight (lumos/head.py)."""
    return self._lumos_forward(hidden) if use is None else lend(self.weight, hidden, use)


def _update_causal_mask(
    self: nn.Module, attention_mask, input_tensor: Tensor, cache_position, past_key_values, output_attentions: bool
):
    """The _Stream of a call, or the official mask where its attention goes the official way."""
    if isinstance(attention_mask, _Stream):
        return attention_mask
    official = (attention_mask, input_tensor, cache_position, past_key_values, output_attentions)
    batch, length, _ = input_tensor.shape
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    if output_attentions or _fixed_size(past_key_values):
        self._lumos.tell("a call wants attention weights or has a cache of fixed size")
    elif not self._lumos.options.attention:
        mask = self._lumos__update_causal_mask(*official)
        return _Stream(dense=mask) if self._lumos.options.rope else mask
    elif attention_mask is None:
        ends = torch.arange(past + 1, past + length + 1, device=input_tensor.device)
        return _Stream(_limits(ends.expand(batch, length), past + length))
    elif (ends := _row_ends(attention_mask, length, past + length)) is not None:
        return _Stream(_limits(ends.expand(batch, length), past + length))
    else:
        self._lumos.tell("a mask lets tokens see others than all those up to some later one")
    return self._lumos__update_causal_mask(*official)


def _generate_mm_position_ids(self: nn.Module, video_sequence: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """((t, h, w), content), int64 [B, L] each, counted from the first content token; 0 outside content."""
    layout = _layout(video_sequence) if self._lumos.options.rope else None
    if layout is None:
        return self._lumos_generate_mm_position_ids(video_sequence)
    content_T, time_T = layout.content.to(video_sequence.dtype), TIME_STRIDE * layout.frame_index
    _, row_T, column_T = layout.positions - (layout.positions[0] - time_T)
    axes = (axis_T * content_T for axis_T in (time_T, row_T, column_T))
    return tuple(axis_T.view_as(video_sequence) for axis_T in axes), content_T.view_as(video_sequence)


def _attention(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask=None,
    position_ids=None,
    past_key_value=None,
    cache_position=None,
    **kwargs,
):
    """[B, L, C] -> [B, L, C], no weights, the cache."""
    stream, options = attention_mask, self._lumos.options
    if not isinstance(stream, _Stream):
        return self._lumos_forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            cache_position=cache_position,
            **kwargs,
        )
    batch, length, _ = hidden_states.shape
    hidden_states = cast_once(hidden_states)
    q_THD, k_TKD, v_TKD = (
        project(hidden_states).view(batch * length, -1, self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if options.rope and exact_frequencies(self):
        q_THD, k_TKD = mm_rope(
            q_THD,
            k_TKD,
            stream.positions(position_ids, batch),
            theta=self.rope_theta,
            q_norm=(self.q_norm.weight, self.q_norm.bias),
            k_norm=(self.k_norm.weight, self.k_norm.bias),
            eps=QK_NORM_EPS,
            impl=choose_impl(options.impl, "mm_rope"),
        )
    else:
        q_THD, k_TKD = _official_rope(self, q_THD, k_TKD, v_TKD, position_ids, batch)
    if past_key_value is not None:
        k, v = _heads(k_TKD, batch), _heads(v_TKD, batch)
        k, v = past_key_value.update(k, v, self.layer_idx, {"cache_position": cache_position})
        k_TKD, v_TKD = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    if stream.limits is not None:
        o_THD = frame_attention(
            q_THD,
            k_TKD,
            v_TKD,
            stream.limits,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            impl=choose_impl(options.impl, "frame_attention"),
        )
    else:
        o_THD = _masked_attention(*(_heads(x, batch) for x in (q_THD, k_TKD, v_TKD)), stream.dense)
    return self.o_proj(o_THD.reshape(batch, length, -1)), None, past_key_value


def _official_rope(self: nn.Module, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, position_ids, batch: int):
    """The official norms and rotation, in v's dtype, as upstream's attention then has it."""
    if self._lumos.options.rope:
        self._lumos.tell("rotary_emb.inv_freq was rounded by a cast of the model, and with it upstream's rotation")
    q, k, v = (_heads(x, batch) for x in (self.q_norm(q_THD), self.k_norm(k_TKD), v_TKD))
    embed = self.mm_rotary_emb if isinstance(position_ids, tuple) else self.rotary_emb
    rotated = names_of(self, "mm_rotary_emb")["apply_rotary_pos_emb"](q, k, *embed(v, position_ids))
    return (x.transpose(1, 2).flatten(0, 1).to(v.dtype) for x in rotated)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, L, D] with the official additive mask, None for causal -> [B, L, H, D]."""
    mask = None if mask is None else mask[..., : k.shape[2]].to(q.dtype)
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True).transpose(1, 2)


def _fixed_size(cache: Any) -> bool:
    """Whether a cache, or None, has a limit; transformers 4.44 tells it by the second name, 4.50 by the first."""
    tell = getattr(cache, "get_max_cache_shape", None) or getattr(cache, "get_max_length", lambda: None)
    return tell() not in (None, -1)


def _heads(x_THD: Tensor, batch: int) -> Tensor:
    """[B L, H, D] -> [B, H, L, D], a view."""
    return x_THD.unflatten(0, (batch, -1)).transpose(1, 2)


def _padded(rows: list[list[int]], length: int, fill: int, device: torch.device) -> Tensor:
    """int64 [B, length]: rows cut, or filled up at the end, as upstream does."""
    rows = [[*row[:length], *[fill] * (length - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _layout(ids: Tensor) -> FrameLayout | None:
    """Of token ids [B, L]; None where frames are malformed, of which upstream has its own reading, or an error."""
    try:
        return FrameLayout.from_tokens(ids, check=True)
    except ValueError:
        return None


def _limits(ends: Tensor, keys: int) -> RowLimits:
    """Of a batch whose queries see the keys before ends, int [B, L], of their sample's own `keys` keys."""
    start = (torch.arange(len(ends), device=ends.device) * keys)[:, None].expand_as(ends)
    return RowLimits.from_kv(start.flatten(), (start + ends).flatten(), len(ends) * keys)


def _row_ends(mask: Tensor, queries: int, keys: int) -> Tensor | None:
    """int64 [B, Lq] where an additive mask [B, 1, Lq, Lk] lets query i see the keys before ends[i], never falling.

    None for any other mask. Reads the mask: a host sync, which upstream has in the same place.
    """
    if mask.dim() != 4 or mask.shape[1:3] != (1, queries) or mask.shape[3] < keys or not mask.is_floating_point():
        return None
    mask = mask[:, 0, :, :keys]
    seen = mask == 0
    ends = seen.sum(-1)
    prefix = seen == (torch.arange(keys, device=mask.device) < ends[..., None])
    exact = (prefix & (seen | (mask <= HIDDEN_SCORE))).all() & (ends > 0).all() & (ends.diff() >= 0).all()
    return ends if exact else None
