"""Several sweeps as one, where they can be compared."""

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from harness.analysis.fairness import Check, comparability
from harness.analysis.sweep import Sweep, assemble
from harness.errors import ConfigError


def join(sweeps: Sequence[Sweep]) -> Sweep:
    """The cells of all, as if they were of one sweep. An algorithm with other settings elsewhere is a variant.

    Raises:
        ConfigError: naming two sweeps that cannot be compared, and all that differs.
    """
    for first, second in combinations(sweeps, 2):
        _refuse_incomparable(first, second)
    cells, runs, evaluations, samples = (
        pd.concat([getattr(sweep, name) for sweep in sweeps], ignore_index=True)
        for name in ("cells", "all_runs", "evaluations", "samples")
    )
    paths = [path for sweep in sweeps for path in sweep.paths]
    return assemble(paths, " + ".join(sweep.name for sweep in sweeps), cells, runs, evaluations, samples)


def _refuse_incomparable(first: Sweep, second: Sweep) -> None:
    both = f"{' '.join(map(str, first.paths))} and {' '.join(map(str, second.paths))}"
    twice = first.cells.loc[first.cells["run"].isin(second.cells["run"]), "run"]
    if len(twice):
        raise ConfigError(f"{both} cannot be joined: both have the cell {twice.iloc[0]} ({len(twice)} such in all)")
    differing = _differences(first.cells, second.cells)
    if differing:
        reasons = "; ".join(f"{check.what} ({check.detail})" for check in differing)
        raise ConfigError(f"{both} cannot be joined, since they differ in {reasons}")


def _differences(first: pd.DataFrame, second: pd.DataFrame) -> list[Check]:
    """The checks that find in both together what they find in neither alone."""
    orders = [(first, second), (second, first)]  # values stand in the order of the cells
    alone = [{check.what: check for check in comparability(cells)} for cells, _ in orders]
    joint = [{check.what: check for check in comparability(pd.concat(pair, ignore_index=True))} for pair in orders]
    return [
        check
        for what, check in joint[0].items()
        if all(found[what] != known.get(what) for found, known in zip(joint, alone, strict=True))
    ]
