"""The check that a GPU implementation passes on a machine before "auto" takes it.

The first use of an implementation for a dtype and head size compares it with the reference (battery.py), which takes
seconds, most of them in the compiler. The verdict is kept for the process and on disk (cache.py). The file's name is a
digest of the GPU, the driver, the versions and the code: whatever of these changes, the check is made again. Ranks of a
job share the verdict: one of them makes it while the others wait for its lock.

An error of the implementation counts for the process alone, since its cause may be mended (no C compiler, say). Running
out of memory is no verdict at all, and neither is an interruption.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from . import battery, cache, examples
from .battery import Finding, Subject
from .dispatch import Op, Problem, architecture, needs_self_check
from .errors import dtype_name
from .examples import DETERMINISTIC

logger = logging.getLogger("lumos_kernels")

Result = TypeVar("Result")

# Packages whose code an implementation runs.
PACKAGES = ("triton", "flash-attn", "flash-attn-4", "nvidia-cudnn-frontend")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_LOCK = threading.Lock()


class Verdict(NamedTuple):
    """The outcome of a self-check. error: the first thing that was wrong, "" where nothing was."""

    passed: bool
    error: str = ""


class NoVerdictError(RuntimeError):
    """A verdict is needed where none can be made: while a CUDA graph is captured or a program is traced."""


_verdicts: dict[tuple[str, str], Verdict] = {}  # (file, title) -> verdict, of this process


def title(op: Op[Any], impl: str, problem: Problem, kind: str) -> str:
    """Return the name of a verdict, e.g. "frame_attention triton bfloat16 64 deterministic"."""
    return f"{op.name} {impl} {dtype_name(problem.dtype)} {_head(op, problem) or '-'} {kind}"


def _head(op: Op[Any], problem: Problem) -> int | None:
    return problem.head_dim if examples.head_dims(op) else None


def stored(op: Op[Any], impl: str, problem: Problem, kind: str = DETERMINISTIC) -> Verdict | None:
    """Return the verdict of this process or of the disk, None where there is none. Nothing is run."""
    file, name = file_name(problem.gpu), title(op, impl, problem, kind)
    if (file, name) not in _verdicts:
        kept = cache.read(file).get("verdicts")
        entry = kept.get(name) if isinstance(kept, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("passed"), bool):
            return None
        _verdicts[file, name] = Verdict(entry["passed"], str(entry.get("error", "")))
    return _verdicts[file, name]


def allows(op: Op[Any], impl: str, problem: Problem, kind: str) -> bool:
    """Return whether a kind of backward may run: it has passed, or needs no self-check. Nothing is run."""
    if not needs_self_check(impl, problem):
        return True
    found = stored(op, impl, problem, kind)
    return found is not None and found.passed


def verdict(op: Op[Any], impl: str, problem: Problem) -> Verdict | None:
    """Return the verdict on an implementation. Without one, make it for every kind of backward.

    None: it could not be made now, and the next call may try again. Raises NoVerdictError under capture and tracing.
    """
    known = stored(op, impl, problem)
    if known is not None:
        return known
    name = title(op, impl, problem, DETERMINISTIC)
    if _is_recorded(problem):
        raise NoVerdictError(
            f"{name} has not been checked on this GPU, and cannot be while a CUDA graph is captured or a program is "
            f"traced: run `python -m lumos_kernels.check --op {op.name} --impl {impl}` before, or one step outside"
        )
    if torch._C._current_graph_task_id() != -1:
        return None  # the thread of a backward pass: the check has one of its own, which would wait for this one
    file = file_name(problem.gpu)
    with _LOCK, cache.locked(file):
        known = stored(op, impl, problem)  # another thread or rank may have made it meanwhile
        if known is None:
            for kind in examples.kinds(op, impl):
                _make(op, impl, problem, kind)
    return stored(op, impl, problem)


def _is_recorded(problem: Problem) -> bool:
    if torch.compiler.is_compiling():
        return True
    return problem.device == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _make(op: Op[Any], impl: str, problem: Problem, kind: str) -> None:
    """Run the check and keep its verdict, where it comes to one."""
    name, file = title(op, impl, problem, kind), file_name(problem.gpu)
    logger.info("%s is checked against the reference, once on this machine", name)
    subject = Subject(op, impl, problem.dtype, _head(op, problem), kind, device_of(problem))
    try:
        finding = in_own_thread(lambda proceed: battery.examine(subject, proceed=proceed), subject.device)
    except torch.OutOfMemoryError:
        logger.warning("%s could not be checked: the GPU is out of memory", name)
        return
    except Exception as error:
        found = Verdict(False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        _verdicts[file, name] = found
        if device_is_lost(subject.device):
            keep(file, problem.gpu, {name: found})
            raise RuntimeError(
                f"{name} ended the GPU context in its self-check ({found.error}). Start the process again: "
                '"auto" will not take it any more'
            ) from error
    else:
        found = judge(finding)
        _verdicts[file, name] = found
        keep(file, problem.gpu, {name: found})
    if not found.passed:
        logger.warning('%s failed its self-check, and "auto" does not take it: %s', name, found.error)


def judge(finding: Finding) -> Verdict:
    """Return the verdict that a finding amounts to."""
    return Verdict(finding.passed, "" if finding.passed else finding.failures[0])


def keep(file: str, index: int | None, verdicts: dict[str, Verdict]) -> None:
    """Add verdicts to a file of the cache folder, and to those of this process."""
    kept = cache.read(file).get("verdicts")
    entries = dict(kept) if isinstance(kept, dict) else {}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for name, found in verdicts.items():
        _verdicts[file, name] = found
        entries[name] = {**found._asdict(), "date": date}
    cache.write(file, {"machine": machine(index), "verdicts": entries})


def in_own_thread(work: Callable[[Callable[[], None]], Result], device: torch.device) -> Result:
    """Return work(proceed) from a thread of its own, where no setting of the caller's thread holds.

    Autocast, grad mode, inference mode, the default device, torch's modes and the current stream belong to a thread.
    `proceed` ends the work where the caller was interrupted.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    stopped = threading.Event()

    def proceed() -> None:
        if stopped.is_set():
            raise InterruptedError("the caller was interrupted")

    def run() -> None:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else torch.enable_grad():
                results.append(work(proceed))
        except BaseException as error:  # it is raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="lumos-self-check", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stopped.set()
        raise
    if errors:
        raise errors[0]
    return results[0]


