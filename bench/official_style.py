"""The whole-model rival: a training step computed the official way, on the weights of a lumos.Lumos.

Written from the description of the official model (alibaba-damo-academy/Lumos f7c9cd2), not from its code. What costs
it time and memory is kept: a dense fp32 mask [B, 1, L, L] made through int64 and cast in every layer, cos/sin tables
rebuilt in every layer and rounded to the activation dtype, keys and values repeated for the query heads, SDPA with an
explicit mask, fp32 logits of every token over the full vocabulary. Three things are kinder to it than upstream: the
positions are made once, without host syncs; every document keeps its own mask (upstream gives a batch the union of
all); exact-zero losses stay in the mean. In fp32 the loss is therefore that of model(...) up to rounding.

Legend: B documents, L tokens of a row, C hidden, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.ops.frame_attention import MASKED
from bench.ops.mm_rope import official_layer_norm, official_rotate, official_tables
from lumos import Lumos
from lumos.config import LumosConfig
from lumos_kernels import FrameLayout
from lumos_kernels.token_ids import FRAME_END, FRAME_START


def official_style_loss(model: Lumos, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the target slots: fp32 scalar (fp64 for an fp64 model) with its autograd graph.

    input_ids, labels: int64 [B, L], as of Lumos.forward. Raises ValueError for a config with dropout or z-loss:
    dropout would differ between two runs, and upstream's z-loss crashes.
    """
    config = model.config
    if config.dropout or config.z_loss_weight:
        raise ValueError(
            f"dropout and z_loss_weight must be 0 to compare, got {config.dropout} and {config.z_loss_weight}"
        )
    layout = FrameLayout.from_tokens(input_ids)
    mask = official_mask(input_ids)
    hidden = model.model.embed_tokens(input_ids)
    for layer in model.model.layers:
        hidden = _layer(layer, hidden, mask, layout, config)
    return _loss(model, _rms_norm(model.model.norm, hidden), labels)


def official_mask(input_ids: Tensor) -> Tensor:
    """fp32 [B, 1, L, L]: 0 where a token may attend, else -9.22e18. Causal, and full inside every frame."""
    length = input_ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    allowed = allowed.expand(len(input_ids), -1, -1).clone()
    for row, ids in enumerate(input_ids):
        starts, ends = ((ids == token).nonzero()[:, 0].tolist() for token in (FRAME_START, FRAME_END))
        for start, end in zip(starts, ends, strict=True):
            allowed[row, start : end + 1, start : end + 1] = True
    return ((1.0 - allowed.long()) * MASKED)[:, None]


def _layer(layer: nn.Module, hidden: Tensor, mask: Tensor, layout: FrameLayout, config: LumosConfig) -> Tensor:
    if config.swin_norm:
        hidden = hidden + _rms_norm(layer.input_layernorm, _attention(layer.self_attn, hidden, mask, layout, config))
        return hidden + _rms_norm(layer.post_attention_layernorm, _mlp(layer.mlp, hidden))
    hidden = hidden + _attention(layer.self_attn, _rms_norm(layer.input_layernorm, hidden), mask, layout, config)
    return hidden + _mlp(layer.mlp, _rms_norm(layer.post_attention_layernorm, hidden))


def _attention(attention: nn.Module, x: Tensor, mask: Tensor, layout: FrameLayout, config: LumosConfig) -> Tensor:
    """x: [B, L, C] -> [B, L, C]."""
    batch, length, _ = x.shape
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = attention.q_proj(x).view(batch, length, heads, head_dim)
    k = attention.k_proj(x).view(batch, length, kv_heads, head_dim)
    v = attention.v_proj(x).view(batch, length, kv_heads, head_dim)
    q = official_layer_norm(q, (attention.q_norm.weight, attention.q_norm.bias))
    k = official_layer_norm(k, (attention.k_norm.weight, attention.k_norm.bias))
    tables = official_tables(layout.positions, layout.content, config.rope_theta, head_dim, x.dtype)
    cos, sin = (table.view(batch, 1, length, head_dim) for table in tables)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = official_rotate(q, cos, sin), official_rotate(k, cos, sin)
    k, v = (_repeat_kv(t, heads // kv_heads) for t in (k, v))
    o = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask=mask.to(q.dtype))
    return attention.o_proj(o.transpose(1, 2).reshape(batch, length, heads * head_dim))


def _repeat_kv(x: Tensor, times: int) -> Tensor:
    """[B, Hkv, L, D] -> [B, Hkv * times, L, D], materialised."""
    batch, kv_heads, length, head_dim = x.shape
    return x[:, :, None].expand(-1, -1, times, -1, -1).reshape(batch, kv_heads * times, length, head_dim)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Statistics in fp32, rounded to x's dtype, then times the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def _loss(model: Lumos, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = model.lm_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [B, L, V]: the largest tensor of the step
    first, last = model.config.classes
    targets = (labels >= first) & (labels < last)
    return F.cross_entropy(logits[targets][:, first:last], labels[targets] - first)
