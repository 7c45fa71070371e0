from pathlib import Path

import pytest

from harness.analysis.sweep import Sweep, read_sweep
from tests.analysis.synthetic import comparison, write_sweep


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Four algorithms, two models, three seeds; one cell each failed, diverged and interrupted, three skipped."""
    root: Path = tmp_path_factory.mktemp("results") / "sweep"
    return read_sweep(write_sweep(root, comparison()))
