"""The numbers of short runs are those that are kept as text: nothing that trains has changed by accident."""

import pytest

from tests.golden.curves import CELLS, curves, differences, golden_curves


@pytest.fixture(scope="module")
def results(tmp_path_factory, cold_starts):
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def golden():
    """What is kept, by entry and model."""
    cells = {}
    for point, value in golden_curves().items():
        cells.setdefault((point.entry, point.model), {})[point] = value
    return cells


def test_every_cell_is_kept(golden):
    assert golden.keys() == CELLS.keys()


@pytest.mark.parametrize(("entry", "model"), CELLS)
def test_the_metrics_of_a_short_run_are_as_they_were(entry, model, results, golden):
    found = differences(golden[entry, model], curves(entry, model, results))
    if found:
        pytest.fail("\n".join(["other numbers than are kept (CONTRIBUTING.md says when to renew them):", *found]))
