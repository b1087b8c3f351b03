"""pytest-benchmark of frame_attention over the registry: `pytest bench/bench_frame_attention.py --benchmark-only`."""

import pytest

from bench import pytest_cases


@pytest.mark.parametrize(("case", "contestant"), pytest_cases.parameters("frame_attention"))
def bench_frame_attention(benchmark, case, contestant):
    pytest_cases.run(benchmark, case, contestant)
