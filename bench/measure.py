"""Checks the contestants of a case against the reference, then times them against each other.

The contestants alternate round by round on the same inputs, so that a slow minute of the machine hits all of them, and
the ratio between two is the median of their ratios within a round. Who computes something else gets no figure.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import memory, timing
from bench.environment import available_memory
from bench.registry import CEILING, DTYPE_NAMES, OURS, Case, Contestant, Inputs, OpBench, ops

SLOW_CALL = 5.0  # seconds: one of a longer call is sampled once, unless the case is known as slow
MEMORY_SHARE = 0.8  # of the free memory that a contestant may ask for


@dataclass
class Row:
    """One contestant's result. Figures are None unless status is "ok"; a ceiling has no error.

    status: "ok", "wrong", "failed" (a rival raised: reason says what), "no memory" or "missing" (not installed).
    median_s, min_s, iqr_s: seconds of a call, the median, the smallest and the interquartile range of the samples.
    rate: GB/s or GFLOP/s of useful work. ratio: how many times as long as the best of ours it takes.
    of_ceiling: its share of the fastest ceiling's rate. peak_extra_bytes: beyond the inputs.
    error, limit: relative L2 error of the worst output or gradient, and what it may be.
    """

    contestant: str
    role: str
    status: str = "ok"
    reason: str = ""
    median_s: float | None = None
    min_s: float | None = None
    iqr_s: float | None = None
    samples: int = 0
    rate: float | None = None
    ratio: float | None = None
    of_ceiling: float | None = None
    peak_extra_bytes: int | None = None
    error: float | None = None
    limit: float | None = None


def prepared(contestant: Contestant, inputs: Inputs) -> Inputs:
    return contestant.prepare(inputs) if contestant.prepare else inputs


def once(contestant: Contestant, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs and, where the inputs have leaves, their gradients."""
    if not inputs.leaves:
        with torch.no_grad():
            return contestant.run(inputs)
    outputs = contestant.run(inputs)
    grads = torch.autograd.grad(outputs, inputs.leaves, inputs.upstream)
    return (*(output.detach() for output in outputs), *grads)


