"""The examination of one implementation on the machine at hand: errors, structure, gradients, determinism, time.

The tolerance is the one of testing.assert_close_to_reference, from an eager computation that rounds where the kernels
round. That runs on the CPU, where no TF32 loosens it. fp32 results get FP32_SLACK on top: a GPU's exp2, log2 and rsqrt
err by up to two units in the last place. Half-precision results whose rows are all much alike (Example.even) are also
compared row by row, by the root of their mean square error: a small error in a few rows hides below the tolerance of an
element, which comes from the largest elements of the whole tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
QUICK_FORMS = ("expanded from one element", "transposed", "every second row")  # of upstream gradients
CPU = torch.device("cpu")

# A row's relative error may be twice the larger of its eager error and ROW_SPREAD times the eager median. Rows whose
# eager error is beyond UNEVEN times the median lose digits to cancellation, and the elements' tolerance is enough.
ROW_SPREAD = 2.0
UNEVEN = 3.0


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


def examine(
    subject: Subject, thorough: bool = False, timed: bool = False, proceed: Callable[[], None] = lambda: None
) -> Finding:
    """Return the finding of one subject.

    thorough: every form of upstream gradient, REPEATS runs and int64 offsets, which tensors of 2^31 elements need and a
        GPU compiles kernels of their own for, instead of QUICK_FORMS and two runs.
    timed: measure Finding.milliseconds too, which waits for all work on the device.
    proceed: called between the parts; it raises to end the examination.

    An exception of the implementation is raised as it is.
    """
    with _without_tf32():
        return _examine(subject, thorough, timed, proceed)


def _examine(subject: Subject, thorough: bool, timed: bool, proceed: Callable[[], None]) -> Finding:
    finding = Finding(outcome=dict.fromkeys(CHECKS, "-"))
    cases = examples.examples(subject.op, subject.dtype, subject.head_dim, subject.device, subject.kind)
    cases = [example.fitted(subject.impl, int64=thorough) for example in cases]
    for example in cases:
        proceed()
        found = example.run(subject.impl)
        misshapen = list(_misshapen(example, found))
        if misshapen:
            finding.note("error", misshapen[0])
            continue
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
    if timed:
        proceed()
        finding.milliseconds = _milliseconds(cases[0], subject)
    return finding


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute fp32 matmuls in fp32 for a while. The setting is the process's: other threads are slower meanwhile."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer of torch's two interfaces, which do not mix
        settings = torch.backends.cuda.matmul
        newer, settings.fp32_precision = settings.fp32_precision, "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = newer
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _misshapen(example: Example, found: Values) -> Iterator[str]:
    """Yield a complaint for each result that has not the reference's shape and dtype."""
    for name, like in dataclasses.replace(example.on(CPU), kind=DETERMINISTIC).run("reference").items():
        ours, expected = ((x.dtype, list(x.shape)) for x in (found[name], like))
        if ours != expected:
            yield f"{example.name}: {name} is {ours[0]} {ours[1]} instead of {expected[0]} {expected[1]}"


def _compare(example: Example, found: Values) -> Iterator[tuple[Deviation, str | None]]:
    """Yield for each result the element that is farthest off, and a complaint where it is out of tolerance."""
    device = next(iter(found.values())).device
    yardstick = {name: value.to(device) for name, value in example.on(CPU).eager().items()}
    for name, ours, eager, exact in example.judged(found, yardstick, example.exact()):
        if not ours.numel():
            continue
        if name in example.even and ours.dtype.itemsize == 2:
            yield _compare_rows(f"{example.name}: {name}", name, ours, eager, exact)
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


def _compare_rows(title: str, name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> tuple[Deviation, str | None]:
    """Return the row that is farthest off, by the root of its mean square error relative to the exact row."""
    high = exact.double()
    size = high.square().mean(-1).sqrt()
    rows = size > 0
    if not rows.any():
        return Deviation(f"{name} rows", 0.0, 0.0, 0.0), None
    error, eager_error = (
        torch.where(rows, (x.double() - high).square().mean(-1).sqrt() / size, 0.0) for x in (ours, eager)
    )
    usual = eager_error[rows].median()
    bound = 2 * torch.maximum(eager_error, ROW_SPREAD * usual)
    share = torch.where(rows & (eager_error <= UNEVEN * usual), error / bound, 0.0).nan_to_num(torch.inf)
    at = int(share.argmax())
    worst = Deviation(f"{name} rows", *(float(x.flatten()[at]) for x in (error, eager_error, bound)))
    wrong = int((share > 1).sum())
    if not wrong:
        return worst, None
    return worst, f"{title}: {wrong} of {share.numel()} rows off by {worst.error:.3g}, {worst.bound:.3g} is allowed"


def _perturbed(example: Example, subject: Subject) -> Iterator[str | None]:
    for change in example.changes():
        before, after = change.before.run(subject.impl), change.after.run(subject.impl)
        for name, index in change.unaffected.items():
            if name in before:
                yield _difference(after[name][index], before[name][index], f"{example.name}: {change.name}: {name}")


def _other_gradients(example: Example, subject: Subject, thorough: bool) -> Iterator[str | None]:
    """Compare upstream gradients of unusual strides with the same values in dense memory."""
    for name, gradient in example.upstream.items():
        if not gradient.dim() or not gradient.numel():
            continue
        for form, strided in awkward_gradients(gradient.shape, gradient.dtype, device=gradient.device):
            if not thorough and form not in QUICK_FORMS:
                continue
            dense, given = ({**example.upstream, name: g} for g in (strided.contiguous(), strided))
            expected, found = (example.replace(upstream).run(subject.impl) for upstream in (dense, given))
            for leaf in example.leaves:
                result = f"d{leaf}"
                title = f"{example.name}: gradient of {name} {form}: {result}"
                yield _difference(found[result], expected[result], title)


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
