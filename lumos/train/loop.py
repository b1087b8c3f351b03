"""The training loop: from a TrainConfig to a log and a checkpoint."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lumos.config import LumosConfig
from lumos.data import SampleFolder
from lumos.model import Lumos
from lumos.train.batches import Batches
from lumos.train.config import TrainConfig, compute_dtype
from lumos.train.log import log_line
from lumos.train.step import make_optimizer, training_step


@dataclass(frozen=True)
class TrainSummary:
    """Where a run ended. seconds: wall time of the steps alone."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    log: Path
    checkpoint: Path


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
    dtype = compute_dtype(config.dtype, device)
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
            line = log_line(number, loss, stats, step, lr, time.perf_counter() - start, device)
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


def _make_model(config: TrainConfig) -> Lumos:
    if config.init is None:
        model = Lumos(LumosConfig.preset(config.preset))
    else:
        model = Lumos.from_pretrained(config.init, dtype=torch.float32)
    model.impl = config.impl
    model.checkpoint_layers(int(config.checkpoint_layers))
    return model