def device_of(problem: Problem) -> torch.device:
    """Return the device of a problem."""
    return torch.device(problem.device if problem.gpu is None else f"{problem.device}:{problem.gpu}")


def device_is_lost(device: torch.device) -> bool:
    """Return whether the GPU's context was ended, by an illegal memory access for instance."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def file_name(index: int | None) -> str:
    """Return the name of the file with the verdicts of a machine: a digest of all that a verdict depends on."""
    facts = json.dumps(machine(index), sort_keys=True)
    return f"self_check_{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


@functools.cache
def machine(index: int | None) -> dict[str, str]:
    """Return what a verdict depends on: the GPU, its driver, the versions and the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**gpu(index), "torch": torch.__version__, **versions, "code": code_digest()}


def gpu(index: int | None) -> dict[str, str]:
    """Return name, architecture and driver of a GPU."""
    number = torch.cuda.current_device() if index is None else index
    return {"gpu": torch.cuda.get_device_name(number), "arch": architecture(number), "driver": driver()}


def driver() -> str:
    """Return the version of NVIDIA's driver, e.g. "580.82.07", or the CUDA version that it supports."""
    try:
        words = DRIVER_FILE.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}" if hasattr(torch._C, "_cuda_getDriverVersion") else "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's sources and libraries, and of the configurations measured on this machine."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    files = sorted(file for suffix in ("*.py", "*.so") for file in package.rglob(suffix))
    for file in [*files, *sorted(cache.folder().glob("*_tuned.json"))]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
