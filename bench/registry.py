"""What can be measured: an op's contestants, and the cases they meet in.

An op joins with one OpBench and its cases (bench/ops/<op>.py). An implementation of ours joins on its own: whatever
dispatch accepts on the device is a contestant. A rival that is not installed is a missing row.
"""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.formulas import Work
from bench.shapes import SMOKE, Model, Video
from lumos_kernels import dispatch
from lumos_kernels.dispatch import Problem

OURS, RIVAL, CEILING = "ours", "rival", "ceiling"
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Inputs:
    """What a contestant gets: the op's arguments by name, the tensors that gradients are taken of, and the gradients
    that arrive at the outputs (both empty where only the forward pass is measured).
    """

    args: Mapping[str, Any]
    leaves: tuple[Tensor, ...] = ()
    upstream: tuple[Tensor, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.args[name]
        except KeyError:
            raise AttributeError(name) from None


Run = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One measurement: an op at a size, in a dtype, forward or forward and backward.

    slow: takes minutes or many gigabytes on a CPU; only run where asked for by name.
    """

    op: str
    model: Model
    video: Video
    dtype: torch.dtype
    backward: bool
    slow: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # what the op's build understands
    suffix: str = ""

    @property
    def key(self) -> str:
        """op/model-video/dtype/pass, e.g. "mm_rope/1B-256p-7f/bf16/forward+backward"."""
        name = f"{self.model.name}-{self.video.name}{self.suffix}"
        return f"{self.op}/{name}/{DTYPE_NAMES[self.dtype]}/{'forward+backward' if self.backward else 'forward'}"


@dataclass(frozen=True)
class Contestant:
    """One way to compute the op.

    role: OURS, RIVAL, or CEILING: a machine limit, not checked for correctness, with work of its own.
    prepare: makes what the caller would keep between calls (a mask, a plan) from the inputs, outside the timing; its
        result replaces the inputs.
    available: whether it runs the case on this device type.
    memory: bytes it needs beyond the inputs, where that may exceed the machine's.
    requires: modules it imports; one that is not installed makes it a missing row.
    refusal: why its library cannot run on this machine although it is installed (another version, another
        architecture); None where it can. That makes it a missing row too.
    jit: compiles at its first call, which takes seconds. The GPU suite runs these rivals last, at gate shapes only.
    slack: how many times the error limit it may reach. 1 for ours; other libraries round where we do not (gradients
        summed in bf16, say): they get a figure, and their error stands beside it.
    """

    name: str
    run: Run
    role: str = RIVAL
    prepare: Callable[[Inputs], Inputs] | None = None
    available: Callable[[Case, str], bool] = lambda case, device: True
    memory: Callable[[Case], int] = lambda case: 0
    work: Callable[[Case], Work] | None = None
    requires: tuple[str, ...] = ()
    refusal: Callable[[], str | None] = lambda: None
    jit: bool = False
    slack: float = 1.0

    def missing(self) -> str | None:
        """Return why it cannot run on this machine: a module that is absent, or its refusal. None where it can."""
        absent = [module for module in self.requires if not installed(module)]
        return f"not installed: {', '.join(absent)}" if absent else self.refusal()


def installed(module: str) -> bool:
    """Whether the dotted module can be found, without importing it (its parents are imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent that is absent, or that lacks what it imports itself
        return False


@dataclass(frozen=True)
class OpBench:
    """An op under measurement.

    name: as in lumos_kernels.dispatch.
    build: (case, device, dtype) -> Inputs: seeded values, rounded to case.dtype, stored in dtype.
    ours: (inputs, impl) -> outputs, through the public function.
    yardstick: the rival that is the same mathematics run eagerly in the case's dtype; its error sets the tolerance.
    work: useful work of a case.
    cases: each op has one of the video "smoke", which runs in milliseconds, for the tests.
    """

    name: str
    build: Callable[[Case, str, torch.dtype], Inputs]
    ours: Callable[[Inputs, str], tuple[Tensor, ...]]
    rivals: Sequence[Contestant]
    yardstick: str
    work: Callable[[Case], Work]
    cases: Sequence[Case]

    def contestants(self, case: Case, device: str) -> list[Contestant]:
        """Those that run the case on the device: ours, best first by dispatch's order, then rivals and ceilings."""
        problem = Problem.of(torch.empty(0, dtype=case.dtype, device=device), case.model.head_dim)
        op = dispatch.ops()[self.name]
        ours = [
            Contestant(f"lumos {impl}", lambda inputs, impl=impl: self.ours(inputs, impl), OURS)
            for impl in op.implementations
            if op.refusal(impl, problem) is None
        ]
        return ours + [rival for rival in self._able(case, device) if rival.missing() is None]

    def missing(self, case: Case, device: str) -> dict[str, str]:
        """Return the rivals of the case that cannot run on this machine, and why each of them cannot."""
        return {rival.name: reason for rival in self._able(case, device) if (reason := rival.missing())}

    def _able(self, case: Case, device: str) -> list[Contestant]:
        return [rival for rival in self.rivals if rival.available(case, device)]

    def smoke(self, case: Case) -> Case:
        """A case of milliseconds like this one, or the case itself where none runs the same contestants."""
        for small in self.cases:
            alike = (small.dtype, small.backward) == (case.dtype, case.backward)
            if small.video == SMOKE and alike and self._able(small, "cpu") == self._able(case, "cpu"):
                return small
        return case

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.ours(inputs, "reference")


def ops() -> Mapping[str, OpBench]:
    """The ops by name."""
    from bench.ops import frame_attention, frame_layout, masked_sample, mm_rope, tube_masked_loss

    modules = (mm_rope, frame_attention, tube_masked_loss, masked_sample, frame_layout)
    return {module.BENCH.name: module.BENCH for module in modules}


def select(names: Sequence[str] = (), pattern: str | None = None) -> list[Case]:
    """Cases of the named ops (all of them if there is no name) whose key matches the pattern.

    pattern: a glob over Case.key, or over its parts: "1B-*" is "*/1B-*". Without one, the slow
        cases stay out, and those of milliseconds.
    Raises ValueError for an op that is not registered.
    """
    registered = ops()
    for name in names:
        if name not in registered:
            raise ValueError(f"no benchmark of op {name!r}; there are {', '.join(registered)}")
    cases = [case for op in registered.values() if not names or op.name in names for case in op.cases]
    if pattern is None:
        return [case for case in cases if not case.slow and case.video != SMOKE]
    return [
        case
        for case in cases
        if fnmatch.fnmatchcase(case.key, pattern) or fnmatch.fnmatchcase(case.key, f"*/{pattern}*")
    ]


def find(key: str) -> Case:
    """The case of that key. Raises ValueError where there is none."""
    for op in ops().values():
        for case in op.cases:
            if case.key == key:
                return case
    raise ValueError(f"no benchmark case {key!r}; `python -m bench --list` prints them")


def grid(
    op: str,
    sizes: Sequence[tuple[Model, Video]],
    dtypes: Sequence[torch.dtype],
    slow: bool = False,
    passes: Sequence[bool] = (False, True),
    **extra: Any,
) -> list[Case]:
    """Every size in every dtype, forward (False) and forward + backward (True)."""
    return [
        Case(op, model, video, dtype, backward, slow, **extra)
        for model, video in sizes
        for dtype in dtypes
        for backward in passes
    ]
