"""What of a sweep a report looks at, and how: cells, metric, budget axis and baseline, as its command line chooses."""

import csv
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from harness.analysis.claims import load_claims
from harness.analysis.scores import Metric, axes, headline_metric, scores
from harness.analysis.style import budget_text, unit
from harness.analysis.sweep import Sweep, columns_of, common_budget, stopped_at
from harness.errors import ConfigError
from harness.runs.settings import distinct, flatten
from harness.status import STATUSES

_FILTERS = ("algorithm", "variant", "model", "task", "seed", "status")


def viewed(
    sweep: Sweep,
    metric: str | None = None,
    axis: str | None = None,
    baseline: str | None = None,
    filters: Sequence[str] = (),
    claims: Path | None = None,
) -> Sweep:
    """The sweep as it is to be reported on; None leaves what is so by default.

    Args:
        metric: as :func:`harness.analysis.scores.find_metric` takes it.
        axis: as :func:`on_axis` takes it.
        baseline: the variant that all verdicts are against.
        filters: as :func:`filtered` takes them.
        claims: a folder of claims beside the harness's own.

    Raises:
        ConfigError: for a name that is not there, listing those that are; where no cell is left.
    """
    sweep = filtered(sweep, filters)
    if baseline is not None and baseline not in sweep.variants:
        raise ConfigError(f"baseline {baseline}: there is no such variant here; there are {', '.join(sweep.variants)}")
    sweep = replace(sweep, metric=metric, baseline=baseline, claims=claims)
    load_claims(claims)  # raises where a file is wrong, before anything is written
    headline = headline_metric(sweep)  # raises where there is no such metric
    if metric is not None and headline is not None:
        _check_compared(sweep, headline)
    if axis is None:
        return sweep
    if headline is not None and axis not in axes(sweep, headline):
        raise ConfigError(
            f"axis {axis}: what was spent on it is not recorded with {headline.name}; recorded are "
            f"{', '.join(axes(sweep, headline)) or 'none'}"
        )
    return on_axis(sweep, axis)


def _check_compared(sweep: Sweep, metric: Metric) -> None:
    """Refuse to compare by what one variant alone has."""
    known = scores(sweep, metric).dropna(subset="score")
    those = distinct(list(known["variant"]))
    if len(those) == 1 and len(sweep.variants) > 1:
        raise ConfigError(f"metric {metric.name}: {those[0]} alone has it, so that there is nothing to compare")


def filtered(sweep: Sweep, filters: Sequence[str]) -> Sweep:
    """The cells that have one of the values of every filter, and what belongs to them.

    Args:
        filters: `KEY=VALUE[,VALUE...]`, a value with a comma in double quotes. The key is algorithm, variant, model,
            task, seed, status, or a dotted key of config.yaml such as `algorithm.optimizer.learning_rate`.

    Raises:
        ConfigError: for a key or a value that no cell has, or where no cell is left.
    """
    cells = sweep.cells
    for one in filters:
        key, given, text = one.partition("=")
        if not given:
            raise ConfigError(f"filter {one}: give KEY=VALUE, e.g. --filter model=tiny_moe")
        wanted, found = next(csv.reader([text], skipinitialspace=True), []), _values(cells, key)
        there = ", ".join(map(str, distinct([value for value in found if value is not None])))
        known = [*_values(sweep.cells, key), *(STATUSES if key == "status" else ())]
        for name in wanted:
            if not any(_same(value, name) for value in known):
                raise ConfigError(f"filter {one}: no cell has {key}={name}; {key} is one of {there}")
        cells = cells[[any(_same(value, name) for name in wanted) for value in found]]
        if cells.empty:
            raise ConfigError(f"filter {one}: no cell is left; {key} is one of {there}")
    frames = {name: getattr(sweep, name) for name in ("runs", "all_runs", "evaluations", "samples")}
    return replace(
        sweep,
        cells=cells.reset_index(drop=True),
        **{name: frame[frame["run"].isin(cells["run"])].reset_index(drop=True) for name, frame in frames.items()},
        variants=[variant for variant in sweep.variants if variant in set(cells["variant"])],
        settings=[setting for setting in sweep.settings if setting in set(cells["setting"])],
        filters=(*sweep.filters, *filters),
        left_out=sweep.left_out + len(sweep.cells) - len(cells),
    )


