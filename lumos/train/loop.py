"""A training run from a TrainConfig to a log and a checkpoint: build, resume, steps, checkpoints, export."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from tqdm import tqdm

from lumos.config import LumosConfig
from lumos.data.packing import Bin
from lumos.model import Lumos
from lumos.options import write_options
from lumos.parallel import Parallel
from lumos.train import resume
from lumos.train.batches import PackedBatches, open_sources
from lumos.train.config import TrainConfig, compute_dtype
from lumos.train.ema import WeightAverage
from lumos.train.export import full_weights, write_weights
from lumos.train.log import LOG_HEADER, RunLog, log_header, open_board, read_log
from lumos.train.lora import add_lora, merged, save_adapter
from lumos.train.nonfinite import StepGuard, explain
from lumos.train.peak import Peak
from lumos.train.schedule import lr_factor, make_schedule
from lumos.train.signals import StoppedError, StopRequest
from lumos.train.state import (
    Checkpoints,
    ModelState,
    OptimizerState,
    PlainState,
    RandomState,
    SaveError,
    checkpoint_step,
    load_checkpoint,
    read_description,
)
from lumos.train.step import StepStats, make_optimizer, training_step


@dataclass(frozen=True)
class TrainSummary:
    """Where a run ended. seconds: wall time of the steps that this call made; losses: of the log's ends."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    log: Path
    checkpoint: Path


def train(config: TrainConfig, progress: bool = True) -> TrainSummary:
    """Trains a model on tokenised samples, or goes on with a run that was stopped or killed.

    Writes out/log.jsonl (one line a step), out/state (checkpoints of the whole state) and out/checkpoint (the weights
    in the official layout). Under torchrun every process calls this.

    Raises ValueError or FileNotFoundError naming what is wrong with an option or a folder (another run in `out` among
    them, unless config.overwrite is set), FloatingPointError naming what is not finite in a step and in which documents
    (unless config.on_nonfinite is "skip"), SaveError where a checkpoint cannot be written, and StoppedError after
    SIGTERM or SIGINT, when the state has been written.
    """
    trainer = Trainer(config, progress)
    summary = trainer.run()
    trainer.parallel.close()
    return summary


