"""The examination of one implementation on the machine at hand: errors, structure, gradients, determinism, time.

The tolerance is the one of testing.assert_close_to_reference, from an eager computation that rounds where the kernels
round. fp32 results get FP32_SLACK on top: a GPU's exp2, log2 and rsqrt err by up to two units in the last place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import examples
from .dispatch import Op
from .examples import DETERMINISTIC, Example, Values
from .testing import assert_bitwise_equal, awkward_gradients, errors_and_budget

FP32_SLACK = 4 * torch.finfo(torch.float32).eps  # of the largest exact element
REPEATS = 20  # runs that must agree bit for bit, in a thorough examination
TIMED = 5  # runs of which the median counts


class Subject(NamedTuple):
    """An implementation, and the problems that it is examined on. impl is one of op.implementations."""

    op: Op[Any]
    impl: str
    dtype: torch.dtype
    head_dim: int | None
    kind: str
    device: torch.device


class Deviation(NamedTuple):
    """The element of a result that is farthest from the fp64 reference, measured by its bound."""

    result: str
    error: float
    eager_error: float
    bound: float

    @property
    def share(self) -> float:
        """The error as a share of its bound. Beyond 1 the result is wrong."""
        return self.error / self.bound if self.bound else float("inf") if self.error else 0.0


@dataclass
class Finding:
    """The outcome of an examination. It has passed if there are no failures.

    worst: None where no result was compared. outcome: check -> "ok", "FAIL", or "-" where it does not apply.
    milliseconds: median time of a forward and backward pass of the first example.
    """

    worst: Deviation | None = None
    failures: list[str] = field(default_factory=list)
    outcome: dict[str, str] = field(default_factory=dict)
    milliseconds: float | None = None

    @property
    def passed(self) -> bool:
        """True where nothing failed."""
        return not self.failures

    def note(self, check: str, complaint: str | None) -> None:
        """Record the result of a part of a check. None stands for a part that passed."""
        if complaint is not None:
            self.failures.append(complaint)
            self.outcome[check] = "FAIL"
        elif self.outcome[check] == "-":
            self.outcome[check] = "ok"


CHECKS = ("error", "perturbation", "gradients", "determinism")


def examine(subject: Subject, thorough: bool = False, proceed: Callable[[], None] = lambda: None) -> Finding:
    """Return the finding of one subject.

    thorough: every form of upstream gradient and REPEATS runs, instead of one form and two runs.
    proceed: called between the parts; it raises to end the examination.

    An exception of the implementation is raised as it is.
    """
    finding = Finding(outcome=dict.fromkeys(CHECKS, "-"))
    cases = examples.examples(subject.op, subject.dtype, subject.head_dim, subject.device, subject.kind)
    for example in cases:
        proceed()
        found = example.run(subject.impl)
        for deviation, complaint in _compare(example, found):
            finding.note("error", complaint)
            if finding.worst is None or not deviation.share <= finding.worst.share:
                finding.worst = deviation
        others = {"perturbation": _perturbed(example, subject)}
        if subject.kind == DETERMINISTIC:
            others["gradients"] = _other_gradients(example, subject, thorough)
            others["determinism"] = _repeated(example, subject, found, REPEATS if thorough else 2)
        for check, complaints in others.items():
            for complaint in complaints:
                finding.note(check, complaint)
    proceed()
    finding.milliseconds = _milliseconds(cases[0], subject)
    return finding


def _compare(example: Example, found: Values) -> Iterator[tuple[Deviation, str | None]]:
    """Yield for each result the element that is farthest off, and a complaint where it is out of tolerance."""
    for name, ours, eager, exact in example.judged(found, example.eager(), example.exact()):
        if not ours.numel():
            continue
        error, eager_error, bound = errors_and_budget(ours, eager, exact)
        if ours.dtype == torch.float32:
            bound = bound + FP32_SLACK * exact.double().nan_to_num(0.0, 0.0, 0.0).abs().max()
        error = torch.where(exact.isinf() & (ours.double() != exact.double()), torch.inf, error)
        share = torch.where(error == 0, 0.0, error / bound)
        at = int(torch.where(share.isnan(), torch.inf, share).argmax())
        worst = Deviation(name, float(error.flatten()[at]), float(eager_error), float(bound.flatten()[at]))
        complaint = None
        if not worst.error <= worst.bound:
            complaint = (
                f"{example.name}: {name}: {int((~(error <= bound)).sum())} of {ours.numel()} elements out of "
                f"tolerance, the worst by {worst.error:.3g} where {worst.bound:.3g} is allowed (eager "
                f"{worst.eager_error:.3g})"
            )
        yield worst, complaint


def _perturbed(example: Example, subject: Subject) -> Iterator[str | None]:
    for change in example.changes():
        before, after = change.before.run(subject.impl), change.after.run(subject.impl)
        for name, index in change.unaffected.items():
            if name in before:
                yield _difference(after[name][index], before[name][index], f"{example.name}: {change.name}: {name}")


def _other_gradients(example: Example, subject: Subject, thorough: bool) -> Iterator[str | None]:
    """Compare upstream gradients of unusual strides with the same values in dense memory."""
    if not example.upstream:
        return
    name, gradient = next(iter(example.upstream.items()))
    if not gradient.dim():
        return
    for form, strided in awkward_gradients(gradient.shape, gradient.dtype, device=gradient.device):
        if not thorough and form != "transposed":
            continue
        dense, given = ({**example.upstream, name: g} for g in (strided.contiguous(), strided))
        expected, found = (example.replace(upstream).run(subject.impl) for upstream in (dense, given))
        for leaf in example.leaves:
            result = f"d{leaf}"
            yield _difference(found[result], expected[result], f"{example.name}: gradient {form}: {result}")


def _repeated(example: Example, subject: Subject, first: Values, runs: int) -> Iterator[str | None]:
    for _ in range(runs - 1):
        again = example.run(subject.impl)
        for name in first:
            yield _difference(again[name], first[name], f"{example.name}: second run: {name}")


def _difference(actual: Tensor, expected: Tensor, name: str) -> str | None:
    try:
        assert_bitwise_equal(actual, expected, name)
    except AssertionError as error:
        return str(error)
    return None


def _milliseconds(example: Example, subject: Subject) -> float:
    seconds = []
    for _ in range(TIMED):
        _synchronize(subject.device)
        start = time.perf_counter()
        example.run(subject.impl)
        _synchronize(subject.device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def subjects(op: Op[Any], impl: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> list[Subject]:
    """Return every subject of an implementation, whether it runs here or not."""
    return [
        Subject(op, impl, dtype, head_dim, kind, device)
        for dtype in dtypes
        for head_dim in (examples.head_dims(op) or (None,))
        for kind in examples.kinds(op, impl)
    ]
