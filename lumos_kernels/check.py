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
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import battery, cache, dispatch, examples, self_check
from .battery import CHECKS, Finding, Subject
from .dispatch import Problem
from .errors import dtype_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK_DTYPES = (torch.bfloat16, torch.float32)
QUICK_HEAD_DIMS = (64, 128)
WITHOUT_EXAMPLES = ("frame_layout",)  # integers, which its tests compare exactly

COLUMNS = ("op", "impl", "device", "dtype", "head", "backward", "ours", "eager", "bound", *CHECKS[1:], "ms", "result")
WIDTHS = (16, 9, 6, 8, 4, 13, 8, 8, 8, 12, 9, 11, 7, 6)


class Refused(NamedTuple):
    """An implementation that runs on no device of this machine, and why."""

    op: str
    impl: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The subjects that are wanted. Empty tuples stand for all; `quick` narrows dtypes and head sizes."""

    ops: tuple[str, ...] = ()
    impls: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: tuple[int, ...] = ()
    quick: bool = False

    def subjects(self, op: dispatch.Op[Any], impl: str) -> Iterator[Subject]:
        """Yield what is wanted of an implementation, whether it runs here or not."""
        head_dims: tuple[int | None, ...] = examples.head_dims(op) or (None,)
        if head_dims != (None,):
            head_dims = self.head_dims or (QUICK_HEAD_DIMS if self.quick else head_dims)
        for device in devices():
            for dtype in self.dtypes or (QUICK_DTYPES if self.quick else DTYPES):
                for head_dim in head_dims:
                    for kind in examples.kinds(op, impl):
                        yield Subject(op, impl, dtype, head_dim, kind, device)


def devices() -> list[torch.device]:
    """Return the CPU and one GPU of each model."""
    gpus = {self_check.file_name(number): number for number in reversed(range(torch.cuda.device_count()))}
    return [torch.device("cpu"), *(torch.device("cuda", number) for number in sorted(gpus.values()))]


def plan(selection: Selection) -> Iterator[Subject | Refused]:
    """Yield what is to be examined, and which implementations cannot be."""
    for name in selection.ops or checkable():
        op = dispatch.ops()[name]
        for impl in op.implementations:
            if impl not in selection.impls if selection.impls else impl == "reference":
                continue
            refusals = [(subject, op.refusal(impl, problem_of(subject))) for subject in selection.subjects(op, impl)]
            able = [subject for subject, reason in refusals if reason is None]
            yield from able
            if not able:
                yield Refused(name, impl, refusals[-1][1] or "")


def problem_of(subject: Subject) -> Problem:
    """Return the problem that a subject stands for."""
    return Problem.of(torch.empty(0, dtype=subject.dtype, device=subject.device), subject.head_dim)


def run(subject: Subject, thorough: bool) -> Finding:
    """Examine a subject. An exception of the implementation is a failure.

    On a GPU the verdict is kept, but not that of an exception: its cause may be mended.
    """
    lasts = True
    try:
        finding = battery.examine(subject, thorough, timed=True)
    except Exception as error:
        finding = Finding(failures=[self_check.said(error)])
        lasts = self_check.device_is_lost(subject.device)
    if lasts and is_gpu(subject.device):
        problem = problem_of(subject)
        name = self_check.title(subject.op, subject.impl, problem, subject.kind)
        with cache.locked(self_check.file_name(problem.gpu)):
            self_check.keep(problem.gpu, {name: self_check.judge(finding)})
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


def check(selection: Selection) -> int:
    """Examine implementations and print a table. Return 0, 1 if anything failed, or 2 if nothing could run."""
    print(line(COLUMNS))
    refused: list[Refused] = []
    failed: list[str] = []
    examined = 0
    for item in plan(selection):
        if isinstance(item, Refused):
            refused.append(item)
            continue
        finding = run(item, thorough=not selection.quick)
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
    """Add the options of the command to a parser: the fields of a Selection."""
    impls = sorted({impl for op in dispatch.ops().values() for impl in op.implementations})
    add = functools.partial(parser.add_argument, action="append", default=[])
    add("--op", dest="ops", choices=checkable(), help="only this op (each of these options may be repeated)")
    add("--impl", dest="impls", choices=impls, help="only this implementation")
    add("--dtype", dest="dtypes", choices=[dtype_name(dtype) for dtype in DTYPES], help="only this dtype")
    add("--head-dim", dest="head_dims", type=int, metavar="D", help="only this head size")
    parser.add_argument("--quick", action="store_true", help="two dtypes, two head sizes, two runs: seconds on a CPU")


def command(ops: list[str], impls: list[str], dtypes: list[str], head_dims: list[int], quick: bool) -> int:
    """Run `check` with the options of add_arguments."""
    chosen = tuple(dtype for dtype in DTYPES if dtype_name(dtype) in dtypes)
    return check(Selection(tuple(ops), tuple(impls), chosen, tuple(head_dims), quick))


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
    return command(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
