"""The check that a GPU implementation passes on a machine before "auto" takes it.

The first use of an implementation for a dtype and head size compares it with the reference (battery.py), which takes
seconds, most of them in the compiler. The verdict is kept for the process and on disk (cache.py). The file's name is a
digest of the GPU, the driver, the versions and the code: whatever of these changes, the check is made again. Ranks of a
job share the verdict: one of them makes it while the others wait for its lock.

An error of the implementation counts for the process alone, since its cause may be mended (no C compiler, say). Running
out of memory is no verdict at all, and neither is an interruption.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import torch

from . import battery, cache, examples
from .battery import Finding, Subject
from .dispatch import Op, Problem, architecture, needs_self_check
from .errors import dtype_name
from .examples import DETERMINISTIC
from .version import versions

logger = logging.getLogger("lumos_kernels")

Result = TypeVar("Result")

# Packages whose code an implementation runs.
PACKAGES = ("triton", "flash-attn", "flash-attn-4", "nvidia-cudnn-frontend")
COMPILER_SETTINGS = ("TRITON_INTERPRET", "TRITON_PTXAS_PATH", "TRITON_DEFAULT_FP_FUSION")
FIRST_WAIT = 60.0  # seconds until a check that ran out of memory is tried again, doubled each time
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_LOCK = threading.Lock()


class Verdict(NamedTuple):
    """The outcome of a self-check. error: the first thing that was wrong, "" where nothing was."""

    passed: bool
    error: str = ""


class NoVerdictError(RuntimeError):
    """A verdict is needed where none can be made: while a CUDA graph is captured or a program is traced."""


class _Process:
    """Everything that this process knows: verdicts, the files that it has read, and when it may try again."""

    def __init__(self) -> None:
        self.verdicts: dict[tuple[str, str], Verdict] = {}  # (file, title)
        self.read: set[str] = set()
        self.next_try: dict[tuple[str, str], tuple[float, float]] = {}  # (file, title) -> time, and how long it waited


_process = _Process()


def title(op: Op[Any], impl: str, problem: Problem, kind: str) -> str:
    """Return the name of a verdict in the file, e.g. "frame_attention triton bfloat16 64 deterministic"."""
    return f"{op.name} {impl} {dtype_name(problem.dtype)} {_head(op, problem) or '-'} {kind}"


def words(op: Op[Any], impl: str, problem: Problem, kind: str) -> str:
    """Return the same for messages: "frame_attention triton (bfloat16, head size 64, deterministic backward)"."""
    head = _head(op, problem)
    parts = [dtype_name(problem.dtype), *([f"head size {head}"] if head else []), f"{kind} backward"]
    return f"{op.name} {impl} ({', '.join(parts)})"


def command(op: Op[Any], impl: str, problem: Problem) -> str:
    """Return the command that makes the verdicts of a problem."""
    head = _head(op, problem)
    only = f"--op {op.name} --impl {impl} --dtype {dtype_name(problem.dtype)}" + (f" --head-dim {head}" if head else "")
    return f"python -m lumos_kernels.check {only}"


def _head(op: Op[Any], problem: Problem) -> int | None:
    return problem.head_dim if examples.head_dims(op) else None


def stored(op: Op[Any], impl: str, problem: Problem, kind: str = DETERMINISTIC) -> Verdict | None:
    """Return the verdict of this process or of the disk, None where there is none. Nothing is run."""
    file = file_name(problem.gpu)
    if file not in _process.read:
        _process.read.add(file)
        kept = cache.read(file).get("verdicts")
        for name, entry in kept.items() if isinstance(kept, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("passed"), bool):
                _process.verdicts.setdefault((file, name), Verdict(entry["passed"], str(entry.get("error", ""))))
    return _process.verdicts.get((file, title(op, impl, problem, kind)))


def allows(op: Op[Any], impl: str, problem: Problem, kind: str) -> bool:
    """Return whether a kind of backward may run: it has passed, or needs no self-check. Nothing is run."""
    if not needs_self_check(impl, problem):
        return True
    found = stored(op, impl, problem, kind)
    return found is not None and found.passed


def verdict(op: Op[Any], impl: str, problem: Problem) -> Verdict | None:
    """Return the verdict on an implementation. Make those that are missing, for every kind of backward.

    None: it could not be made now, and a later call may try again. Raises NoVerdictError under capture and tracing.
    """
    kinds = examples.kinds(op, impl)
    known = stored(op, impl, problem)
    if _is_recorded(problem):
        if known is None:
            raise NoVerdictError(
                f"{words(op, impl, problem, DETERMINISTIC)} was not checked on this GPU yet, and cannot be while a "
                f"CUDA graph is captured or a program is traced. Run one step eagerly first, or "
                f"`{command(op, impl, problem)}`"
            )
        return known
    # In a thread of autograd's the check, which has a thread of its own, would wait for this one.
    if torch._C._current_graph_task_id() != -1 or all(stored(op, impl, problem, kind) for kind in kinds):
        return known
    # What the caller has queued must not wait inside the lock, and its errors are not those of the implementation.
    if problem.device == "cuda" and torch.cuda.is_available():
        torch.cuda.current_stream(problem.gpu).synchronize()
    file = file_name(problem.gpu)
    with _LOCK, cache.locked(file):
        _process.read.discard(file)  # another thread or process may have made them meanwhile
        for kind in kinds:
            waits_until, _ = _process.next_try.get((file, title(op, impl, problem, kind)), (0.0, 0.0))
            if stored(op, impl, problem, kind) is None and monotonic() >= waits_until:
                _make(op, impl, problem, kind)
    return stored(op, impl, problem)


def _is_recorded(problem: Problem) -> bool:
    if torch.compiler.is_compiling():
        return True
    return problem.device == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _make(op: Op[Any], impl: str, problem: Problem, kind: str) -> None:
    """Run the check and keep its verdict, where it comes to one."""
    key = file_name(problem.gpu), title(op, impl, problem, kind)
    name = words(op, impl, problem, kind)
    logger.warning("%s is compared with its reference, once on this machine; this takes some seconds", name)
    subject = Subject(op, impl, problem.dtype, _head(op, problem), kind, device_of(problem))
    try:
        finding = in_own_thread(lambda proceed: battery.examine(subject, proceed=proceed), subject.device)
    except Exception as error:
        if is_out_of_memory(error):
            waited = 2 * _process.next_try.get(key, (0.0, FIRST_WAIT / 2))[1]
            _process.next_try[key] = monotonic() + waited, waited
            logger.warning("%s could not be checked for lack of memory. A later call tries again", name)
            return
        found = Verdict(False, said(error))
        _process.verdicts[key] = found
        if device_is_lost(subject.device):
            keep(problem.gpu, {key[1]: found})
            raise RuntimeError(
                f"a CUDA error stopped this process's GPU while {name} was compared with its reference: {found.error}. "
                f'Start the process again: until `{command(op, impl, problem)}` passes, "auto" will not take it'
            ) from error
    else:
        found = judge(finding)
        keep(problem.gpu, {key[1]: found})
    if not found.passed:
        logger.warning(
            '%s failed its self-check: %s. "auto" takes the next implementation; `%s` shows more',
            name,
            found.error,
            command(op, impl, problem),
        )


def said(error: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that memory ran out, in the words of torch, CUDA, cuBLAS or Triton."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def judge(finding: Finding) -> Verdict:
    """Return the verdict that a finding amounts to."""
    return Verdict(finding.passed, "" if finding.passed else finding.failures[0])


def keep(gpu: int | None, verdicts: Mapping[str, Verdict]) -> None:
    """Add verdicts to the machine's file, whose lock the caller holds, and to those of this process."""
    file = file_name(gpu)
    kept = cache.read(file).get("verdicts")
    entries = dict(kept) if isinstance(kept, dict) else {}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for name, found in verdicts.items():
        _process.verdicts[file, name] = found
        entries[name] = {**found._asdict(), "date": date}
    cache.write(file, {"machine": machine(gpu), "verdicts": entries})


