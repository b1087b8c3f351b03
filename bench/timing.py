"""Times calls against each other: clocks for CPUs and GPUs, rounds in which the calls alternate."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

MIN_SAMPLE = 2e-3  # seconds: shorter calls are repeated within a sample, the clock and Python's noise stay below 1 %
MIN_ROUNDS, MAX_ROUNDS = 3, 200
CACHE_BYTES = 256 * 2**20  # written between samples on a GPU: more than any last-level cache
HEAD_START_CYCLES = 4_000_000  # about 2 ms: three times what the host takes to enqueue a forward and a backward pass
LONGEST_HEAD_START = 20e-3  # seconds: a host that takes longer waits for the device, or enqueues a whole step


class Clock(Protocol):
    """Seconds of `repeats` calls, together. An attribute min_sample replaces MIN_SAMPLE."""

    def __call__(self, call: Callable[[], Any], repeats: int) -> float: ...


def cpu_clock(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


class CudaClock:
    """CUDA events around each call, after a write that empties the cache.

    The device sleeps while the host enqueues the call: what is timed is the device's work, as in a training step whose
    host runs ahead, and not Python. The host's time is measured with every sample. Where it exceeds the sleep, the
    sample is taken again behind a longer one. A call that makes the host wait for the device still pays for it.
    """

    min_sample = 2e-4  # events have a resolution of half a microsecond, and Python is not in the figure

    def __init__(self) -> None:
        self.cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        torch.cuda._sleep(HEAD_START_CYCLES)  # raises the clock
        self.cycle = self._sample(lambda: torch.cuda._sleep(HEAD_START_CYCLES), 0)[0] / HEAD_START_CYCLES

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        return sum(self._covered(call) for _ in range(repeats))

    def _covered(self, call: Callable[[], Any]) -> float:
        """Return the device's seconds of a call, with a sleep before it that is longer than the host needs."""
        cycles = HEAD_START_CYCLES
        while True:
            seconds, host = self._sample(call, cycles)
            head_start = cycles * self.cycle
            if host < head_start or max(host, 2 * head_start) > LONGEST_HEAD_START:
                return seconds
            cycles *= 2

    def _sample(self, call: Callable[[], Any], cycles: int) -> tuple[float, float]:
        """Return (seconds between the events around the call, seconds of the host until the call was enqueued)."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        torch.cuda._sleep(cycles)
        begin = time.perf_counter()
        start.record()
        call()
        end.record()
        host = time.perf_counter() - begin
        end.synchronize()
        return start.elapsed_time(end) * 1e-3, host


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else cpu_clock


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    clock: Clock = cpu_clock,
    min_rounds: int = MIN_ROUNDS,
    slow: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds a call of each, round by round; every round begins with another one, so that nobody owns a place.

    seconds: about how long to go on; at least min_rounds, which slow calls may take longer than.
    slow: a call whose warm-up takes longer than so many seconds has that as its only sample.
    """
    warm_up = {name: clock(call, 1) for name, call in calls.items()}
    samples = {name: [once] if once > slow else [] for name, once in warm_up.items()}
    names = [name for name in calls if not samples[name]]
    repeats = {name: _repeats(calls[name], clock, warm_up[name]) for name in names}
    spent, rounds = 0.0, 0
    gc.collect()
    while names and rounds < MAX_ROUNDS and (rounds < min_rounds or spent < seconds):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            samples[name].append(clock(calls[name], repeats[name]) / repeats[name])
            spent += time.perf_counter() - begin  # what a clock does besides counts too
        rounds += 1
    return samples


def _repeats(call: Callable[[], Any], clock: Clock, warm_up: float) -> int:
    """Calls in a sample; a warm-up that is long enough was their calibration."""
    shortest = getattr(clock, "min_sample", MIN_SAMPLE)
    if warm_up >= 10 * shortest:
        return 1
    return max(1, math.ceil(shortest / max(clock(call, 1), 1e-9)))


def interquartile_range(times: list[float]) -> float:
    """Between the quartiles of the samples; 0 for one sample."""
    if len(times) < 2:
        return 0.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return third - first
