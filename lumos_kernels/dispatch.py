"""Which implementation of an op runs, and why.

An op's contract.py registers the implementations in the order in which "auto" prefers them, each with one predicate.
The predicate gets a Problem and returns None, or the reason why the implementation refuses. Dispatch, the tests,
`backends()` and the docs all ask that predicate. On a GPU "auto" takes the first implementation that runs the problem
and has passed its self-check on this very machine (self_check.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from . import library
from .errors import dtype_name

logger = logging.getLogger("lumos_kernels")

# (op, implementation) -> {architecture: file under bench/results/}. The docs may say that the implementation is right
# and fast on that architecture: the file shows that its tests passed and its gates were reached on that very code.
# `python -m bench.gpu.proof` prints the entries, and a test refuses an entry that its file does not prove. Nothing here
# decides what runs.
PROVEN: Mapping[tuple[str, str], Mapping[str, str]] = {}


class Problem(NamedTuple):
    """The facts of a call for which an implementation may refuse it."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    head_dim: int | None = None
    arch: str | None = None  # of the GPU: "sm_90", with ROCm "gfx942"
    gpu: int | None = None  # number of the GPU

    @classmethod
    def of(cls, tensor: Tensor, head_dim: int | None = None) -> Problem:
        """Return the problem of a call whose first tensor this is."""
        if not tensor.is_cuda:
            return cls(tensor.device.type, tensor.dtype, head_dim)
        return cls("cuda", tensor.dtype, head_dim, architecture(tensor.device.index), tensor.device.index)


