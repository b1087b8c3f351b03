"""pytest-benchmark of mm_rope over the registry: `pytest bench/bench_mm_rope.py --benchmark-only`."""

import pytest

from bench import pytest_cases


@pytest.mark.parametrize(("case", "contestant"), pytest_cases.parameters("mm_rope"))
def bench_mm_rope(benchmark, case, contestant):
    pytest_cases.run(benchmark, case, contestant)
