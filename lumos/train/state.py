"""Checkpoints of a run's whole state: written in the background, complete or absent, read by any number of processes.

A checkpoint is a folder step-<number> of torch.distributed.checkpoint: each process writes the shards it holds, and
<number> steps were done. run.json in it tells what run it belongs to. It is written under another name beside, every
file and folder is synced, and then it is renamed: whatever bears its name is complete, whenever the run was killed.
All processes must see the same folder. Reading one unpickles Python objects: read only what you trust.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import WriteResult

from lumos.disk import sync, sync_path

DESCRIPTION = "run.json"
_NAME = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"\.step-\d+\.(partial|old)")


class SaveError(OSError):
    """A checkpoint that could not be written; the message names it and why. Earlier checkpoints are untouched."""


class ResumeError(ValueError):
    """A checkpoint that cannot be continued from; the message names it and what does not fit."""


class ModelState(Stateful):
    """The parameters and buffers of a model, sharded (FSDP2) or not, under their names in the unsharded model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state)


class OptimizerState(Stateful):
    """The state of an optimizer under the names of the parameters, sharded as they are."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state)


class PlainState(Stateful):
    """Wraps a part whose state_dict() is plain data that JSON can hold: it is kept as one string.

    torch.distributed.checkpoint would otherwise demand that lists have the same length when they are read.
    """

    def __init__(self, part: Any) -> None:
        self.part = part

    def state_dict(self) -> dict[str, Any]:
        return {"json": json.dumps(self.part.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.part.load_state_dict(json.loads(state["json"]))


class RandomState(Stateful):
    """torch's random states of every process (dropout draws from them; data and masks have seeds of their own)."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.device = str(rank), device

    def state_dict(self) -> dict[str, Any]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {self.rank: states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = state[self.rank]
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    keep: how many complete ones stay; never less than one.
    before_complete: called in the background before a checkpoint becomes complete (syncing the log, whose lines must
        not be younger than a checkpoint that survives a power cut).
    newest: the last one known to be complete.
    With torch.distributed initialised, every process makes one and calls the same methods in the same order.
    """

    def __init__(self, folder: str | Path, keep: int = 2, before_complete: Callable[[], None] | None = None) -> None:
        self.folder, self.keep, self.before_complete = Path(folder), keep, before_complete
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        self._pending: tuple[Path, Future] | None = None
        self.newest: Path | None = None

    def save(self, step: int, state: Mapping[str, Stateful], description: Mapping[str, Any]) -> None:
        """Starts writing the checkpoint of `step`; returns when the state is copied to host memory.

        description: JSON-able, kept in run.json. Waits for the checkpoint before it, and raises its SaveError.
        """
        self.wait()
        writer = _Writer(self, step, dict(description, step=step))
        if self._group is None:
            _silence_single_process_warning()
        future = dcp.async_save(
            dict(state),
            storage_writer=writer,
            async_stager=self._stager,
            process_group=self._group,
            no_dist=self._group is None,
        )
        self._pending = (writer.final, future)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._pending is not None and not self._pending[1].done()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was being written has failed; wait() raises why."""
        return self._pending is not None and not self.writing and self._pending[1].exception() is not None

    def wait(self) -> None:
        """Waits until nothing is being written. SaveError, on every process, if the checkpoint failed on one."""
        if self._pending is None:
            return
        (path, future), self._pending = self._pending, None
        try:
            future.result()
            self.newest = path
        except (CheckpointException, OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(_partial(path))
            left = newest_checkpoint(self.folder)
            raise SaveError(
                f"checkpoint {path} could not be written: {_cause(error)}; "
                + (f"{left} is complete" if left else "there is no earlier one")
            ) from error

    def close(self) -> None:
        """Waits as wait() does and gives the host memory back."""
        try:
            self.wait()
        finally:
            self._stager.close()


class _Writer(dcp.FileSystemWriter):
    """Writes a checkpoint beside its place; when every process has written, the first one moves it there."""

    def __init__(self, checkpoints: Checkpoints, step: int, description: dict[str, Any]) -> None:
        self.final = checkpoints.folder / f"step-{step:08d}"
        super().__init__(_partial(self.final), sync_files=True)
        self.checkpoints, self.description = checkpoints, description

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.path.mkdir(parents=True, exist_ok=True)  # a process that cannot is known before anything is written
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # On the first process, before any process writes: what a killed run left goes, half of this step's too.
        _remove_leftovers(self.final.parent)
        self.path.mkdir()
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        with open(self.path / DESCRIPTION, "w") as file:
            json.dump(self.description, file, indent=2)
            sync(file)
        sync_path(self.path)
        if self.checkpoints.before_complete is not None:
            self.checkpoints.before_complete()
        os.rename(self.path, self.final)
        sync_path(self.final.parent)
        for path in complete_checkpoints(self.final.parent)[: -self.checkpoints.keep]:
            remove_checkpoint(path)


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first; none where there is no such folder."""
    if not Path(folder).is_dir():
        return []
    found = [path for path in Path(folder).iterdir() if _NAME.fullmatch(path.name) and (path / DESCRIPTION).is_file()]
    return sorted(found, key=checkpoint_step)


def newest_checkpoint(folder: str | Path) -> Path | None:
    return next(reversed(complete_checkpoints(folder)), None)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of a run's folder. FileNotFoundError where none is."""
    path = Path(path)
    if (path / DESCRIPTION).is_file():
        return path
    found = newest_checkpoint(path) or newest_checkpoint(path / "state")
    if found is None:
        raise FileNotFoundError(f"{path} is no complete checkpoint of a run's state, nor a folder that holds one")
    return found


def checkpoint_step(path: Path) -> int:
    """The number of steps done when a checkpoint was taken; of one that was renamed, from its description."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else int(read_description(path)["step"])


def read_description(path: str | Path) -> dict[str, Any]:
    """What run.json says. ResumeError naming the file where it is damaged."""
    try:
        return json.loads((Path(path) / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(f"{Path(path) / DESCRIPTION} cannot be read: {error}") from error


def load_checkpoint(path: str | Path, state: Mapping[str, Stateful]) -> None:
    """Reads a checkpoint into the parts of a run, whatever number of processes wrote it. ResumeError by name."""
    try:
        with warnings.catch_warnings():
            _silence_single_process_warning()
            dcp.load(dict(state), checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise ResumeError(f"checkpoint {path} cannot be continued from: {_cause(error)}") from error


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; killed half-way, it leaves nothing that bears a checkpoint's name."""
    old = path.with_name(f".{path.name}.old")
    os.rename(path, old)
    shutil.rmtree(old)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def _cause(error: BaseException) -> str:
    """The first failure of a process, in words."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"{type(cause).__name__} on process {rank}: {cause}"
    return f"{type(error).__name__}: {error}"


def _silence_single_process_warning() -> None:
    """torch says at every save and load that there is one process; that is how it was asked for."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
