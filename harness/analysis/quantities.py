"""What a claim is about: one number for every run.

Each kind is a dataclass whose fields are its keys in the YAML, with a `label` for sentences and the `rows` of a sweep:
setting, variant, seed, run, status, score (the number; NaN where there is none), one row per cell that is compared.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import pandas as pd

from harness.analysis.efficiency import default_targets, run_times
from harness.analysis.scores import NOT_METRICS, Metric, cold_starts, raw_histories, scores
from harness.analysis.statistics import mean_over_steps
from harness.analysis.sweep import Sweep, columns_of
from harness.errors import ConfigError

_COLUMNS = ["setting", "variant", "seed", "run", "status"]
_COSTS = ("spent", "seconds", "flops", "parameters")  # what columns of cells begin with that may be added up


class Quantity(Protocol):
    """What all kinds have."""

    def label(self, sweep: Sweep) -> str:
        """As it stands in a sentence."""

    def rows(self, sweep: Sweep) -> pd.DataFrame:
        """The number of every run."""


@dataclass(frozen=True)
class Score:
    """A score at the end of the budget, higher being better: runs that diverged or failed count as the worst.

    Attributes:
        source, name, summary: as of :class:`harness.analysis.scores.Metric`; name None is the sweep's first lm-eval
            task.
        since_start: minus what the run itself had before it learned, or where it failed before that was measured, the
            mean of what its setting's runs had.
    """

    source: Literal["evaluations", "runs"]
    name: str | None
    summary: Literal["final", "area"]
    since_start: bool

    def __post_init__(self) -> None:
        _check_name(self.source, self.name)

    def label(self, sweep: Sweep) -> str:
        words = _metric(sweep, self.name, self.source, self.summary).label
        return f"gain in {words} over the cold start" if self.since_start else words

    def rows(self, sweep: Sweep) -> pd.DataFrame:
        metric = _metric(sweep, self.name, self.source, self.summary)
        rows = scores(sweep, metric)
        if self.since_start:
            own = rows["run"].map(cold_starts(raw_histories(sweep, metric, sweep.axis), metric))
            rows["score"] -= own.fillna(own.groupby(rows["setting"]).transform("mean"))
        return rows


@dataclass(frozen=True)
class Measurement:
    """The mean of a column of the metrics over the steps of finished runs; neither high nor low is better."""

    name: str

    def __post_init__(self) -> None:
        _check_name("runs", self.name)

    def label(self, sweep: Sweep) -> str:
        return self.name

    def rows(self, sweep: Sweep) -> pd.DataFrame:
        done = sweep.finished(sweep.runs)
        return _with_score(sweep, mean_over_steps(done, self.name) if self.name in done else pd.Series(dtype=float))


@dataclass(frozen=True)
class Cost:
    """What finished runs record of some costs over what they record of others.

    Attributes:
        of, over: columns of :func:`harness.runs.load_cells` that are added up, e.g. `flops/critic`.
    """

    of: tuple[str, ...]
    over: tuple[str, ...]

    def __post_init__(self) -> None:
        for key in ("of", "over"):
            if not getattr(self, key):
                raise ConfigError(f"{key}=[]: name one column or more, e.g. flops/update")
            for name in getattr(self, key):
                if name.partition("/")[0] not in _COSTS or "/" not in name:
                    raise ConfigError(f"{key} has {name}: no cost; costs begin with {', '.join(_COSTS)} and a slash")

    def label(self, sweep: Sweep) -> str:
        return f"{' + '.join(self.of)} relative to {' + '.join(self.over)}"

    def rows(self, sweep: Sweep) -> pd.DataFrame:
        done = sweep.finished(sweep.cells)
        of, over = (
            done.reindex(columns=list(names)).astype(float).sum(axis=1, skipna=False) for names in (self.of, self.over)
        )
        return _with_score(sweep, (of / over.where(over > 0)).set_axis(done["run"]))


@dataclass(frozen=True)
class TimeToTarget:
    """What a run spent, on the axis that ended the runs, until it first reached a target; infinite where it did not.

    Attributes:
        source, name: as of :class:`Score`.
        part: the target's place on the way from the cold start to the best variant's mean at the end.
    """

    source: Literal["evaluations", "runs"]
    name: str | None
    part: float

    def __post_init__(self) -> None:
        _check_name(self.source, self.name)
        if not 0 < self.part <= 1:
            raise ConfigError(f"part={self.part:g}: give a part of the way, above 0 and at most 1")

    def label(self, sweep: Sweep) -> str:
        words = _metric(sweep, self.name, self.source, "final").label
        return f"{sweep.axis.replace('_', ' ')} to {100 * self.part:g} % of the best gain in {words}"

    def rows(self, sweep: Sweep) -> pd.DataFrame:
        metric = _metric(sweep, self.name, self.source, "final")
        targets = default_targets(sweep, metric, [self.part])
        times = run_times(sweep, metric, sweep.axis, targets)
        return _with_score(sweep, times.set_index("run")["time"])


QUANTITIES: dict[str, type[Quantity]] = {
    "score": Score,
    "measurement": Measurement,
    "cost": Cost,
    "time_to_target": TimeToTarget,
}


def _check_name(source: str, name: str | None) -> None:
    if name is None and source == "runs":
        raise ConfigError("name is null, which is for source=evaluations: name a column of the metrics")
    if source == "runs" and name in NOT_METRICS:
        raise ConfigError(f"name={name}: it tells runs and steps apart and measures nothing; name another column")


def _metric(
    sweep: Sweep, name: str | None, source: Literal["evaluations", "runs"], summary: Literal["final", "area"]
) -> Metric:
    tasks = columns_of(sweep.cells, "score/").values()
    return Metric(source, name or next(iter(tasks), "downstream accuracy"), summary)


def _with_score(sweep: Sweep, by_run: pd.Series) -> pd.DataFrame:
    cells = sweep.compared[_COLUMNS]
    return cells.assign(score=cells["run"].map(by_run).astype(float)).reset_index(drop=True)
