"""The clock of a GPU on a pretended one: what is timed, and what the host's time costs."""

import time

import pytest
import torch

from bench import timing


class FakeGpu:
    """Counts the microseconds of the device and of the host."""

    def __init__(self, monkeypatch, host_us=0):
        self.now, self.log, self.host, self.host_us = 0.0, [], 0.0, host_us
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now
                gpu.log.append("event")

            def synchronize(self):
                gpu.log.append("wait")

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(f"sleep {cycles}", cycles / 2000))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(
            torch, "empty", lambda *_, **__: type("Cache", (), {"zero_": lambda _: self.work("flush", 100)})()
        )

    def work(self, what, us):
        self.now += us
        self.log.append(what)

    def call(self):
        self.work("call", 44)
        self.host += self.host_us * 1e-6


def test_the_gpu_clock_times_the_call_alone_behind_a_cold_cache_and_a_head_start(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    clock = timing.CudaClock()
    assert clock.cycle == pytest.approx(0.5e-9)
    gpu.log.clear()
    assert clock(gpu.call, 3) == pytest.approx(3 * 44e-6)
    assert gpu.log == ["flush", f"sleep {timing.HEAD_START_CYCLES}", "event", "call", "event", "wait"] * 3


@pytest.mark.parametrize(("host_us", "sleeps"), [(1000, [1]), (3000, [1, 2]), (7000, [1, 2, 4]), (500_000, [1])])
def test_the_head_start_covers_the_hosts_time(monkeypatch, host_us, sleeps):
    gpu = FakeGpu(monkeypatch, host_us)
    clock = timing.CudaClock()
    gpu.log.clear()
    clock(gpu.call, 1)
    assert [word for word in gpu.log if word.startswith("sleep")] == [
        f"sleep {factor * timing.HEAD_START_CYCLES}" for factor in sleeps
    ]


def test_a_measurement_ends_with_the_time_that_passes_not_with_the_time_that_it_reports():
    def clock(call, repeats):
        time.sleep(0.02)  # flushing, sleeping, waiting
        return 1e-6 * repeats

    start = time.monotonic()
    timing.interleave({"a": lambda: None, "b": lambda: None}, seconds=0.2, clock=clock)
    assert time.monotonic() - start < 2
