"""What the bench_*.py files share: registry cases as pytest-benchmark parameters."""

from __future__ import annotations

import functools

import pytest
import torch

from bench import measure, registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(op: str) -> list:
    """A pytest.param(case, contestant name) for everything that runs here, the slow cases left out."""
    bench = registry.ops()[op]
    return [
        pytest.param(case, contestant.name, id=f"{case.key.split('/', 1)[1]}-{contestant.name.replace(' ', '_')}")
        for case in registry.select([op])
        for contestant in bench.contestants(case, DEVICE)
    ]


@functools.lru_cache(maxsize=1)
def _checked(case_key: str) -> tuple[registry.Inputs, dict[str, tuple[float, float]]]:
    case = registry.find(case_key)
    bench = registry.ops()[case.op]
    verdicts = measure.check(bench, case, bench.contestants(case, DEVICE), DEVICE)
    return bench.build(case, DEVICE, case.dtype), verdicts


def run(benchmark, case: registry.Case, name: str) -> None:
    """Times one contestant of a case, after it agreed with the reference."""
    inputs, verdicts = _checked(case.key)
    error, limit = verdicts.get(name, (0.0, 0.0))
    assert error <= limit, f"{name} is wrong: relative error {error:.1e}, allowed {limit:.1e}"
    bench = registry.ops()[case.op]
    contestant = next(c for c in bench.contestants(case, DEVICE) if c.name == name)
    own = measure.prepared(contestant, inputs)

    def call() -> None:
        measure.once(contestant, own)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.key
    benchmark.extra_info.update(contestant=name, error=error, work=(contestant.work or bench.work)(case).amount)
    benchmark(call)