class Trainer:
    """One run: built here, continued from where an earlier one stopped, stepped to config.steps, exported.

    step: optimizer steps done. What a run is made of are attributes that may be looked at or replaced before run():
    parallel, model, optimizer, schedule (its step() is called after each step), batches.
    after_step: called with the StepStats after each optimizer step, in order (the average of the weights, say).
    parts: more that a continued run needs, by name (that average); checkpoints keep them with state()'s own.
    """

    def __init__(self, config: TrainConfig, progress: bool = True) -> None:
        if not config.data:
            raise ValueError("data is empty: name at least one folder made by `lumos tokenize`")
        self.config, self.step = config, 0
        self.out = Path(config.out)
        self.parallel = Parallel.start(config.device, config.replicate, config.context)
        self.device = self.parallel.device
        self.progress = progress and self.parallel.is_main
        self.dtype = compute_dtype(config.dtype, self.device)
        torch.manual_seed(config.seed)  # of the weights, the same on every process
        sources = open_sources(config.data)
        self.model = self.parallel.apply(_make_model(config), self.dtype).train()
        self.batches = PackedBatches(
            sources, config, self.model.config.classes, self.parallel.data_rank, self.parallel.data_size
        )
        self.optimizer = make_optimizer(self.model, config.lr, config.weight_decay)
        self.schedule = make_schedule(self.optimizer, config)
        self.guard = StepGuard(config.on_nonfinite == "stop", self.device)
        every = config.log_every if self.device.type == "cuda" else 1  # a CPU has the values at once
        self.log = RunLog(self.model.config, self.parallel, every, frozen=config.lora_rank > 0)
        self.after_step: list[Callable[[StepStats], None]] = []
        self.parts: dict[str, Stateful] = {"log": PlainState(self.log)}
        self.average: WeightAverage | None = None
        if config.ema:
            self.average = WeightAverage(self.model, config.ema)
            self.after_step.append(lambda stats: self.average.update(stats.skipped))
            self.parts["ema"] = self.average
        self._own_start: Path | None = None  # what this run continues, if it is a checkpoint in its own folder
        self._seed_process()

    def state(self) -> dict[str, Stateful]:
        """What a later run needs in order to go on as this one would: an entry a part, under its own name."""
        state = {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.model, self.optimizer),
            "schedule": PlainState(self.schedule),
            "batches": PlainState(self.batches),
            "random": RandomState(self.parallel.rank, self.device),
        }
        return {**state, **self.parts}

    def run(self) -> TrainSummary:
        """Continues or starts, steps to config.steps, and writes the weights in the official layout."""
        with contextlib.ExitStack() as lock:  # the main process holds it while it lasts
            self._resume(self._on_main(lambda: self._choose_start(lock)))
            begin = time.perf_counter()
            with self._open_log() as log, self._open_checkpoints(log) as checkpoints, StopRequest() as stop:
                self._run_steps(checkpoints, stop)
                seconds = time.perf_counter() - begin
                self._save_now(checkpoints)
            self.export()
            self.parallel.barrier()
        losses = [line["loss"] for line in read_log(self.out / resume.LOG) if line["loss"] is not None] or [math.nan]
        return TrainSummary(self.step, losses[0], losses[-1], seconds, self.out / resume.LOG, self.out / resume.WEIGHTS)

    def export(self) -> None:
        """Writes the weights to out/checkpoint as config.export says."""
        config = self.config
        if config.export == "none":
            return
        averaged = self.average is not None and config.export_weights != "last"
        with self.average.in_model() if averaged else contextlib.nullcontext():
            weights = full_weights(self.model)  # may be the parameters themselves: written before they are put back
            if self.parallel.is_main and config.lora_rank:
                save_adapter(self.out / "adapter", weights, config)
                weights = merged(weights, config)
            if self.parallel.is_main:
                write_weights(self.model, self.out / resume.WEIGHTS, weights, config.export, init=config.init)

    def _choose_start(self, lock: contextlib.ExitStack) -> Path | None:
        lock.enter_context(resume.locked(self.out))
        return resume.choose_start(self.config)

    def _resume(self, start: Path | None) -> None:
        if start is not None:
            description = read_description(start)
            differing = resume.check_continues(description, self.config, start)
            if differing:
                warnings.warn(f"{start} is of a run with other options: {'; '.join(differing)}", stacklevel=4)
            state = self.state()
            if [description[name] for name in ("world_size", "device")] != [self.parallel.world_size, self.device.type]:
                del state["random"]  # one for each process that wrote it, and for its device
            self.step = checkpoint_step(start)
            self._own_start = start if start.parent.resolve() == (self.out / resume.STATE).resolve() else None
            options = [{**group, "params": None} for group in self.optimizer.param_groups]
            load_checkpoint(start, state)
            self._keep_options(options)
            if "random" not in state:
                self._seed_process()
        if self.parallel.is_main:
            resume.write_run_options(self.config)

    def _keep_options(self, options: list[dict[str, Any]]) -> None:
        """Rates and decays are the options', not the checkpoint's: a longer run has another schedule."""
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            lr = own["initial_lr"] * lr_factor(self.config, self.step)
            group.update({**own, "params": group["params"], "lr": lr})
        self.schedule.base_lrs = [own["initial_lr"] for own in options]

    def _run_steps(self, checkpoints: Checkpoints, stop: StopRequest) -> None:
        with tqdm(total=self.config.steps, initial=self.step, disable=not self.progress, unit="step") as self._bar:
            while self.step < self.config.steps:
                self._step()
                self._bar.update()
                if self.parallel.any(bool(stop.name) or checkpoints.failed):
                    checkpoints.wait()  # raises on every process what failed on one
                    self._stop(checkpoints)
                if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                    self._save(checkpoints)
            self._logged(self.log.flush())

    def _step(self) -> None:
        """One optimizer step."""
        self.log.begin_step()
        plan = self.batches.next_plan()
        self._check_lengths(plan)
        streams = self.batches.own(plan)
        micro_batches = [self.batches.load(stream) for stream in streams]
        lr = self.optimizer.param_groups[0]["lr"]
        stats = training_step(
            self.model,
            self.optimizer,
            micro_batches,
            self.config.clip,
            self.dtype,
            self.parallel,
            self.config.loss_options(),
            self.guard,
        )
        self.schedule.step()
        for call in self.after_step:
            call(stats)
        self._logged(self.log.end_step(self.step, lr, stats, micro_batches, self.batches.waste, streams))
        self.step += 1

    def _check_lengths(self, plan: list[Bin]) -> None:
        """Names what is too long for the model, on every process; Lumos.forward does not look at a GPU's layouts."""
        limit = self.model.config.max_position_embeddings
        for stream in plan:
            for draw, name in zip(stream.documents, self.batches.names(stream), strict=True):
                if draw.length > limit:
                    raise ValueError(f"{name} has {draw.length} tokens, more than max_position_embeddings {limit}")

    def _logged(self, lines: list[dict[str, Any]]) -> None:
        """Shows new lines of the log. FloatingPointError for a step that was not finite, where that ends a run."""
        for line in lines[-1:]:
            loss = math.nan if line["loss"] is None else line["loss"]
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, {line['tokens_per_s']:,.0f} tokens/s, {line['peak_memory_gb']:.2f} GB"
            )
        bad = self.log.bad
        if bad is not None and self.config.on_nonfinite == "stop":
            batches = [self.batches.load(stream) for stream in bad.batches]
            names = [self.batches.names(stream) for stream in bad.batches]
            options = self.dtype, self.parallel, self.config.loss_options()
            said = explain(self.model, batches, names, *options)
            raise FloatingPointError(
                f"step {bad.number}: {said}. Nothing of it reached the weights; on_nonfinite skip leaves such steps out"
            )

    def _save(self, checkpoints: Checkpoints) -> None:
        self._logged(self.log.flush())  # no checkpoint of steps that are not known to be good
        description = {
            "format": 1,
            "world_size": self.parallel.world_size,
            "device": self.device.type,
            "config": self.config.to_dict(),
            "model": self.model.config.to_dict(),
            "torch": torch.__version__,
        }
        checkpoints.save(self.step, self.state(), description)

    def _save_now(self, checkpoints: Checkpoints) -> Path | None:
        """The complete checkpoint of this step; None where the run keeps none."""
        if not self.config.checkpoint_every:
            return None
        checkpoints.wait()
        if checkpoints.newest is None or checkpoint_step(checkpoints.newest) != self.step:
            self._save(checkpoints)
            checkpoints.wait()
        return checkpoints.newest

    def _stop(self, checkpoints: Checkpoints) -> None:
        self._logged(self.log.flush())
        path = self._save_now(checkpoints)
        anew = self.config.overwrite or self.config.resume != "auto"
        command = "the command with resume auto and without overwrite" if anew else "the same command"
        then = f"{command} goes on from {path}" if path else "nothing was kept: checkpoint_every is 0"
        raise StoppedError(f"stopped after {self.step} of {self.config.steps} steps; {then}", path)

    @contextlib.contextmanager
    def _open_log(self):
        path, board = self.out / resume.LOG if self.parallel.is_main else os.devnull, None
        peak = Peak.of(self.device, self.dtype)
        if self.parallel.is_main:
            write_options(self.out / LOG_HEADER, log_header(self.parallel, peak))
            board = open_board(self.out / "tensorboard", self.step) if self.config.tensorboard else None
        with open(path, "a") as log:
            self.log.open(peak, log, board)
            try:
                yield log
            finally:  # it writes what it was told only now and then
                if board is not None:
                    board.close()

    @contextlib.contextmanager
    def _open_checkpoints(self, log: TextIO):
        checkpoints = Checkpoints(self.out / resume.STATE, self.config.keep_checkpoints, lambda: os.fsync(log.fileno()))
        checkpoints.newest = self._own_start
        try:
            yield checkpoints
        except BaseException:
            with contextlib.suppress(SaveError):  # what ended the run is told, not what came of it
                checkpoints.close()
            raise
        checkpoints.close()

    def _seed_process(self) -> None:
        """A random state of each process's own, for dropout, a function of the seed, the step and the process."""
        sequence = np.random.SeedSequence([self.config.seed, self.step, self.parallel.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _on_main(self, call: Callable[[], Any]) -> Any:
        """What `call` returns on the main process, on all of them; and what it raises."""
        result = [None, None]
        if self.parallel.is_main:
            try:
                result[0] = call()
            except (OSError, ValueError) as error:
                result[1] = error
        if self.parallel.mesh is not None:
            dist.broadcast_object_list(result, src=0, group=self.parallel.host_group)
        if result[1] is not None:
            raise result[1]
        return result[0]


def _make_model(config: TrainConfig) -> Lumos:
    if config.init is None:
        model = Lumos(LumosConfig.preset(config.preset))
    else:
        path, _, subfolder = (config.init, "", "") if Path(config.init).is_dir() else config.init.partition(":")
        model = Lumos.from_pretrained(path, subfolder or None, dtype=torch.float32)
    model.impl = config.impl
    kind = config.activation_checkpointing
    model.checkpoint_layers(int(kind != "none"), selective=kind == "selective")
    return add_lora(model, config) if config.lora_rank else model
