"""pytest-benchmark of masked_sample over the registry: `pytest bench/bench_masked_sample.py --benchmark-only`."""

import pytest

from bench import pytest_cases


@pytest.mark.parametrize(("case", "contestant"), pytest_cases.parameters("masked_sample"))
def bench_masked_sample(benchmark, case, contestant):
    pytest_cases.run(benchmark, case, contestant)
