import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no worker is left with one while the other has nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def cold_starts(tmp_path_factory):
    """One cache for all tests that build tiny models, so that each is built once."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LEVELFIELD_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def one_core():
    """One thread, for which there are kernels of our own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
