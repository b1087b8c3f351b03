"""From a run's checkpoint to the official layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lumos.checkpoint import save_pretrained
from lumos.config import LumosConfig
from lumos.model import Lumos
from lumos.train.config import TrainConfig
from lumos.train.lora import adapted_shapes, adapters, merged
from lumos.train.state import find_checkpoint, load_checkpoint, read_description

# Options of the run that say what its checkpoints hold.
_CONTENT = ("init", "ema", "export_weights", "lora_rank", "lora_alpha", "lora_targets")
# What Hugging Face tokenizers and image processors keep beside the weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def export(checkpoint: str | Path, out: str | Path, dtype: str = "float32") -> Path:
    """Writes the weights of a checkpoint of a run's state to a folder that Lumos.from_pretrained reads; returns it.

    The average of the weights where the run kept one (unless its export_weights is "last"); adapters are merged.

    checkpoint: one of a run's state, from any number of processes, or the run's folder, for its newest.
    out: folder of the official layout. dtype: of the weights, float32 or bfloat16.
    Holds the weights once in fp32 and once in dtype. Raises FileNotFoundError or ValueError naming what is wrong.
    """
    path = find_checkpoint(checkpoint)
    description = read_description(path)
    with torch.device("meta"):
        model = Lumos(LumosConfig.from_dict(description["model"]))
    told = {name: value for name, value in description["config"].items() if name in _CONTENT}
    config = TrainConfig.from_dict(told, str(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.lora_rank:
        shapes = adapted_shapes(shapes, config)
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    load_checkpoint(path, {"model": weights})
    if config.ema and config.export_weights != "last":
        load_checkpoint(path, {"ema": adapters(weights) if config.lora_rank else weights})
    write_weights(model, out, merged(weights, config) if config.lora_rank else weights, dtype, config.init)
    return Path(out)


def write_weights(
    model: Lumos, out: str | Path, weights: dict[str, Tensor], dtype: str, init: str | None = None
) -> None:
    """Writes weights in the official layout, with the tokenizer files of the checkpoint `init` they began from."""
    save_pretrained(model, out, state_dict={name: w.to(getattr(torch, dtype)) for name, w in weights.items()})
    for name in TOKENIZER_FILES if init is not None and Path(init).is_dir() else ():
        if (Path(init) / name).is_file() and Path(init).resolve() != Path(out).resolve():
            shutil.copyfile(Path(init) / name, Path(out) / name)


def full_weights(model: nn.Module) -> dict[str, Any]:
    """The weights on the CPU, put together on the main process from the shards of all, which call this together."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