@functools.cache
def architecture(gpu: int) -> str:
    """Return the architecture of a GPU: "sm_90", or "gfx942" with ROCm, whose GPUs torch calls "cuda" too."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(gpu).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"sm_{major}{minor}"


Predicate = Callable[[Problem], str | None]
Implementation = TypeVar("Implementation")  # the Protocol of an op's contract.py


@dataclass(frozen=True)
class Op(Generic[Implementation]):
    """An op and its implementations.

    package: the package of the op; implementation <name> is the module `package`.<name>.
    implementations: name -> predicate, in the order in which "auto" prefers them.
    on_request: name -> why "auto" never takes the implementation.
    """

    name: str
    package: str
    implementations: Mapping[str, Predicate]
    on_request: Mapping[str, str] = field(default_factory=dict)

    def choose(self, impl: str, problem: Problem) -> Implementation:
        """Return the implementation's module. Raise ValueError with the reason if an explicit choice cannot run.

        Callers look up `forward` and `backward` in the module at each call, so that a test can replace them.
        """
        try:
            override = _override(self.name) if impl == "auto" else None
            module = _choose(self.name, impl, override, problem, problem.device == "cuda" and self_checks())
        except _UndecidedError as undecided:
            module = undecided.module
        return cast(Implementation, module)

    def refusal(self, impl: str, problem: Problem) -> str | None:
        """Return why `impl` does not run the problem, None where it does."""
        if impl not in self.implementations:
            return f"{self.name} has no such implementation; there are {', '.join(self.implementations)}"
        return self.implementations[impl](problem)


class _UndecidedError(Exception):
    """A better implementation could not be checked now, so this choice is for one call."""

    def __init__(self, module: object) -> None:
        super().__init__()
        self.module = module


_OPS: dict[str, Op[Any]] = {}


def register(
    name: str, package: str, implementations: Mapping[str, Predicate], on_request: Mapping[str, str] | None = None
) -> Op[Any]:
    """Register an op of this package with its implementations, best first."""
    _OPS[name] = Op(name, package, implementations, on_request or {})
    return _OPS[name]


def ops() -> Mapping[str, Op[Any]]:
    """Return the registered ops by name."""
    return _OPS


def check_names(source: str, names: Collection[str]) -> None:
    """Raise ValueError where `source` names an op that does not exist."""
    for name in names:
        if name not in _OPS:
            raise ValueError(f"{source} names the op {name!r}; there are {', '.join(_OPS)}")


def check_impl(impl: str | Mapping[str, str], used: Collection[str]) -> None:
    """Raise ValueError unless `impl` names implementations that exist. Whether they run here shows at the first call.

    impl: "auto" or a name that all of the ops `used` have, or a mapping from names of ops to "auto" or such a name.
    """
    if not isinstance(impl, (str, Mapping)):
        raise ValueError(f"impl must be a name, or a mapping from ops to names; got {type(impl).__name__}")
    if isinstance(impl, Mapping):
        check_names("impl", impl)
    wanted = impl if isinstance(impl, Mapping) else dict.fromkeys(used, impl)
    for name, choice in wanted.items():
        known = ("auto", *_OPS[name].implementations)
        if choice not in known:
            one = isinstance(impl, str) and any(impl in op.implementations for op in _OPS.values())
            hint = f'; give a mapping for those that have it, {{"op": {impl!r}}}' if one else ""
            raise ValueError(f"impl: {name} has no implementation {choice!r}; there are {', '.join(known)}{hint}")


@functools.lru_cache(maxsize=1024)
def _choose(name: str, impl: str, override: str | None, problem: Problem, checked: bool) -> object:
    op = _OPS[name]
    wanted = override or impl
    if wanted != "auto":
        reason = op.refusal(wanted, problem)
        if reason is not None:
            source = f"LUMOS_IMPL={wanted}" if override else f"impl={wanted!r}"
            raise ValueError(f"{name}: {source} cannot run here: {reason}")
        return importlib.import_module(f"{op.package}.{wanted}")
    refused: list[str] = []
    undecided = False
    for candidate in op.implementations:
        reason = op.refusal(candidate, problem) or op.on_request.get(candidate)
        if reason is None and checked and candidate != "reference":
            from . import self_check

            verdict = self_check.verdict(op, candidate, problem)
            undecided |= verdict is None
            if verdict is None or not verdict.passed:
                reason = f"failed its self-check: {verdict.error}" if verdict else "could not be checked"
        if reason is None:
            module = importlib.import_module(f"{op.package}.{candidate}")
            if undecided:
                raise _UndecidedError(module)
            too_odd = candidate == "reference" and _head_dim_refused(op, problem)
            _log_choice(name, candidate, problem.device, "; ".join(refused), problem.head_dim if too_odd else None)
            return module
        refused.append(f"{candidate}: {reason}")
    raise ValueError(f"{name}: no implementation runs {problem}: {'; '.join(refused)}")


def needs_self_check(impl: str, problem: Problem) -> bool:
    """Return whether "auto" takes the implementation only after it has passed its self-check."""
    return problem.device == "cuda" and impl != "reference" and self_checks()


def self_checks() -> bool:
    """Return whether implementations are checked on a GPU. LUMOS_SELF_CHECK=0 trusts them."""
    value = os.environ.get("LUMOS_SELF_CHECK", "1")
    if value not in ("", "0", "1"):
        raise ValueError(f"LUMOS_SELF_CHECK must be 0 (trust GPU implementations unchecked) or 1; got {value!r}")
    return value != "0"


def _head_dim_refused(op: Op[Any], problem: Problem) -> bool:
    """Return whether a kernel would run the problem if only its head size were another."""
    usual = problem._replace(head_dim=None)
    kernels = (name for name in op.implementations if name != "reference" and name not in op.on_request)
    return problem.head_dim is not None and any(op.refusal(name, usual) is None for name in kernels)


@functools.cache
def _log_choice(name: str, chosen: str, device: str, refused: str, slow_head_dim: int | None) -> None:
    why = f" ({refused})" if refused else ""
    if slow_head_dim is None:
        logger.info("%s on %s uses %s%s", name, device, chosen, why)
    else:
        logger.warning("%s on %s uses the slow %s at head size %s%s", name, device, chosen, slow_head_dim, why)


def _override(name: str) -> str | None:
    """Return what LUMOS_IMPL asks for this op, None where that is nothing or "auto".

    The variable names one implementation for every op ("reference"), or one by op
    ("mm_rope=triton,masked_sample=reference"), or both ("reference,mm_rope=native"): then the op's own entry wins.
    """
    value = os.environ.get("LUMOS_IMPL")
    if not value:
        return None
    wanted = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        op, _, impl = part.rpartition("=")
        wanted[op.strip()] = impl.strip()
    check_names("LUMOS_IMPL", wanted.keys() - {""})
    impl = wanted.get(name, wanted.get("", "auto"))
    return None if impl == "auto" else impl


# Predicates that several ops share.


def runs_anywhere(problem: Problem) -> str | None:
    """Accept everything: a reference runs on any device and in any floating dtype."""
    return None


def runs_native(problem: Problem) -> str | None:
    """Accept CPU tensors in bf16, fp16 and fp32, where the compiled library loads."""
    if problem.device != "cpu":
        return f"runs CPU tensors, not {problem.device}"
    return _refuses_dtype(problem) or library.refusal()


def runs_triton(problem: Problem) -> str | None:
    """Accept CUDA tensors in bf16, fp16 and fp32, and CPU tensors where TRITON_INTERPRET=1 asks for the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if problem.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs CUDA tensors, not {problem.device}"
    return refuses_architecture(problem) or _refuses_dtype(problem)


