"""What apply_lumos_kernels takes for an official Lumos-1 model: its parts, by name, and the settings the ops compute.

Official code: alibaba-damo-academy/Lumos f7c9cd2.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lumos.head import head_layers, is_packed
from lumos.tokens import VIDEO_END, VIDEO_START
from lumos_kernels.errors import require_rope_head_dim
from lumos_kernels.frame_layout.frames import SPACE_STRIDE, TIME_STRIDE
from lumos_kernels.mm_rope.frequencies import inverse_frequencies
from lumos_kernels.token_ids import FRAME_END, FRAME_START, GRID_UNIT, NUMBER_BASE

CLASSES = "ChameleonXLLMXForConditionalGeneration or ChameleonMMRoPEForConditionalGeneration"
TOKEN_IDS = {
    "image_start_token": FRAME_START,
    "image_end_token": FRAME_END,
    "video_start_token": VIDEO_START,
    "video_end_token": VIDEO_END,
}
PARTS = (
    *("config", "lm_head", "model.embed_tokens", "model.layers", "model.norm", "model.vocabulary_mapping"),
    *("model._update_causal_mask", "model.generate_mm_position_ids", "model.set_3d_global_offset"),
)
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb", "mm_rotary_emb")
TRAINING_PARTS = ("forward_mask", "calculate_closs_ntp_mar", "calculate_frame_wise_closs")
TRAINING_NAMES = (
    "mask_or_random_replace_tokens_video",
    "create_attention_mask_t2v",
    "ChameleonForConditionalGeneration",
)
SETTINGS: dict[str, tuple] = {
    "config.mm_rope": (True,),
    **{f"model.{name}": (value,) for name, value in TOKEN_IDS.items()},
    "model.size_token_zero": (NUMBER_BASE,),
    "model.token_patch_size": (GRID_UNIT * SPACE_STRIDE,),
    "model.t_stride_pos_id": (TIME_STRIDE,),
    **{f"model.{axis}_stride_{of}": (SPACE_STRIDE,) for axis in "hw" for of in ("size", "pos_id")},
    "config.rope_scaling": (None,),
    "config.attention_dropout": (0,),
    "config._attn_implementation": ("eager", "sdpa"),
}


def check_model(model: nn.Module) -> None:
    """Raises TypeError naming the parts that model lacks, ValueError for a setting that the ops do not compute."""
    layers = range(len(_find(model, "model.layers") or ()))
    attention = (f"model.layers.{number}.self_attn.{part}" for number in layers for part in ATTENTION_PARTS)
    missing = [name for name in (*PARTS, *attention) if _find(model, name) is None]
    if trains(model):
        missing += [name for name in TRAINING_PARTS if _find(model, name) is None]
        calls = set(type(model).forward_mask.__code__.co_names) & names_of(model).keys()
        missing += [f"call of {name} in forward_mask" for name in TRAINING_NAMES if name not in calls]
    heads = head_layers(_find(model, "lm_head")) if _find(model, "lm_head") is not None else []
    if not all(isinstance(head, nn.Linear) and head.bias is None for head in heads):
        missing.append("lm_head that is a Linear without bias")
    if missing:
        raise TypeError(f"model must be an official {CLASSES}; {type(model).__name__} has no {', no '.join(missing)}")
    for name, allowed in SETTINGS.items():
        value = _find(model, name)
        if value not in allowed:
            raise ValueError(
                f"{name} must be {' or '.join(map(repr, allowed))}, or the ops do not apply; got {value!r}"
            )
    for layer in model.model.layers:
        _check_rope(layer.self_attn)


def _check_rope(attention: nn.Module) -> None:
    require_rope_head_dim(attention.head_dim)
    frequencies = attention.rotary_emb.inv_freq
    if frequencies.is_meta or not exact_frequencies(attention):
        return
    expected = inverse_frequencies(attention.rope_theta, attention.head_dim, frequencies.device)
    if not torch.allclose(frequencies.float(), expected, rtol=1e-6, atol=0):
        raise ValueError(
            f"rotary_emb.inv_freq of layer {attention.layer_idx} must be rope_theta^(-2i/head_dim) with rope_theta "
            f"{attention.rope_theta}; got {frequencies[:4].tolist()}..."
        )


def exact_frequencies(attention: nn.Module) -> bool:
    """Whether the frequencies are still unrounded: a cast of the whole model rounds them, and upstream's angles."""
    return attention.rotary_emb.inv_freq.dtype in (torch.float32, torch.float64)


def trains(model: nn.Module) -> bool:
    """Whether this is the class with the training step."""
    return hasattr(model, "forward_mask")


def plain_linears(head: nn.Module) -> list[nn.Linear]:
    """Return the layers inside lm_head that multiply by their weight as it is, which quantised ones do not."""
    return [layer for layer in head_layers(head) if type(layer).forward is nn.Linear.forward and not is_packed(layer)]


def names_of(module: nn.Module, method: str = "forward_mask") -> dict[str, Any]:
    """The names that a method of a module's class sees."""
    return getattr(type(module), method).__globals__


def _find(model: nn.Module, name: str) -> Any:
    """The attribute behind a dotted name, None where there is none."""
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return None
