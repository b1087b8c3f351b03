"""LoRA (arXiv 2106.09685) through peft: small trained matrices beside frozen weights, merged for sampling.

A run adapts linear layers of the blocks. A model that peft itself has adapted may have adapters on lm_head and
embed_tokens too (lumos/head.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from lumos.model import Lumos
    from lumos.train.config import TrainConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BASE, _A, _B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(model: Lumos, config: TrainConfig) -> Lumos:
    """Puts adapters of config.lora_rank beside the layers named config.lora_targets; all else is frozen. In place.

    The adapters add nothing until they are trained. Raises ValueError where peft is not installed.
    """
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(_peft_config(config), model)


def require_peft() -> None:
    """ValueError where peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank needs peft: pip install 'lumos-kernels[lora]'")


def merged(state: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """The weights of a model with adapters as those of one without: weight + alpha / rank * B A. Official names."""
    scale = config.lora_alpha / config.lora_rank
    weights = {}
    for name, tensor in state.items():
        if name.endswith(_BASE):
            layer = name.removesuffix(_BASE)
            change = state[layer + _B].float() @ state[layer + _A].float()
            weights[layer + ".weight"] = (tensor.float() + scale * change).to(tensor.dtype)
        elif not name.endswith((_A, _B)):
            weights[name] = tensor
    return weights


def adapted_shapes(shapes: Mapping[str, tuple[int, ...]], config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a model with adapters, from those of one without."""
    found = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in config.lora_targets:
            rank = config.lora_rank
            found |= {layer + _BASE: shape, layer + _A: (rank, shape[1]), layer + _B: (shape[0], rank)}
        else:
            found[name] = shape
    return found


def adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained part of the weights of a model with adapters."""
    return {name: tensor for name, tensor in state.items() if name.endswith((_A, _B))}


def save_adapter(folder: str | Path, state: Mapping[str, Tensor], config: TrainConfig) -> None:
    """Writes the adapters of a state alone in peft's layout: PeftModel.from_pretrained(Lumos, folder) reads it.

    adapter_config.json and adapter_model.safetensors; base_model_name_or_path is config.init.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous()
        for name, tensor in adapters(state).items()
    }
    _peft_config(config).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(config: TrainConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_targets),
        base_model_name_or_path=config.init,
    )
