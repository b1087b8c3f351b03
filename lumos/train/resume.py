"""Where a run starts: anew, or where an earlier one in the same folder stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lumos.data.sources import DataSource, trains_alike
from lumos.disk import sync, try_lock
from lumos.options import from_options, read_options, to_options, write_options
from lumos.train.config import TrainConfig
from lumos.train.state import (
    ResumeError,
    checkpoint_step,
    complete_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    remove_checkpoint,
)

STATE = "state"
OPTIONS = "train.json"
LOG = "log.jsonl"
WEIGHTS = "checkpoint"
LOCK = ".lock"
# Options that change where a run ends, what it writes or where it computes, but not what a step computes beyond
# rounding: they may differ between a run and its continuation.
_WRITING = ("out", "overwrite", "checkpoint_every", "keep_checkpoints", "resume", "export", "export_weights")
_WATCHING = ("log_every", "tensorboard", "on_nonfinite")
_COMPUTING = ("device", "impl", "activation_checkpointing", "replicate", "context")
FREE_OPTIONS = frozenset(("steps", *_WRITING, *_WATCHING, *_COMPUTING))


@contextlib.contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """While a run writes to its folder, no other does: ValueError where one does. The end of its process lets go."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with (Path(out) / LOCK).open("w") as file:
        if not try_lock(file):
            raise ValueError(f"out: another process is training in {out}; wait for its end or choose another")
        yield


def choose_start(config: TrainConfig) -> Path | None:
    """The checkpoint that a run continues from, None for a new run; makes its folder ready for either.

    resume="auto" continues the run in `out` if it is the same run: all options equal but FREE_OPTIONS. Without a
    complete checkpoint it starts again. The log is cut back to the checkpoint; checkpoints of later steps, where resume
    names an earlier one, are removed. A run that is replaced (overwrite) loses log, weights and checkpoints; a restart
    by torchrun goes on from the newest checkpoint of what it is the restart of, whatever overwrite and resume say.

    Raises ValueError where `out` holds another run, naming the options that differ, or where it may not be continued,
    and FileNotFoundError where resume names no checkpoint. One process of a run calls this.
    """
    out = Path(config.out)
    earlier = [name for name in (LOG, WEIGHTS, STATE) if (out / name).exists()]
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    start = None
    if config.resume not in ("auto", "never"):
        own = restarted and _options_of(out) == config.to_dict()
        start = (newest_checkpoint(out / STATE) if own else None) or find_checkpoint(config.resume)
        if earlier and not (config.overwrite or own) and start.parent.resolve() != (out / STATE).resolve():
            raise ValueError(_refusal(out, earlier, f"and {start} is none of its checkpoints"))
    elif earlier and (restarted or not config.overwrite):
        if config.resume == "never" and not restarted:
            raise ValueError(_refusal(out, earlier, "and resume is never"))
        _check_same_run(config, out, earlier)
        start = newest_checkpoint(out / STATE)
        if start is None and WEIGHTS in earlier:
            raise ValueError(_refusal(out, earlier, "which has ended and kept no checkpoint to go on from"))
    if start is not None and checkpoint_step(start) > config.steps:
        raise ValueError(f"steps {config.steps} lies before the {checkpoint_step(start)} steps of {start}")
    _make_ready(out, start)
    return start


def write_run_options(config: TrainConfig) -> None:
    """Writes the options into the run's folder, for readers and for choose_start; whole or not at all."""
    for name in (OPTIONS, "train.yaml"):
        beside = Path(config.out) / f".{name}"
        write_options(beside, config.to_dict())
        os.replace(beside, Path(config.out) / name)


def differing_options(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What keeps `config` from being the run that `saved` (TrainConfig.to_dict) tells of, one text an option."""
    now, texts = config.to_dict(), []
    for field in fields(config):
        was = saved.get(field.name, to_options(field.default))  # an option that is newer than the run
        if field.name in FREE_OPTIONS or was == now[field.name]:
            continue
        if field.name == "data" and _same_documents(was, config.data):
            continue
        texts.append(f"{field.name} was {was!r} and is now {now[field.name]!r}")
        if field.name == "data" and _same_documents(was, config.data, numbers=None):
            texts[-1] += "; numbers decides what official texts hold: null is what numbers=none keeps"
    return texts


def _same_documents(saved: Any, data: Sequence[DataSource], **changes: Any) -> bool:
    """Return whether saved sources give the same documents, with numbers in another spelling (lumos.data.sources).

    A run of a version without `numbers`, or with the default of its time, has left placeholders in the texts: None.
    """
    if not isinstance(saved, list) or len(saved) != len(data):
        return False
    try:
        earlier = [from_options(DataSource, {"numbers": None} | source, "data") for source in saved]
    except (ValueError, TypeError):  # options of another version
        return False
    pairs = zip(earlier, data, strict=True)
    return all(trains_alike(replace(a, **changes), replace(b, **changes)) for a, b in pairs)


def cut_log(path: Path, step: int) -> None:
    """Removes the lines of step `step` and later, and what a crash or a power failure made of the last ones."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb+") as log:
        for line in log:
            if not line.endswith(b"\n") or (number := _step_of(line)) is None or number >= step:
                break
            end += len(line)
        log.truncate(end)
        sync(log)


def _step_of(line: bytes) -> int | None:
    """None for a line that is damaged: blocks of the log that a power failure left as zeros."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return None


def _options_of(out: Path) -> dict[str, Any] | None:
    return read_options(out / OPTIONS) if (out / OPTIONS).is_file() else None


def _check_same_run(config: TrainConfig, out: Path, earlier: list[str]) -> None:
    saved = _options_of(out)
    if saved is None:
        raise ValueError(_refusal(out, earlier, f"but no {OPTIONS} that tells its options"))
    differing = differing_options(saved, config)
    if differing:
        raise ValueError(_refusal(out, earlier, f"with other options: {'; '.join(differing)}"))


def _refusal(out: Path, earlier: list[str], why: str) -> str:
    return f"out: {out} holds the {' and '.join(earlier)} of an earlier run, {why}; choose another folder or overwrite"


def _make_ready(out: Path, start: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(f".{WEIGHTS}.new-*"):  # of a run that was killed while it wrote its weights
        shutil.rmtree(path)
    own = start is not None and start.parent.resolve() == (out / STATE).resolve()
    for path in complete_checkpoints(out / STATE):  # before the log is cut: the newest one finds its lines at any time
        if not own or checkpoint_step(path) > checkpoint_step(start):
            remove_checkpoint(path)
    if own:
        cut_log(out / LOG, checkpoint_step(start))
        return
    (out / LOG).unlink(missing_ok=True)
    for folder in (STATE, WEIGHTS):
        shutil.rmtree(out / folder, ignore_errors=True)


def check_continues(description: Mapping[str, Any], config: TrainConfig, path: Path) -> list[str]:
    """The options that a checkpoint's run had otherwise. ResumeError where run.json is not of this format."""
    if description.get("format") != 1 or not isinstance(description.get("config"), dict):
        raise ResumeError(f"{path} is of another format: {description.get('format')!r}, this version reads 1")
    return differing_options(description["config"], config)
