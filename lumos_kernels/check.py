"""Compare every implementation with its reference on this machine: `python -m lumos_kernels.check`.

Each row is one implementation at a dtype, head size and kind of backward, over the op's examples:

    ours, eager, bound   the error of the worst element against fp64, the largest error of an eager computation that
                         rounds where the kernels round, and the most that ours may be
    perturbation         a change of what must not matter leaves the results equal bit for bit
    gradients            upstream gradients of unusual strides give what dense ones give, bit for bit
    determinism          repeated runs are equal bit for bit
    ms                   median time of a forward and backward pass of the first example

On a GPU the verdicts are kept for "auto" (docs/gpus.md). The status is 1 if anything failed, 2 if nothing could run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import battery, dispatch, self_check
from .battery import CHECKS, Finding, Subject
from .dispatch import Problem
from .errors import dtype_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK_DTYPES = (torch.bfloat16, torch.float32)
QUICK_HEAD_DIMS = (64, 128, None)
WITHOUT_EXAMPLES = ("frame_layout",)  # integers, which its tests compare exactly

COLUMNS = ("op", "impl", "device", "dtype", "head", "backward", "ours", "eager", "bound", *CHECKS[1:], "ms", "result")
WIDTHS = (16, 9, 6, 8, 4, 13, 8, 8, 8, 12, 9, 11, 7, 6)


class Refused(NamedTuple):
    """An implementation that runs on no device of this machine, and why."""

    op: str
    impl: str
    reason: str


def devices() -> list[torch.device]:
    """Return the CPU and, where there is one, the current GPU."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", torch.cuda.current_device()))
    return found


def plan(ops: Sequence[str], impls: Sequence[str], quick: bool) -> Iterator[Subject | Refused]:
    """Yield what is to be examined, and which implementations cannot be."""
    for name in ops:
        op = dispatch.ops()[name]
        for impl in op.implementations:
            if impl not in impls if impls else impl == "reference":
                continue
            refusals = [(subject, op.refusal(impl, problem_of(subject))) for subject in _subjects(op, impl, quick)]
            able = [subject for subject, reason in refusals if reason is None]
            yield from able
            if not able:
                yield Refused(name, impl, refusals[-1][1] or "")


def _subjects(op: dispatch.Op[Any], impl: str, quick: bool) -> Iterator[Subject]:
    for device in devices():
        for subject in battery.subjects(op, impl, QUICK_DTYPES if quick else DTYPES, device):
            if not quick or subject.head_dim in QUICK_HEAD_DIMS:
                yield subject


def problem_of(subject: Subject) -> Problem:
    """Return the problem that a subject stands for."""
    return Problem.of(torch.empty(0, dtype=subject.dtype, device=subject.device), subject.head_dim)


def run(subject: Subject, thorough: bool) -> Finding:
    """Examine a subject. An exception of the implementation is a failure. On a GPU the verdict is kept."""
    try:
        finding = battery.examine(subject, thorough)
    except Exception as error:
        finding = Finding(failures=[f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"])
        if isinstance(error, torch.OutOfMemoryError):
            return finding
    if is_gpu(subject.device):
        problem = problem_of(subject)
        name = self_check.title(subject.op, subject.impl, problem, subject.kind)
        self_check.keep(self_check.file_name(problem.gpu), problem.gpu, {name: self_check.judge(finding)})
    return finding


def is_gpu(device: torch.device) -> bool:
    """Return whether verdicts on the device are kept."""
    return device.type == "cuda"


def cells(subject: Subject, finding: Finding) -> list[str]:
    """Return the row of a table."""
    worst, milliseconds = finding.worst, finding.milliseconds
    errors = ("-",) * 3 if worst is None else (f"{x:.1e}" for x in (worst.error, worst.eager_error, worst.bound))
    return [
        subject.op.name,
        subject.impl,
        subject.device.type,
        dtype_name(subject.dtype),
        str(subject.head_dim or "-"),
        subject.kind,
        *errors,
        *(finding.outcome.get(check, "-") for check in CHECKS[1:]),
        "-" if milliseconds is None else f"{milliseconds:.2f}",
        "ok" if finding.passed else "FAIL",
    ]


def line(row: Sequence[str]) -> str:
    """Return the cells in columns."""
    return " ".join(cell.ljust(width) for cell, width in zip(row, WIDTHS, strict=True)).rstrip()


def check(ops: Sequence[str], impls: Sequence[str] = (), quick: bool = False) -> int:
    """Examine implementations and print a table. Return 0, 1 if anything failed, or 2 if nothing could run.

    ops: names of ops. impls: names of implementations, by default all but the reference.
    """
    print(line(COLUMNS))
    refused: list[Refused] = []
    failed: list[str] = []
    examined = 0
    for item in plan(ops, impls, quick):
        if isinstance(item, Refused):
            refused.append(item)
            continue
        finding = run(item, thorough=not quick)
        examined += 1
        print(line(cells(item, finding)), flush=True)
        failed += [f"{item.op.name} {item.impl} {dtype_name(item.dtype)}: {failure}" for failure in finding.failures]
        if finding.failures and self_check.device_is_lost(item.device):
            failed.append("the GPU context is lost: nothing after this was examined")
            break
    for item in refused:
        print(f"not run: {item.op} {item.impl}: {item.reason}")
    for failure in failed:
        print(f"FAIL {failure}")
    if not examined:
        print("nothing could be examined", file=sys.stderr)
        return 2
    print(f"{examined} examined, {'all right' if not failed else f'{len(failed)} failures'}")
    return 1 if failed else 0


def checkable() -> list[str]:
    """Return the names of the ops that have examples."""
    return [name for name in dispatch.ops() if name not in WITHOUT_EXAMPLES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check` to a parser."""
    parser.add_argument("--op", dest="ops", action="append", choices=checkable(), help="only this op (may be repeated)")
    impls = sorted({impl for op in dispatch.ops().values() for impl in op.implementations})
    parser.add_argument("--impl", dest="impls", action="append", choices=impls, help="only this implementation")
    parser.add_argument("--quick", action="store_true", help="two dtypes, two head sizes, two runs: seconds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m lumos_kernels.check",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    return check(options.ops or checkable(), options.impls or (), options.quick)


if __name__ == "__main__":
    sys.exit(main())
