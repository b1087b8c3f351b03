"""A training run from a TrainConfig to a log and a checkpoint: build, resume, steps, export."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.stateful import Stateful
from tqdm import tqdm

from lumos.config import LumosConfig
from lumos.model import Lumos
from lumos.options import write_options
from lumos.train.batches import MicroBatch, PackedBatches, open_sources
from lumos.train.config import TrainConfig, compute_dtype
from lumos.train.log import log_line
from lumos.train.schedule import make_schedule
from lumos.train.step import StepStats, make_optimizer, training_step


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
    return Trainer(config, progress).run()


class Trainer:
    """One run: everything is built here, continued from where an earlier run stopped, and stepped to config.steps.

    step: optimizer steps done. What a run is made of are attributes that may be looked at or replaced before run():
    model, optimizer, schedule (its step() is called after each step), batches.
    after_step: called with the StepStats after each optimizer step, in order (an EMA of the weights, say).
    """

    def __init__(self, config: TrainConfig, progress: bool = True) -> None:
        if not config.data:
            raise ValueError("data is empty: name at least one folder made by `lumos tokenize`")
        self.config, self.progress, self.step = config, progress, 0
        self.out = Path(config.out)
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        self.dtype = compute_dtype(config.dtype, self.device)
        torch.manual_seed(config.seed)
        sources = open_sources(config.data)
        self.model = _make_model(config).to(self.device).train()
        self.batches = PackedBatches(sources, config, self.model.config.classes)
        self.optimizer = make_optimizer(self.model, config.lr, config.weight_decay)
        self.schedule = make_schedule(self.optimizer, config)
        self.after_step: list[Callable[[StepStats], None]] = []

    def state(self) -> dict[str, Stateful]:
        """What a later run needs in order to go on as this one would: an entry a part, under its own name."""
        return {"schedule": self.schedule}

    def run(self) -> TrainSummary:
        """Steps to config.steps, then writes the weights in the official layout."""
        self._begin()
        losses, begin = [], time.perf_counter()
        with (
            (self.out / "log.jsonl").open("w") as log,
            tqdm(total=self.config.steps, disable=not self.progress, unit="step") as bar,
        ):
            while self.step < self.config.steps:
                line = self._step()
                log.write(json.dumps(line) + "\n")
                log.flush()
                losses.append(line["loss"])
                bar.update()
                bar.set_postfix_str(
                    f"loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s, {line['peak_memory_gb']:.2f} GB"
                )
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"loss is {losses[-1]} at step {line['step']}: see {self.out / 'log.jsonl'}"
                    )
        seconds = time.perf_counter() - begin
        self.model.save_pretrained(self.out / "checkpoint")
        return TrainSummary(self.step, losses[0], losses[-1], seconds, self.out / "log.jsonl", self.out / "checkpoint")

    def _begin(self) -> None:
        earlier = [name for name in ("log.jsonl", "checkpoint") if (self.out / name).exists()]
        if earlier and not self.config.overwrite:
            raise ValueError(
                f"out: {self.out} holds the {' and '.join(earlier)} of an earlier run; choose another or overwrite"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        for name in ("train.json", "train.yaml"):
            write_options(self.out / name, self.config.to_dict())

    def _step(self) -> dict:
        """One optimizer step; returns its line of the log."""
        start = time.perf_counter()
        number, micro_batches = self.step, self._next_batches()
        lr = self.optimizer.param_groups[0]["lr"]
        stats = training_step(
            self.model, self.optimizer, micro_batches, self.config.clip, self.dtype, loss=self.config.loss_options()
        )
        self.schedule.step()
        for call in self.after_step:
            call(stats)
        self.step += 1
        loss = float(stats.loss)  # waits for the device, so that the time is the step's
        return log_line(number, loss, stats, micro_batches, lr, time.perf_counter() - start, self.device)

    def _next_batches(self) -> list[MicroBatch]:
        return [self.batches.load(stream) for stream in self.batches.next_plan()]


def _make_model(config: TrainConfig) -> Lumos:
    if config.init is None:
        model = Lumos(LumosConfig.preset(config.preset))
    else:
        model = Lumos.from_pretrained(config.init, dtype=torch.float32)
    model.impl = config.impl
    kind = config.activation_checkpointing
    model.checkpoint_layers(int(kind != "none"), selective=kind == "selective")
    return model