def on_axis(sweep: Sweep, axis: str) -> Sweep:
    """The sweep as compared on another budget axis than the one that ended its runs.

    In each setting the comparison is at the largest budget on it that all finished runs reached: there curves end, and
    scores are those there, interpolated between evaluations.

    Raises:
        ConfigError: where the axis was not recorded, or no run has finished yet.
    """
    if axis == sweep.axis:
        return sweep
    recorded = columns_of(sweep.all_runs.dropna(axis="columns", how="all"), "budget/").values()
    if axis not in recorded:
        raise ConfigError(f"axis {axis}: the runs have not recorded it; recorded are {', '.join(recorded) or 'none'}")
    limits = common_budget(sweep.all_runs.rename(columns={f"budget/{axis}": "x"}))
    if not limits:
        raise ConfigError(f"axis {axis}: no run has finished, so that there is no equal budget on it yet")
    limit_of_row = sweep.all_runs["setting"].map(limits).fillna(float("inf"))
    turned = replace(
        sweep,
        axis=axis,
        limit=max(limits.values()),
        limits=limits,
        runs=sweep.all_runs[sweep.all_runs[f"budget/{axis}"] <= limit_of_row],
    )
    there = {
        column: sweep.cells["run"].map(scores(turned, Metric("evaluations", task)).set_index("run")["score"])
        for column, task in columns_of(sweep.cells, "score/").items()
    }
    done = sweep.cells["status"] == "done"
    return replace(turned, cells=sweep.cells.assign(**{name: score.where(done) for name, score in there.items()}))


def notes(sweep: Sweep) -> list[str]:
    """In words, what of the sweep is looked at and how; nothing where it is all of one, in the usual way."""
    said = []
    if len(sweep.paths) > 1:
        said.append(f"Several sweeps as one, found comparable: {', '.join(map(str, sweep.paths))}.")
    if sweep.filters:
        cells = f"{len(sweep.cells)} of {len(sweep.cells) + sweep.left_out} cells"
        said.append(f"Filtered by {' and '.join(sweep.filters)}: {cells}; the others appear nowhere in this report.")
    if sweep.limits:
        axis, limit = stopped_at(sweep.cells)
        said.append(
            f"Compared at an equal budget of {sweep.axis}, the largest that all finished runs reached: "
            f"{budget_text(sweep)}. The runs themselves ended at {unit(axis, limit).text(limit)} ({axis})."
        )
    metric = headline_metric(sweep)
    if sweep.metric is not None and metric is not None:
        said.append(f"Verdicts are about {metric.label}{metric.smoothing}: better means more of it.")
    if sweep.baseline is not None:
        said.append(
            f"Verdicts are against the baseline {sweep.baseline} alone; at equal budgets all are compared with all."
        )
    untrained = _untrained(sweep)
    if untrained:
        said.append(
            f"The first rollout batch took more than the budget: what is evaluated of {', '.join(untrained)} is the "
            "cold start, not what was trained. Give a larger budget.limits."
        )
    return said


def _untrained(sweep: Sweep) -> list[str]:
    """Labels of finished runs of which no trained state lies inside the budget."""
    done = sweep.cells[sweep.cells["status"] == "done"]
    later = sweep.evaluations[sweep.evaluations["fraction"] > 0] if len(sweep.evaluations) else sweep.evaluations
    last = later.groupby("run")["step"].max() if len(later) else pd.Series(dtype=float)
    return list(done.loc[done["run"].map(last) == 0, "label"])


def arguments(sweep: Sweep) -> list[str]:
    """What `python -m harness.report` takes to look at the sweep in the same way."""
    axis = sweep.axis if sweep.limits else None
    options = {"--metric": sweep.metric, "--axis": axis, "--baseline": sweep.baseline, "--claims": sweep.claims}
    given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
    return [*map(str, sweep.paths), *given, *(part for one in sweep.filters for part in ("--filter", one))]


def _values(cells: pd.DataFrame, key: str) -> list[Any]:
    """One per cell; None where it has none."""
    if key in _FILTERS:
        return [None if pd.isna(value) else value for value in cells[key].astype(object)]
    configs = [flatten(config) for config in cells["config"]]
    if not any(key in config for config in configs):
        raise ConfigError(
            f"filter {key}: give KEY=VALUE with one of the keys {', '.join(_FILTERS)}, or a key of config.yaml such as "
            "algorithm.optimizer.learning_rate"
        )
    return [config.get(key) for config in configs]


def _same(value: Any, text: str) -> bool:
    """Whether a value is meant by its text; 3e-4 is 0.0003."""
    if str(value) == text:
        return True
    with suppress(TypeError, ValueError):
        return not isinstance(value, bool) and float(value) == float(text)
    return False
