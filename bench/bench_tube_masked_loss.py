"""pytest-benchmark of tube_masked_loss over the registry: `pytest bench/bench_tube_masked_loss.py --benchmark-only`."""

import pytest

from bench import pytest_cases


@pytest.mark.parametrize(("case", "contestant"), pytest_cases.parameters("tube_masked_loss"))
def bench_tube_masked_loss(benchmark, case, contestant):
    pytest_cases.run(benchmark, case, contestant)
