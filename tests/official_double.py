"""A stand-in of the official Lumos-1 model: its names, signatures and mathematics, in our own words, small and eager.

Written from the description of the official code (alibaba-damo-academy/Lumos f7c9cd2), not from its text. What matters
to apply_lumos_kernels is kept: which method calls which with what, the mask that the samples of a batch share, the
positions made by a loop over tokens, fp32 logits of every token over the full vocabulary, frame losses by equal shares,
exact-zero losses left out. The angles are fp32, as upstream's; everything else can run in fp64.

Unlike upstream's, masks are drawn from each row's own ids where cfg.seeded is set, whatever its neighbours.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SPECIAL = {
    "image_start_token": 8197,
    "image_end_token": 8196,
    "new_line_token": 8803,
    "sep_token": 8710,
    "video_start_token": 9004,
    "video_end_token": 9005,
    "mask_token": 9003,
}
HIDDEN = torch.iinfo(torch.int64).min
VISUAL_START, VOCABULARY = 9216, 9344


def config(**changes) -> SimpleNamespace:
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "model_parallel_size": 1,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "swin_norm": False,
        "mm_rope": True,
        "attention_dropout": 0.0,
        "max_position_embeddings": 4096,
        "mask_image_logits": False,
        "image_tokens": [4, 5],
        "z_loss_weight": 0.0,
        "output_attentions": False,
        "_attn_implementation": "eager",
    }
    return SimpleNamespace(**{**base, **changes})


def training_options(**changes) -> SimpleNamespace:
    """What the official trainer passes as cfg."""
    base = {
        "MaskedAR": True,
        "mask_type": "tube",
        "min_masking_rate": 0.7,
        "train_loss": "CEChunked",
        "train_with_vis_tok": True,
        "vis_tok_start": VISUAL_START,
        "compute_ntp_loss": False,
        "frame_closs_recorder": True,
    }
    return SimpleNamespace(**{**base, **changes})


def in_segment(ids: Tensor) -> Tensor:
    """bool [B, L]: tokens from a frame start to its end; outside whole videos only where a sample has none."""

    def inside(start: int, end: int) -> Tensor:
        starts, ends = ids == start, ids == end
        return (starts.cumsum(1) > ends.cumsum(1)) | starts | ends

    whole = (ids == 9004).any(1, keepdim=True) & (ids == 9005).any(1, keepdim=True)
    return inside(8197, 8196) & (inside(9004, 9005) | ~whole)


def content_of(ids: Tensor) -> Tensor:
    """bool [B, L]: codes and new lines of the frames in segments."""
    start = ids == 8197
    header = start | F.pad(start, (1, 0))[:, :-1] | F.pad(start, (2, 0))[:, :-2]
    return in_segment(ids) & ~header & (ids != 8196) & (ids != 8710)


def mask_or_random_replace_tokens_video(input_ids, labels, mask_id, config, mask_schedule, special_token, is_train):
    """Tube masks: the slots of the first run of content, repeated for as long as there is content."""
    share = mask_schedule(torch.rand(len(labels))).clip(config.min_masking_rate)
    for row, (ids, targets) in enumerate(zip(input_ids, labels, strict=True)):
        slots = content_of(targets[None])[0].nonzero()[:, 0]
        size = 1 + int((slots.diff() == 1).long().cumprod(0).sum())
        seeded = getattr(config, "seeded", False)
        generator = torch.Generator().manual_seed(int(ids.sum())) if seeded else None
        count = 0.7 * size if seeded else share[row] * size
        hidden = (torch.rand(size, generator=generator).argsort() < round(float(count))).repeat(len(slots))[
            : len(slots)
        ]
        ids[slots[hidden]] = mask_id
        targets[slots[~hidden]] = -100
    return input_ids, labels, None, share


def create_attention_mask_t2v(sequence, special_token, pad_id=0, rm_pad_in_image=False, return_inverse_mask=True):
    """fp32 [B, 1, L, L]; one mask for all samples, with the frames of each."""
    segment, frame = in_segment(sequence), (sequence == special_token["image_start_token"]).cumsum(1)
    same = (frame[:, :, None] == frame[:, None]) & segment[:, :, None] & segment[:, None]
    allowed = same.any(0, keepdim=True) | torch.ones_like(same[0]).tril()
    hidden = 1.0 - allowed.expand_as(same).to(sequence.dtype)
    return hidden.masked_fill(hidden.bool(), HIDDEN)[:, None]


def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin

    return rotate(q), rotate(k)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class HeadNorm(nn.Module):
    def __init__(self, head_dim: int, groups: int, heads: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(groups, head_dim)), nn.Parameter(torch.zeros(groups, head_dim))
        self.repeats = heads // groups

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.repeat_interleave(self.repeats, 0) for p in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:]) * weight + bias


class Rotary(nn.Module):
    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("inv_freq", 1.0 / theta**exponents, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].float() * self.inv_freq.float()).repeat(1, 1, 2)
        angles = angles.to(torch.promote_types(x.dtype, torch.float32))
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: SimpleNamespace, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.rope_theta = config, layer_idx, config.rope_theta
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, size // heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = HeadNorm(self.head_dim, config.model_parallel_size, heads)
        self.k_norm = HeadNorm(self.head_dim, config.model_parallel_size, kv_heads)
        self.rotary_emb = Rotary(self.head_dim, config.rope_theta)

    def mm_rotary_emb(self, x: Tensor, position_ids: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        text, t, h, w, content = position_ids
        channel = torch.arange(self.head_dim) % 16
        axis = torch.where(channel < 4, 0, torch.where(channel // 2 % 2 == 0, 1, 2))
        tables = [torch.stack(table) for table in zip(*(self.rotary_emb(x, p) for p in (t, h, w)), strict=True)]
        plain = self.rotary_emb(x, text)
        pick = axis.expand(1, *content.shape, -1)
        return tuple(
            torch.where(content[..., None].bool(), table.gather(0, pick)[0], one)
            for table, one in zip(tables, plain, strict=True)
        )

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
        **kwargs,
    ):
        batch, length, _ = hidden_states.shape
        q, k, v = (
            p(hidden_states).view(batch, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        tables = (self.mm_rotary_emb if isinstance(position_ids, tuple) else self.rotary_emb)(v, position_ids)
        q, k = apply_rotary_pos_emb(q, k, *tables)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx, {"cache_position": cache_position})
        k, v = (x.repeat_interleave(self.num_heads // self.num_key_value_heads, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) / self.head_dim**0.5
        if attention_mask is not None:
            scores = scores + attention_mask[..., : k.shape[2]]
        weights = scores.softmax(-1).to(v.dtype)
        o = (weights @ v).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(o), weights if output_attentions else None, past_key_value


class Layer(nn.Module):
    def __init__(self, config: SimpleNamespace, layer_idx: int) -> None:
        super().__init__()
        self.self_attn, self.swin = Attention(config, layer_idx), config.swin_norm
        size, wide = config.hidden_size, config.intermediate_size
        self.up_proj, self.down_proj = nn.Linear(size, wide, bias=False), nn.Linear(wide, size, bias=False)
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
    ):
        x = hidden_states if self.swin else self.input_layernorm(hidden_states)
        x, weights, cache = self.self_attn(
            hidden_states=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            cache_position=cache_position,
        )
        x = hidden_states + (self.input_layernorm(x) if self.swin else x)
        y = x if self.swin else self.post_attention_layernorm(x)
        y = self.down_proj(F.silu(self.up_proj(y)))
        return x + (self.post_attention_layernorm(y) if self.swin else y), weights, cache


class Decoder(nn.Module):
    image_start_token, image_end_token, size_token_zero, token_patch_size = 8197, 8196, 8804, 32
    video_start_token, video_end_token = 9004, 9005
    h_stride_size = w_stride_size = h_stride_pos_id = w_stride_pos_id = 8
    t_stride_pos_id = 4

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.use_mm_rope, self.checkpointing = config, config.mm_rope, None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vocabulary_mapping = SimpleNamespace(image_tokens=config.image_tokens)

    def generate_mm_position_ids(self, video_sequence: Tensor):
        axes = torch.zeros(3, *video_sequence.shape, dtype=torch.int64)
        content = torch.zeros_like(video_sequence)
        for row, ids in enumerate(video_sequence.tolist()):
            at, frame = 0, 0
            while at < len(ids):
                if ids[at] != self.image_start_token:
                    at += 1
                    continue
                rows, columns = (4 * (ids[at + i] - self.size_token_zero) for i in (1, 2))
                place = slice(at + 3, at + 3 + rows * (columns + 1))
                number = torch.arange(rows * (columns + 1))
                axes[0, row, place] = self.t_stride_pos_id * frame
                axes[1, row, place] = self.h_stride_pos_id * (number // (columns + 1))
                axes[2, row, place] = self.w_stride_pos_id * (number % (columns + 1))
                content[row, place] = 1
                at, frame = place.stop, frame + 1
        return tuple(axes), content

    def set_3d_global_offset(self, position_ids_3d, position_ids, image_content_flag):
        first = [int(row.argmax()) for row in image_content_flag]
        start = torch.stack([position_ids[0, at] for at in first])[:, None]
        offset = torch.where(image_content_flag.bool(), start, position_ids)
        return tuple(axis + offset for axis in position_ids_3d)

    def _update_causal_mask(self, attention_mask, input_tensor, cache_position, past_key_values, output_attentions):
        if attention_mask is not None and attention_mask.dim() == 4:
            if attention_mask.max() != 0:
                raise ValueError("a mask must be additive")
            return attention_mask
        keys = int(cache_position[-1]) + 1
        hidden = torch.arange(keys) > cache_position[:, None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask == 0)[:, None]
        hidden = hidden.expand(len(input_tensor), -1, -1)[:, None]
        return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=False,
        cache_position=None,
    ):
        hidden = self.embed_tokens(input_ids)
        if cache_position is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            cache_position = torch.arange(past, past + input_ids.shape[1])
        if position_ids is None:
            text = cache_position[None]
            axes, content = self.generate_mm_position_ids(video_sequence=input_ids)
            axes = self.set_3d_global_offset(axes, text, content)
            position_ids = (text.expand_as(content), *axes, content)
        mask = self._update_causal_mask(attention_mask, hidden, cache_position, past_key_values, output_attentions)
        rest = (mask, position_ids, past_key_values, output_attentions, use_cache, cache_position)
        all_weights = []
        for layer in self.layers:
            if self.checkpointing is not None and self.training:
                outputs = checkpoint(layer.__call__, hidden, *rest, use_reentrant=self.checkpointing == "reentrant")
            else:
                outputs = layer(hidden, *rest)
            hidden = outputs[0]
            all_weights.append(outputs[1])
        return self.norm(hidden), past_key_values, all_weights


class ChameleonForConditionalGeneration(nn.Module):
    """In the official code a class beside the trained one; its forward is called with the trained model as self."""

    def forward(self, input_ids=None, **kwargs):
        hidden, cache, weights = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.mask_image_logits:
            logits[..., self.model.vocabulary_mapping.image_tokens] = torch.finfo(logits.dtype).min
        return logits, cache, weights


class SamplingModel(ChameleonForConditionalGeneration):
    """The class that the official sampler loads."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.model = config, Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device


