"""TrainConfig: everything a training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from lumos.masking import MASK_KINDS, mask_ratio

DTYPES = ("float32", "bfloat16")
TOO_LONG = ("error", "drop")


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
    token_budget: int = _option(0, "tokens of a stream, filled with whole documents of any size; 0: `documents` each")
    documents: int = _option(1, "documents of a stream, where there is no token_budget")
    micro_batches: int = _option(1, "streams of a step, over all processes; the mean runs over all their target slots")
    look_ahead: int = _option(
        256, "documents that wait to be packed: more waste less and leave the drawn order further"
    )
    pad_to_budget: bool = _option(False, "pad every stream to token_budget: steps of one shape")
    too_long: str = _option("error", "documents above token_budget: error, or drop, which counts and names them")
    lr: float = _option(1e-4, "peak learning rate of AdamW")
    warmup: int = _option(10, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "weight decay of AdamW, on matrices only")
    clip: float = _option(4.0, "largest norm of the gradient")
    text_drop: float = _option(0.1, "probability of dropping a document's text, for classifier-free guidance")
    mask_kind: str = _option("tube", "tube, random, DiffForcing or tubeDecay")
    mask_schedule: str = _option("cosine", "cosine, linear, sigmoid or pow<exponent>")
    min_mask_rate: float = _option(0.7, "smallest share of masked slots")
    given_frames: int = _option(
        0, "first latent frames that are shown and not predicted; -1 draws a number for each video"
    )
    given_frames_prob: float = _option(
        1.0, "probability that given_frames applies to a document (1 - text_to_video_prob)"
    )
    z_loss: float | None = _option(None, "weight of the mean of logsumexp^2 (default: the checkpoint's z_loss_weight)")
    focal_gamma: float = _option(0.0, "focal loss: each slot counts (1 - p)^gamma; 0 off, upstream 2")
    decay_start: float | None = _option(None, "weight of the first frame's loss, rising linearly to 1 (CEDecay)")
    dtype: str = _option("auto", "float32, bfloat16 (autocast, fp32 weights), or auto: bfloat16 on GPUs")
    device: str = _option("auto", "cpu, cuda, or auto")
    impl: str = _option("auto", "implementation of the ops")
    seed: int = _option(0, "seed of weights, data order, text drop and masks")
    overwrite: bool = _option(False, "replace the log and the checkpoint of an earlier run in `out`")
    checkpoint_every: int = _option(500, "steps between checkpoints of the whole state, one more at the end; 0: none")
    keep_checkpoints: int = _option(2, "checkpoints of the state that are kept, the newest ones")
    resume: str = _option("auto", "auto: continue the run in `out`; never; or a checkpoint of the state to go on from")
    export: str = _option("float32", "dtype of the weights written to out/checkpoint at the end; none: do not write")
    checkpoint_layers: bool = _option(False, "recompute each layer in backward instead of keeping its activations")

    def __post_init__(self) -> None:
        for name in ("steps", "documents", "micro_batches", "look_ahead", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("text_drop", "min_mask_rate", "given_frames_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.lr <= 0 or self.clip <= 0 or self.weight_decay < 0 or self.warmup < 0:
            raise ValueError(
                f"lr and clip must be > 0, weight_decay and warmup >= 0, got {self.lr}, {self.clip}, "
                f"{self.weight_decay}, {self.warmup}"
            )
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be >= 0, got {self.checkpoint_every}")
        if self.export not in (*DTYPES, "none"):
            raise ValueError(f"export must be none, {' or '.join(DTYPES)}, got {self.export!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.mask_kind not in MASK_KINDS:
            raise ValueError(f"mask_kind must be one of {', '.join(MASK_KINDS)}, got {self.mask_kind!r}")
        mask_ratio(self.mask_schedule, torch.zeros(1))
        self._check_packing()
        self._check_loss()
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no CUDA device")
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype must be auto, {' or '.join(DTYPES)}, got {self.dtype!r}")

    def _check_packing(self) -> None:
        if self.token_budget < 0:
            raise ValueError(f"token_budget must be >= 0, got {self.token_budget}")
        if self.token_budget and self.documents != 1:
            raise ValueError(
                f"token_budget {self.token_budget} and documents {self.documents} exclude each other: a stream holds "
                f"what its budget fits, or a number of documents"
            )
        if self.pad_to_budget and not self.token_budget:
            raise ValueError("pad_to_budget needs a token_budget")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"too_long must be {' or '.join(TOO_LONG)}, got {self.too_long!r}")
        if self.given_frames < -1:
            raise ValueError(f"given_frames must be a number >= 0, or -1 to draw one, got {self.given_frames}")

    def _check_loss(self) -> None:
        if self.z_loss is not None and not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be >= 0, got {self.z_loss}")
        if self.focal_gamma != 0 and not 1 <= self.focal_gamma < math.inf:
            raise ValueError(f"focal_gamma must be 0 or >= 1, got {self.focal_gamma}")
        if self.decay_start is not None and not 0 <= self.decay_start < math.inf:
            raise ValueError(f"decay_start must be >= 0, got {self.decay_start}")

    def loss_options(self) -> dict[str, float | None]:
        """Keywords of Lumos.forward, for training_step's `loss`."""
        return {
            "z_loss_weight": self.z_loss,
            "focal_gamma": self.focal_gamma,
            "decay_start": self.decay_start,
        }


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
