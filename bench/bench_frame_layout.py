"""pytest-benchmark of frame_layout over the registry: `pytest bench/bench_frame_layout.py --benchmark-only`."""

import pytest

from bench import pytest_cases


@pytest.mark.parametrize(("case", "contestant"), pytest_cases.parameters("frame_layout"))
def bench_frame_layout(benchmark, case, contestant):
    pytest_cases.run(benchmark, case, contestant)