class TrainingModel(SamplingModel):
    """The class that the official trainer makes."""

    def forward(self, input_ids=None, labels=None, training=True, **kwargs):
        return self.forward_mask(input_ids, labels, training, **kwargs)

    def forward_mask(self, input_ids=None, labels=None, training=True, **kwargs):
        length = min(max(len(row) for row in input_ids), self.config.max_position_embeddings)
        ids, labels = (
            torch.tensor([(row + [fill] * length)[:length] for row in rows])
            for rows, fill in ((input_ids, 0), (labels, -100))
        )
        tokens = kwargs["special_token"]
        ids, labels, weight, _ = mask_or_random_replace_tokens_video(
            ids, labels, tokens["mask_token"], kwargs["cfg"], kwargs["mask_schedule"], tokens, is_train=True
        )
        mask = create_attention_mask_t2v(sequence=ids, special_token=tokens)
        logits = ChameleonForConditionalGeneration.forward(self, ids, use_cache=False, attention_mask=mask)[0]
        return self.calculate_closs_ntp_mar(logits, labels, **{**kwargs, "mar_loss_weight": weight})

    def calculate_closs_ntp_mar(self, logits, labels, **kwargs):
        cfg, logits, flat, extra = kwargs["cfg"], logits.flatten(0, 1), labels.flatten(), {}
        assert not cfg.compute_ntp_loss, "upstream asserts this too"
        if cfg.train_with_vis_tok:
            target = flat >= cfg.vis_tok_start
            logits, flat = logits[target][:, cfg.vis_tok_start :], flat[target] - cfg.vis_tok_start
        losses = F.cross_entropy(logits, flat, reduction="none")
        if cfg.train_loss == "Focal":
            chance = logits.softmax(-1).gather(1, flat[:, None])[:, 0]
            losses = -((1 - chance) ** 2) * chance.log()
            losses = torch.where(losses.isfinite(), losses, 0)
        if not cfg.train_with_vis_tok:
            losses = losses[content_of(labels).flatten()]
        if self.config.z_loss_weight > 0:
            raise ValueError("upstream's z-loss fails here")
        if cfg.frame_closs_recorder:
            extra = self.calculate_frame_wise_closs(
                losses, labels, len(labels), kwargs["special_token"], cfg.vis_tok_start, cfg.mask_type, extra
            )
        return losses[losses != 0].mean(), extra

    def calculate_frame_wise_closs(
        self, mar_loss, labels, batch_size, special_token, vis_tok_start, mask_type, additional_loss_dict
    ):
        frames = int((labels[0] == special_token["image_start_token"]).sum())
        shares = [row.chunk(frames) for row in mar_loss.split((labels >= vis_tok_start).sum(1).tolist())]
        for number, parts in enumerate(zip(*shares, strict=True)):
            additional_loss_dict[f"tmp_closs_CE_frame{number}"] = (torch.cat(parts).mean(), 0.0)
        return additional_loss_dict


class DynamicCache:
    """Keys and values of every layer, joined anew at each call, as transformers' class of that name."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def get_max_length(self) -> None:
        return None

    def crop(self, length: int) -> None:
        self.layers = {number: (k[:, :, :length], v[:, :, :length]) for number, (k, v) in self.layers.items()}

    def update(self, k: Tensor, v: Tensor, layer: int, _: dict) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v
