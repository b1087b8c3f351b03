"""TrainConfig: everything a training run is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lumos.masking import MASK_KINDS, mask_ratio

DTYPES = ("float32", "bfloat16")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Options of `lumos train`; each field is a command-line option of the same name."""

    data: tuple[str, ...] = _option((), "folders of tokenised samples (`lumos tokenize`)")
    out: str = _option("run", "folder for the log and the checkpoint")
    preset: str = _option("tiny", "model sizes for training from scratch: tiny, 1B or 3B")
    init: str | None = _option(None, "folder or hub id of a checkpoint to start from, instead of a preset")
    steps: int = _option(1000, "optimizer steps")
    documents: int = _option(1, "documents of a micro-batch, packed into one stream")
    accumulate: int = _option(1, "micro-batches of a step; the mean runs over all their target slots")
    lr: float = _option(1e-4, "peak learning rate of AdamW")
    warmup: int = _option(10, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "weight decay of AdamW, on matrices only")
    clip: float = _option(4.0, "largest norm of the gradient")
    text_drop: float = _option(0.1, "probability of dropping a document's text, for classifier-free guidance")
    mask_kind: str = _option("tube", "tube, random, DiffForcing or tubeDecay")
    mask_schedule: str = _option("cosine", "cosine, linear, sigmoid or pow<exponent>")
    min_mask_rate: float = _option(0.7, "smallest share of masked slots")
    dtype: str = _option("auto", "float32, bfloat16 (autocast, fp32 weights), or auto: bfloat16 on GPUs")
    device: str = _option("auto", "cpu, cuda, or auto")
    impl: str = _option("auto", "implementation of the ops")
    seed: int = _option(0, "seed of weights, data order, text drop and masks")
    overwrite: bool = _option(False, "replace the log and the checkpoint of an earlier run in `out`")
    checkpoint_layers: bool = _option(False, "recompute each layer in backward instead of keeping its activations")

    def __post_init__(self) -> None:
        for name in ("steps", "documents", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_drop", "min_mask_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.lr <= 0 or self.clip <= 0 or self.weight_decay < 0 or self.warmup < 0:
            raise ValueError(
                f"lr and clip must be > 0, weight_decay and warmup >= 0, got {self.lr}, {self.clip}, "
                f"{self.weight_decay}, {self.warmup}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.mask_kind not in MASK_KINDS:
            raise ValueError(f"mask_kind must be one of {', '.join(MASK_KINDS)}, got {self.mask_kind!r}")
        mask_ratio(self.mask_schedule, torch.zeros(1))
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no CUDA device")
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype must be auto, {' or '.join(DTYPES)}, got {self.dtype!r}")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
