"""Training of Lumos-1 with AR-DF masking: one step, and the loop around it (arXiv 2507.08801, sections 3.3 and 4.1)."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lumos.config import LumosConfig
from lumos.data import SampleFolder, collate, drop_text
from lumos.masking import MASK_KINDS, MaskedBatch, mask_ratio, mask_tokens
from lumos.model import Lumos, LumosOutput
from lumos_kernels import FrameLayout

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


@dataclass(frozen=True)
class MicroBatch:
    """Masked documents of one packed stream with their layout, on the device of the step."""

    masked: MaskedBatch
    layout: FrameLayout

    @property
    def num_targets(self) -> int:
        return self.masked.num_targets

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(self.masked.to(device), self.layout.to(device))


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step measured, on the device: reading a tensor waits for it.

    loss: mean over the step's target slots; frame_losses: [F], nan for a frame without targets; grad_norm: before
    clipping.
    """

    loss: Tensor
    frame_losses: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class TrainSummary:
    """Where a run ended. seconds: wall time of the steps alone."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    log: Path
    checkpoint: Path


class Batches:
    """Endless micro-batches of a dataset: every epoch visits each sample once, in an order of its own.

    Order, text drop and masks of micro-batch i are functions of (seed, i) alone.
    """

    def __init__(self, dataset: Any, config: TrainConfig, classes: tuple[int, int]) -> None:
        if not len(dataset):
            raise ValueError("data holds no samples: tokenise clips into it with `lumos tokenize`")
        self.dataset, self.config, self.classes = dataset, config, classes

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro-batch `index` >= 0, on the CPU."""
        config = self.config
        first = index * config.documents
        places = range(first, first + config.documents)
        random = np.random.default_rng([config.seed, index])
        ids = [self.dataset[self._sample(place)].ids for place in places]
        ids = [drop_text(i) if random.random() < config.text_drop else i for i in ids]
        batch = collate(ids)
        layout = FrameLayout.from_tokens(batch.input_ids, batch.cu_seqlens)
        masked = mask_tokens(
            batch.input_ids,
            layout,
            seeds=random.integers(2**63, size=config.documents).tolist(),
            kind=config.mask_kind,
            schedule=config.mask_schedule,
            min_rate=config.min_mask_rate,
            classes=self.classes,
        )
        return MicroBatch(masked, layout)

    def step(self, number: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `number` >= 0."""
        return [self[number * self.config.accumulate + i] for i in range(self.config.accumulate)]

    def _sample(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.dataset))
        return int(np.random.default_rng([self.config.seed, 1 << 32, epoch]).permutation(len(self.dataset))[offset])


def training_step(
    model: Lumos,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    clip: float,
    dtype: torch.dtype = torch.float32,
) -> StepStats:
    """One optimizer step over micro-batches, without a host sync.

    The gradient is that of the mean over the target slots of all micro-batches, whatever their sizes.
    dtype: bfloat16 runs the forward pass under autocast; the weights keep their dtype.
    """
    device = next(model.parameters()).device
    total = max(sum(batch.num_targets for batch in batches), 1)
    num_frames = max(batch.layout.num_frames for batch in batches)
    optimizer.zero_grad(set_to_none=True)
    loss, sums, counts = 0.0, 0.0, 0.0
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out: LumosOutput = model(
                batch.masked.input_ids, labels=batch.masked.labels, layout=batch.layout, rows=batch.masked.rows
            )
        share = out.loss * (batch.num_targets / total)
        share.backward()
        loss = loss + share.detach()
        more_sums, more_counts = out.frame_sums(num_frames)
        sums, counts = sums + more_sums, counts + more_counts
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return StepStats(loss, (sums / counts).float(), grad_norm)


def make_optimizer(model: Lumos, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices; norms and biases have none."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.dim() < 2 or "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(config: TrainConfig, progress: bool = True) -> TrainSummary:
    """Trains a model on tokenised samples; writes out/log.jsonl (one line a step) and out/checkpoint (official layout).

    Raises ValueError or FileNotFoundError naming what is wrong with an option or a folder, and FloatingPointError where
    the loss stops being finite. An earlier run in the same folder is refused unless config.overwrite is set.
    """
    if not config.data:
        raise ValueError("data is empty: name at least one folder made by `lumos tokenize`")
    torch.manual_seed(config.seed)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    dtype = _dtype(config.dtype, device)
    dataset = torch.utils.data.ConcatDataset([SampleFolder(folder) for folder in config.data])
    model = _make_model(config).to(device).train()
    batches = Batches(dataset, config, model.config.classes)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(config.warmup, 1)))

    out = Path(config.out)
    earlier = [name for name in ("log.jsonl", "checkpoint") if (out / name).exists()]
    if earlier and not config.overwrite:
        raise ValueError(f"out: {out} holds the {' and '.join(earlier)} of an earlier run; choose another or overwrite")
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    losses, begin = [], time.perf_counter()
    with (out / "log.jsonl").open("w") as log, tqdm(total=config.steps, disable=not progress, unit="step") as bar:
        for number in range(config.steps):
            start = time.perf_counter()
            step = batches.step(number)
            lr = optimizer.param_groups[0]["lr"]
            stats = training_step(model, optimizer, step, config.clip, dtype)
            schedule.step()
            loss = float(stats.loss)  # waits for the device, so that the time is the step's
            line = _log_line(number, loss, stats, step, lr, time.perf_counter() - start, device)
            log.write(json.dumps(line) + "\n")
            log.flush()
            losses.append(loss)
            bar.update()
            bar.set_postfix_str(
                f"loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s, {line['peak_memory_gb']:.2f} GB"
            )
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss is {losses[-1]} at step {number}: see {out / 'log.jsonl'}")
    seconds = time.perf_counter() - begin
    model.save_pretrained(out / "checkpoint")
    return TrainSummary(config.steps, losses[0], losses[-1], seconds, out / "log.jsonl", out / "checkpoint")


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a log.jsonl, one dictionary a step."""
    with Path(path).open() as log:
        for line in log:
            yield json.loads(line)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in 10^9 bytes: allocated on a GPU, resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _log_line(
    number: int, loss: float, stats: StepStats, step: list[MicroBatch], lr: float, seconds: float, device: torch.device
) -> dict[str, Any]:
    tokens = sum(batch.num_tokens for batch in step)
    frame_losses = [None if math.isnan(x) else round(x, 5) for x in stats.frame_losses.tolist()]
    return {
        "step": number,
        "loss": round(loss, 6),
        "frame_losses": frame_losses,
        "grad_norm": round(float(stats.grad_norm), 5),
        "lr": lr,
        "tokens": tokens,
        "targets": sum(batch.num_targets for batch in step),
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        "peak_memory_gb": round(peak_memory_gb(device), 3),
    }


def _make_model(config: TrainConfig) -> Lumos:
    if config.init is None:
        model = Lumos(LumosConfig.preset(config.preset))
    else:
        model = Lumos.from_pretrained(config.init, dtype=torch.float32)
    model.impl = config.impl
    model.checkpoint_layers(int(config.checkpoint_layers))
    return model


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
