"""The golden files in tests/golden (their README tells where they come from), and models that hold their weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lumos.config import LumosConfig
from lumos.model import Lumos

FOLDER = Path(__file__).parent / "golden"
TRAINING = ("image_single", "video_batch_padded", "video_swin_mp2", "video_tube")
GENERATION = ("generate_i2v", "generate_t2v")


def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of tests/golden/<name>.safetensors."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def build_config(metadata: dict[str, str]) -> LumosConfig:
    return LumosConfig.from_dict({**json.loads(metadata["config"]), "visual_start": int(metadata["visual_start"])})


def build_model(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Lumos:
    """A fp32 model with the stored weights; rows of embed_tokens and lm_head that are not stored keep random values."""
    torch.manual_seed(0)
    model = Lumos(build_config(metadata))
    state = model.state_dict()
    for key, value in tensors.items():
        name = key.removeprefix("weight.")
        if name == key:
            continue
        if name == "embed_rows":
            state["model.embed_tokens.weight"][tensors["embed_rows"].long()] = value
        elif name == "lm_head.visual_rows":
            state["lm_head.weight"][model.config.visual_start :] = value
        else:
            assert state[name].shape == value.shape, name
            state[name].copy_(value)
    return model


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected magnitude."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