def refuses_architecture(problem: Problem) -> str | None:
    """Return why GPU code for NVIDIA's compute capability 8.0 and newer does not run on the problem's device."""
    if problem.arch is None:
        return None
    if not problem.arch.startswith("sm_"):
        return f"runs NVIDIA GPUs, not {problem.arch} under ROCm"
    if int(problem.arch.removeprefix("sm_")) < 80:
        return f"needs compute capability 8.0 or newer, and this GPU is {problem.arch}"
    return None


def _refuses_dtype(problem: Problem) -> str | None:
    if problem.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return f"computes bfloat16, float16 and float32, not {dtype_name(problem.dtype)}"


# The implementations of an op that has no further limits, best first.
USUAL: Mapping[str, Predicate] = {"triton": runs_triton, "native": runs_native, "reference": runs_anywhere}


@dataclass(frozen=True)
class Row:
    """A line of the backend table."""

    op: str
    impl: str
    device: str
    status: str  # "auto" (taken by "auto"), "ready" (runs on request) or "-"
    reason: str


def table(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> list[Row]:
    """Return what runs a typical problem on this machine, a row for each op, implementation and device."""
    devices = [torch.empty(0, dtype=dtype)]
    if torch.cuda.is_available():
        devices.append(torch.empty(0, dtype=dtype, device="cuda"))
    rows = []
    for op in _OPS.values():
        for problem in (Problem.of(tensor, head_dim) for tensor in devices):
            chosen = False
            for impl in op.implementations:
                status, reason = _standing(op, impl, problem)
                if chosen and status == "auto":
                    status, reason = "ready", ""
                chosen |= status == "auto"
                rows.append(Row(op.name, impl, problem.arch or problem.device, status, reason))
    return rows


def _standing(op: Op[Any], impl: str, problem: Problem) -> tuple[str, str]:
    """Return the status and the reason of a row, as if no better implementation ran."""
    refusal = op.refusal(impl, problem)
    if refusal is not None:
        return "-", refusal
    if impl in op.on_request:
        return "ready", op.on_request[impl]
    if not needs_self_check(impl, problem):
        return "auto", ""
    from . import self_check

    verdict = self_check.stored(op, impl, problem)
    if verdict is None:
        return "auto", "checked against the reference at first use"
    return ("auto", "passed its self-check") if verdict.passed else ("ready", f"failed its self-check: {verdict.error}")


def backends() -> None:
    """Print for every op and implementation whether it runs here, which one "auto" takes, and why others do not run."""
    rows = [tuple(field.name for field in fields(Row)), *(astuple(row) for row in table())]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    if os.environ.get("LUMOS_IMPL"):
        print(f"LUMOS_IMPL={os.environ['LUMOS_IMPL']} overrides what auto takes:")
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip())