def relative_errors(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """|actual - exact| / |exact| in the L2 norm, tensor by tensor. A shape that differs is an infinite error."""

    def one(a: Tensor, b: Tensor) -> float:
        if a.shape != b.shape:
            return math.inf
        if not b.is_floating_point():
            a, b = a.double(), b.double()
        norm = float(torch.linalg.vector_norm(b, dtype=torch.float64))
        return float(torch.linalg.vector_norm(a.to(b.dtype) - b, dtype=torch.float64)) / (norm or 1.0)

    if len(actual) != len(exact):
        return [math.inf] * len(exact)
    return [one(a, b) for a, b in zip(actual, exact, strict=True)]


def error_limits(yardstick: list[float], dtype: torch.dtype) -> list[float]:
    """Twice the error of the same mathematics run eagerly in dtype, plus two units in the last place: the yardstick's
    scalar loss may happen to be exact. A yardstick that is itself off by more than 16 units sets no tolerance.
    """
    eps = torch.finfo(dtype).eps
    if not all(error <= 16 * eps for error in yardstick):
        raise ValueError(f"the yardstick itself is wrong: relative errors {yardstick} in {DTYPE_NAMES[dtype]}")
    return [2 * error + 2 * eps for error in yardstick]


def check(
    bench: OpBench,
    case: Case,
    contestants: list[Contestant],
    device: str,
    failed: dict[str, str] | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[float, float]]:
    """(error, limit) of each contestant that is no ceiling, against the reference in the next wider dtype.

    failed: collects what a contestant raised, by name; without it the exception goes to the caller.
    announce: told each contestant's name before it runs, so that a caller can tell who took the process down.
    """
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    announce("reference")
    exact = once(Contestant("reference", bench.reference), bench.build(case, device, wide))
    inputs = bench.build(case, device, case.dtype)
    checked = [contestant for contestant in contestants if contestant.role != CEILING]
    checked.sort(key=lambda contestant: contestant.name != bench.yardstick)  # it sets the others' limits
    errors: dict[str, list[float]] = {}
    for contestant in checked:
        announce(contestant.name)
        with _collected(failed, contestant.name):
            errors[contestant.name] = relative_errors(once(contestant, prepared(contestant, inputs)), exact)
    if bench.yardstick not in errors:
        raise RuntimeError(f"the yardstick {bench.yardstick!r} failed: {(failed or {}).get(bench.yardstick)}")
    limits = error_limits(errors[bench.yardstick], case.dtype)
    slack = {contestant.name: contestant.slack for contestant in checked}

    def share(pair: tuple[float, float]) -> float:
        return math.inf if math.isnan(pair[0]) else pair[0] / pair[1]

    return {
        name: max(((error, slack[name] * limit) for error, limit in zip(own, limits, strict=True)), key=share)
        for name, own in errors.items()
    }


@contextlib.contextmanager
def _collected(failed: dict[str, str] | None, name: str) -> Iterator[None]:
    """Puts what is raised inside into failed[name]. Where the device itself is lost, it goes on to the caller."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        error.__traceback__ = None  # it holds the tensors of the call
    if failed is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_case(
    case: Case,
    device: str = "cpu",
    seconds: float = 5.0,
    threads: int | None = None,
    with_memory: bool = True,
    contestants: list[Contestant] | None = None,
    tolerant: bool = False,
    announce: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Rows of all contestants of a case (by default those of the registry): checked, timed, their peak memory taken.

    tolerant: a contestant that raises gets the status "failed" instead of ending the measurement.
    announce: see check.
    """
    bench, threads = ops()[case.op], threads or torch.get_num_threads()
    contestants = bench.contestants(case, device) if contestants is None else contestants
    rows = {contestant.name: Row(contestant.name, contestant.role) for contestant in contestants}
    free = available_memory(device)
    for contestant in contestants:
        if free is not None and contestant.memory(case) > MEMORY_SHARE * free:
            row = rows[contestant.name]
            row.status = "no memory"
            row.reason = f"needs about {contestant.memory(case) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    failed: dict[str, str] | None = {} if tolerant else None
    with timing.torch_threads(threads):
        _check_rows(bench, case, device, contestants, rows, failed, announce)
        calls = _calls(bench, case, device, [c for c in contestants if rows[c.name].status == "ok"], failed, announce)
        for name, reason in (failed or {}).items():
            rows[name].status, rows[name].reason = "failed", reason
        announce("timing")
        slow = math.inf if case.slow else SLOW_CALL
        samples = _timed(calls, seconds, slow, timing.clock_for(device), failed, rows)
    running = [contestant for contestant in contestants if contestant.name in calls]
    _fill(bench, case, running, rows, samples)
    if with_memory:
        _fill_memory(case, device, threads, [c.name for c in running if c.role != CEILING], calls, rows, announce)
    return list(rows.values())


class _Raised(Exception):
    """A contestant raised while it was timed: its name; the cause is chained."""


def _timed(
    calls: dict[str, Callable[[], Any]],
    seconds: float,
    slow: float,
    clock: timing.Clock,
    failed: dict[str, str] | None,
    rows: dict[str, Row],
) -> dict[str, list[float]]:
    """Samples of the calls. Where that is tolerated, one that raises (out of memory beside the others) leaves the
    calls, and the others begin again.
    """
    if failed is None:
        return timing.interleave(calls, seconds, clock, slow=slow)

    def named(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                return call()
            except Exception as error:
                raise _Raised(name) from error

        return run

    while True:
        try:
            named_calls = {name: named(name, call) for name, call in calls.items()}
            return timing.interleave(named_calls, seconds, clock, slow=slow)
        except _Raised as raised:
            [name], cause = raised.args, raised.__cause__
            with _collected(failed, name):
                raise cause from None
            rows[name].status, rows[name].reason = "failed", failed[name]
            del calls[name], raised, cause


def _calls(
    bench: OpBench,
    case: Case,
    device: str,
    contestants: list[Contestant],
    failed: dict[str, str] | None,
    announce: Callable[[str], None],
) -> dict[str, Callable[[], Any]]:
    """A call of each contestant on the same inputs, what the caller keeps between calls prepared."""
    inputs = bench.build(case, device, case.dtype)
    calls = {}
    for contestant in contestants:
        announce(contestant.name)
        with _collected(failed, contestant.name):
            calls[contestant.name] = functools.partial(once, contestant, prepared(contestant, inputs))
            if failed is not None and contestant.role == CEILING:  # the others ran when they were checked
                calls[contestant.name]()
    return {name: call for name, call in calls.items() if name not in (failed or {})}


def _check_rows(
    bench: OpBench,
    case: Case,
    device: str,
    contestants: list[Contestant],
    rows: dict[str, Row],
    failed: dict[str, str] | None,
    announce: Callable[[str], None],
) -> None:
    """Fills error and limit, and takes the figures away from those that compute something else."""
    able = [contestant for contestant in contestants if rows[contestant.name].status == "ok"]
    for name, (error, limit) in check(bench, case, able, device, failed, announce).items():
        row = rows[name]
        row.error, row.limit = error, limit
        if not error <= limit:  # NaN fails too
            row.status, row.reason = "wrong", f"relative error {error:.1e} against the reference, allowed {limit:.1e}"
    for name, reason in (failed or {}).items():
        rows[name].status, rows[name].reason = "failed", reason


def _fill(
    bench: OpBench,
    case: Case,
    running: list[Contestant],
    rows: dict[str, Row],
    samples: dict[str, list[float]],
) -> None:
    """Times, rates, and the ratios to the best of ours and to the fastest ceiling: medians of ratios in a round."""
    for contestant in running:
        row, times = rows[contestant.name], samples[contestant.name]
        row.median_s, row.min_s, row.samples = statistics.median(times), min(times), len(times)
        row.iqr_s = timing.interquartile_range(times)
        row.rate = (contestant.work or bench.work)(case).rate(row.median_s)
    best = next((c.name for c in running if c.role == OURS), None)
    ceilings = [c for c in running if c.role == CEILING]
    ceiling = max(ceilings, key=lambda c: rows[c.name].rate, default=None)
    for contestant in running:
        name, row = contestant.name, rows[contestant.name]
        if best is not None and contestant.role != CEILING:
            row.ratio = _paired_ratio(samples[name], samples[best])
        if ceiling is not None:
            shares = ((c.work or bench.work)(case).amount for c in (contestant, ceiling))
            row.of_ceiling = next(shares) / next(shares) / _paired_ratio(samples[name], samples[ceiling.name])


def _fill_memory(
    case: Case,
    device: str,
    threads: int,
    names: list[str],
    calls: Mapping[str, Callable[[], Any]],
    rows: Mapping[str, Row],
    announce: Callable[[str], None],
) -> None:
    if device == "cpu":
        announce("memory")
        for name, peak in memory.contestant_peaks(case.key, names, threads).items():
            rows[name].peak_extra_bytes = peak
        return
    for name in names:
        announce(name)
        rows[name].peak_extra_bytes = memory.cuda_peak(calls[name])


def _paired_ratio(times: list[float], others: list[float]) -> float:
    """Round by round; one that is slow has a single sample, taken next before the first round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=False))
