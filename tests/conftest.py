"""Settings every test shares."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow too (`make test-all`)")


def pytest_collection_modifyitems(config, items):
    def deselect(marker):
        dropped = [item for item in items if item.get_closest_marker(marker)]
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=dropped)

    # The longest single tests first, so that no process waits for another's at the end.
    items.sort(key=lambda item: not item.path.name.startswith("test_triton"))
    if not config.getoption("--all"):
        deselect("slow")
    if not torch.cuda.is_available():
        deselect("gpu")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """torch's pool of one thread: on shared cores the barriers of small parallel regions take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
