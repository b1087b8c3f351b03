"""Sampling restated without a cache and without batches: every step runs the model on whole documents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lumos.config import LumosConfig
from lumos.model import Lumos
from lumos_kernels import masked_sample
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.masked_sample.philox import exponentials
from lumos_kernels.token_ids import MASK, NEW_LINE

CLASSES = (9216, 9344)


def small_model(seed: int = 1, **changes: object) -> Lumos:
    """Random weights large enough for attention and draws to be far from uniform."""
    sizes = {
        "vocab_size": CLASSES[1],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "visual_start": CLASSES[0],
    }
    torch.manual_seed(seed)
    model = Lumos(LumosConfig(**(sizes | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(50 if "embed_tokens" in name else 7)
    return model


def prompt(text: int = 6, given: int = 0, grid: tuple[int, int] = (4, 4), seed: int = 3) -> Tensor:
    """Text, video start, 2 s, 4 fps and random given frames; without the text part where text is 0."""
    random = torch.Generator().manual_seed(seed)
    head = [0, *torch.randint(1, 4000, (text,), generator=random).tolist(), 8710] if text else []
    ids = [torch.tensor([*head, 9004, 8806, 8808])]
    for _ in range(given):
        frame = frame_skeleton(*grid)
        codes = frame == MASK
        frame[codes] = torch.randint(*CLASSES, (int(codes.sum()),), generator=random)
        ids.append(frame)
    return torch.cat(ids)


@torch.no_grad()
def uncached(
    model: Lumos,
    ids: Tensor,
    grid: tuple[int, int],
    frames: int,
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float = 15.0,
    mask_history_ratio: float = 0.7,
    temperatures: list[list[float]] | None = None,
) -> Tensor:
    """int64 [L], from video start to video end. temperatures: of the noise by frame and step; None is greedy."""
    model.eval()
    begin = int((ids == 9004).nonzero()[0])
    frame = frame_skeleton(*grid)
    codes = (frame == MASK).nonzero()[:, 0]
    content = range(3, len(frame) - 1)
    spacing = len(content) / max(1, round(mask_history_ratio * len(content)))
    again = [content[round(j * spacing)] for j in range(max(1, round(mask_history_ratio * len(content))))]
    clean = history = ids
    for number in range(int((ids == 8197).sum()), frames):
        now, undecided = frame.clone(), codes
        for step in range(steps):
            now[undecided] = MASK
            whole = torch.cat([history, now])
            hidden = [model(whole[None, first:]).hidden_states[0, -len(frame) :] for first in (0, begin)]
            counter = (number * steps + step) * len(frame) + undecided
            keys = torch.stack([torch.full_like(counter, seed), counter], -1)
            token, confidence = masked_sample(
                hidden[0][undecided],
                hidden[1][undecided],
                model.lm_head.weight,
                classes=CLASSES,
                guidance_scale=guidance_scale,
                greedy=temperatures is None,
                row_keys=keys,
            )
            now[undecided] = token
            if step + 1 == steps:
                break
            score = confidence.log()
            if temperatures is not None:
                keys[:, 1] += 2**62
                score = score - temperatures[number][step] * exponentials(keys, 1)[:, 0].log()
            most = math.floor(torch.tensor(len(codes)) * torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5))
            undecided = undecided[score.argsort()[: max(1, min(len(undecided) - 1, most))]].sort().values
        remembered = now.clone()
        remembered[again] = MASK
        clean, history = torch.cat([clean, now]), torch.cat([history, remembered])
    assert (clean[begin:] == NEW_LINE).sum() == frames * grid[0]
    return torch.cat([clean[begin:], torch.tensor([9005])])
