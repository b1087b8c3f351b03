"""The rival of lumos.generate_tokens: frame-by-frame sampling the official way, on the weights of a lumos.Lumos.

Written from the description of the official sampler (alibaba-damo-academy/Lumos f7c9cd2), not from its code. What costs
it time and memory is kept: one document at a time; two forwards a step, one a branch; keys and values joined to the
whole cache in every layer of every forward, then cut off again; a dense mask from the whole sequence; fp32 logits of
every token over the full vocabulary, suppressed outside the visual columns, softmax and draw over all of them; the last
frame's keys and values computed though nothing follows. Kinder than upstream: positions are made without host syncs.
Greedy, it gives the tokens of generate_tokens; drawn, the same distribution from torch's random numbers.

Legend: L tokens, n tokens of a forward, S codes of a frame, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.official_style import _mlp, _repeat_kv, _rms_norm, official_mask
from bench.ops.frame_attention import MASKED
from bench.ops.mm_rope import official_layer_norm, official_rotate, official_tables
from lumos import Lumos
from lumos.sampling import forgotten_slots
from lumos.tokens import VIDEO_END, VIDEO_START
from lumos_kernels import FrameLayout
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.token_ids import FRAME_HEADER, FRAME_START, MASK


@torch.no_grad()
def official_style_sample(
    model: Lumos,
    prompt: Tensor,
    grid: tuple[int, int],
    frames: int,
    *,
    steps: int = 50,
    guidance_scale: float = 15.0,
    mask_history_ratio: float = 0.7,
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    cache: bool = True,
    sees: Callable[[int, int], bool] | None = None,
) -> Tensor:
    """One document, int64 [L] from its video start to its video end.

    prompt, grid, frames and the options: as of generate_tokens. guidance_scale: not 1, as upstream.
    cache: keep keys and values; without it every step computes the whole sequence.
    sees: (frame, earlier frame) -> whether the one attends to the other, for windows; all of them where left out.
    """
    if guidance_scale == 1:
        raise ValueError("guidance_scale must differ from 1: the official sampler has no single branch")
    model.eval()
    device = model.lm_head.weight.device
    skeleton = frame_skeleton(*grid).to(device)
    codes, length = skeleton == MASK, len(skeleton)
    forgotten = FRAME_HEADER + forgotten_slots(mask_history_ratio, grid[0] * (grid[1] + 1)).to(device)
    prompt = prompt.to(device)
    begin = int((prompt == VIDEO_START).nonzero()[0, 0])
    given = int((prompt == FRAME_START).sum())
    history = clean = prompt
    branches = [_Branch(model, start, cache, sees) for start in (0, begin)]
    for _ in range(given, frames):
        now = skeleton.clone()
        for step in range(steps):
            sequence = torch.cat([history, now])
            cond, uncond = (branch.logits(sequence, length)[-length:][codes] for branch in branches)
            logits = guidance_scale * (cond - uncond) + uncond
            temperature *= 1.0 - (step + 1) / steps
            now[codes] = _decide(model, logits, now[codes], step, steps, temperature, greedy, generator)
        remembered = now.index_fill(0, forgotten, MASK)
        clean, history = torch.cat([clean, now]), torch.cat([history, remembered])
        for branch in branches:
            branch.remember(history, length)
    return torch.cat([clean[begin:], torch.tensor([VIDEO_END], device=device)])


def _decide(
    model: Lumos,
    logits: Tensor,
    current: Tensor,
    step: int,
    steps: int,
    temperature: float,
    greedy: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """int64 [S]: the frame's codes after the step, those that stay undecided masked. logits: fp32 [S, V]."""
    visual = torch.arange(logits.shape[1], device=logits.device) >= model.config.visual_start
    probabilities = torch.where(visual, logits, -math.inf).softmax(-1)
    drawn = probabilities.argmax(-1) if greedy else torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    undecided = current == MASK
    tokens = torch.where(undecided, drawn, current)
    if step == steps - 1:
        return tokens
    confidence = probabilities.gather(1, tokens[:, None])[:, 0]
    confidence = torch.where(undecided, confidence, torch.finfo(confidence.dtype).max)
    most = (len(tokens) * torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)).floor()
    kept = max(1, min(int(undecided.sum()) - 1, int(most)))
    score = confidence.clamp_min(1e-20).log()
    if not greedy:
        uniform = torch.rand(score.shape, generator=generator, device=score.device)
        score = score - temperature * (-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    return torch.where(score < score.sort().values[kept], MASK, tokens)


class _Branch:
    """A sequence from `start` of the document on, with or without a cache of its own."""

    def __init__(self, model: Lumos, start: int, cache: bool, sees: Callable[[int, int], bool] | None) -> None:
        self.model, self.start, self.sees = model, start, sees
        self.cache: list[tuple[Tensor, Tensor] | None] | None = None
        if cache:
            self.cache = [None] * model.config.num_hidden_layers

    def logits(self, sequence: Tensor, length: int) -> Tensor:
        """fp32 [n, V] of the tokens that had to be computed. The cache forgets the last `length` of them."""
        logits = self._forward(sequence[self.start :])
        if self.cache is not None:
            keep = len(sequence) - self.start - length
            self.cache = [(k[:, :, :keep], v[:, :, :keep]) for k, v in self.cache]
        return logits

    def remember(self, sequence: Tensor, length: int) -> None:
        """Extends the cache by the last frame."""
        if self.cache is not None:
            self._forward(sequence[self.start :])

    def _forward(self, ids: Tensor) -> Tensor:
        past = self.cache[0][0].shape[2] if self.cache is not None and self.cache[0] is not None else 0
        layout = FrameLayout.from_tokens(ids[None])
        mask = self._mask(ids)[:, :, past:]
        hidden = self.model.model.embed_tokens(ids[None, past:])
        for number, layer in enumerate(self.model.model.layers):
            hidden = self._layer(number, layer, hidden, mask, layout, past)
        return self.model.lm_head(_rms_norm(self.model.model.norm, hidden)).float()[0]

    def _mask(self, ids: Tensor) -> Tensor:
        mask = official_mask(ids[None])
        if self.sees is not None:
            frame = (ids == FRAME_START).cumsum(0) - 1
            for query in range(int(frame[-1]) + 1):
                for key in (key for key in range(query) if not self.sees(query, key)):
                    mask[0, 0] = torch.where((frame == query)[:, None] & (frame == key), MASKED, mask[0, 0])
        return mask

    def _layer(
        self, number: int, layer: nn.Module, hidden: Tensor, mask: Tensor, layout: FrameLayout, past: int
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self._attention(number, layer.self_attn, x, mask, layout, past)

        if self.model.config.swin_norm:
            hidden = hidden + _rms_norm(layer.input_layernorm, attend(hidden))
            return hidden + _rms_norm(layer.post_attention_layernorm, _mlp(layer.mlp, hidden))
        hidden = hidden + attend(_rms_norm(layer.input_layernorm, hidden))
        return hidden + _mlp(layer.mlp, _rms_norm(layer.post_attention_layernorm, hidden))

    def _attention(
        self, number: int, attention: nn.Module, x: Tensor, mask: Tensor, layout: FrameLayout, past: int
    ) -> Tensor:
        """x: [1, n, C] -> [1, n, C]."""
        config = self.model.config
        q, k, v = (
            proj(x).unflatten(-1, (-1, config.head_dim))
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q = official_layer_norm(q, (attention.q_norm.weight, attention.q_norm.bias))
        k = official_layer_norm(k, (attention.k_norm.weight, attention.k_norm.bias))
        positions, content = layout.positions[:, past:], layout.content[past:]
        cos, sin = official_tables(positions, content, config.rope_theta, config.head_dim, x.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = official_rotate(q, cos, sin), official_rotate(k, cos, sin)
        if self.cache is not None:
            if self.cache[number] is not None:
                k, v = (torch.cat([old, new], 2) for old, new in zip(self.cache[number], (k, v), strict=True))
            self.cache[number] = k, v
        k, v = (_repeat_kv(t, config.num_attention_heads // config.num_key_value_heads) for t in (k, v))
        o = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask=mask.to(q.dtype))
        return attention.o_proj(o.transpose(1, 2).flatten(2))