def in_own_thread(work: Callable[[Callable[[], None]], Result], device: torch.device) -> Result:
    """Return work(proceed) from a thread of its own, on a stream of its own, where no setting of the caller holds.

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
            with contextlib.ExitStack() as stack:
                if device.type == "cuda":
                    stack.enter_context(torch.cuda.device(device))
                    stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
                results.append(work(proceed))
        except BaseException as error:  # it is raised again in the caller's thread
            traceback.clear_frames(error.__traceback__)  # they hold the check's tensors
            errors.append(error)

    thread = threading.Thread(target=run, name="lumos-self-check", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stopped.set()
        raise
    if errors:
        raise errors.pop()
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


@functools.cache
def file_name(gpu: int | None) -> str:
    """Return the name of the file with the verdicts of a machine: a digest of all that a verdict depends on."""
    facts = json.dumps(machine(gpu), sort_keys=True)
    return f"self_check_{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def machine(gpu: int | None) -> dict[str, str]:
    """Return what a verdict depends on: the GPU, its driver, the versions, the compiler's settings and the code."""
    settings = {name: os.environ[name] for name in COMPILER_SETTINGS if name in os.environ}
    return {**gpu_facts(gpu), "torch": torch.__version__, **versions(PACKAGES), **settings, "code": code_digest()}


def gpu_facts(gpu: int | None) -> dict[str, str]:
    """Return name, architecture and driver of a GPU."""
    number = torch.cuda.current_device() if gpu is None else gpu
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
        with contextlib.suppress(OSError):  # a table that another user alone may read chooses nothing here
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
