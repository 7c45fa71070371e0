import pytest


@pytest.fixture(scope="session")
def cold_starts(tmp_path_factory):
    """One cache for all tests that build tiny models, so that each is built once."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LEVELFIELD_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("HF_HUB_OFFLINE", "1")
        yield
