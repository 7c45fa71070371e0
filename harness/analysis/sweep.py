"""A sweep as the analysis sees it: its cells, curves and scores, and what distinguishes its lines and panels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from harness.errors import ConfigError
from harness.runs import load_cells, load_evaluations, load_runs, load_samples
from harness.runs.reading import PathLike
from harness.runs.settings import differences


@dataclass(frozen=True, eq=False)  # frames have no one answer to ==, so that a sweep equals itself alone
class Sweep:
    """What is drawn and tabulated.

    Attributes:
        paths, name: the folder, or several that were joined, and what they are called.
        axis, limit: the budget that is equal for all cells.
        cells, runs, evaluations, samples: the frames of :mod:`harness.runs`, with two columns more: `variant`, the
            algorithm, and whatever else its cells of one model differ in, e.g. a learning rate that is searched; and
            `setting`, the model, and `model/task` where there are several tasks. Means are over the seeds of a variant
            in a setting. `runs` ends at the budget's limit and holds no rows of cells without metrics.
        all_runs: as `runs`, but to the limit that ended them, whatever axis they are compared on.
        variants, settings: their values in the order of the sweep's plan.
        limits: by setting, where the axis is not the one that ended the runs: the largest budget on it that all
            finished runs reached. `runs` end there, `score/TASK` of `cells` is the score there, and `limit` is the
            largest of them.
        metric, baseline: what verdicts are about, as :func:`harness.analysis.scores.find_metric` takes it, and the
            variant that they are all against; None for the first lm-eval task, and for all pairs.
        filters, left_out: what cells were chosen by (`KEY=VALUE[,VALUE...]`), and how many that left out.
        claims: a folder of further claims to test (:func:`harness.analysis.claims.load_claims`).
    """

    paths: Sequence[Path]
    name: str
    axis: str
    limit: float
    cells: pd.DataFrame
    runs: pd.DataFrame
    all_runs: pd.DataFrame
    evaluations: pd.DataFrame
    samples: pd.DataFrame
    variants: list[str]
    settings: list[str]
    limits: dict[str, float] = field(default_factory=dict)
    metric: str | None = None
    baseline: str | None = None
    filters: Sequence[str] = ()
    left_out: int = 0
    claims: Path | None = None

    @property
    def compared(self) -> pd.DataFrame:
        """The cells that a comparison is about: not those that were skipped, nor planned ones whose settings are lost.

        Without its config.yaml nothing tells which variant a cell was to be.
        """
        lost = (self.cells["status"] == "planned") & ~self.cells["config"].astype(bool)
        return self.cells[(self.cells["status"] != "skipped") & ~lost]

    def finished(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of runs that reached their limit: the ones that means are taken over."""
        return frame[frame["status"] == "done"]

    def groups(self, frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
        """(variant, setting, rows) for every pair that has rows, one setting after the other."""
        for setting in self.settings:
            for variant in self.variants:
                rows = frame[(frame["variant"] == variant) & (frame["setting"] == setting)]
                if len(rows):
                    yield variant, setting, rows


def read_sweep(path: PathLike) -> Sweep:
    """Read a sweep folder, compact or not.

    Raises:
        NoRuns: where there are no runs.
        ConfigError: where two runs are of one cell.
    """
    cells = load_cells(path)
    name = str(cells["sweep"].iloc[0])
    sweep = assemble([Path(path)], name, cells, load_runs(path), load_evaluations(path), load_samples(path))
    _check_distinct(sweep.cells[sweep.cells["config"].astype(bool)])
    return sweep


def _check_distinct(cells: pd.DataFrame) -> None:
    for _, same in cells.groupby(["variant", "setting", "seed"], sort=False):
        if len(same) > 1:
            raise ConfigError(
                f"{' and '.join(same['run'])} are runs of one cell, {same['label'].iloc[0]}: move all but one of them "
                "out of the sweep's folder"
            )


def assemble(
    paths: Sequence[Path],
    name: str,
    cells: pd.DataFrame,
    runs: pd.DataFrame,
    evaluations: pd.DataFrame,
    samples: pd.DataFrame,
) -> Sweep:
    """A sweep of the frames of :mod:`harness.runs`; the columns `variant` and `setting` are made anew."""
    several = cells["task"].nunique() > 1
    cells = cells.assign(setting=cells["model"] + ("/" + cells["task"] if several else ""), variant=_variants(cells))
    axis, limit = stopped_at(cells)
    runs, evaluations, samples = (
        frame.drop(columns=["variant", "setting"], errors="ignore").merge(
            cells[["run", "variant", "setting"]], on="run", how="left"
        )
        for frame in (cut_at_limit(runs, axis), evaluations, samples)
    )
    return Sweep(
        paths=paths,
        name=name,
        axis=axis,
        limit=limit,
        cells=cells,
        runs=runs,
        all_runs=runs,
        evaluations=evaluations,
        samples=samples,
        variants=list(dict.fromkeys(cells["variant"])),
        settings=list(dict.fromkeys(cells["setting"])),
    )


def stopped_at(cells: pd.DataFrame) -> tuple[str, float]:
    """Axis and limit (NaN where not recorded yet) of the budget that ends the runs."""
    axes, limits = cells["budget_axis"].dropna(), cells["budget_limit"].dropna()
    return str(axes.iloc[0]) if len(axes) else "flops", float(limits.iloc[0]) if len(limits) else float("nan")


def cut_at_limit(runs: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The steps whose cumulative cost on the axis is within the budget; the step that overshoots is not compared."""
    spent = f"budget/{axis}"
    if spent not in runs:
        return runs.iloc[:0].assign(**{spent: pd.Series(dtype=float)})
    return runs[runs[spent] <= runs["budget_limit"]]


def common_budget(rows: pd.DataFrame) -> dict[str, float]:
    """By setting: the largest budget that all finished runs reached.

    Args:
        rows: setting, run, status and x, the budget spent, e.g. of :func:`harness.analysis.scores.histories`.
    """
    done = rows[rows["status"] == "done"]
    ends = done.groupby(["setting", "run"], as_index=False)["x"].max()
    return {str(setting): float(group["x"].min()) for setting, group in ends.groupby("setting")}


def columns_of(frame: pd.DataFrame, prefix: str) -> dict[str, str]:
    """The columns that start with a prefix such as `score/`, each with the rest of its name."""
    return {name: name.removeprefix(prefix) for name in map(str, frame) if name.startswith(prefix)}


def _variants(cells: pd.DataFrame) -> pd.Series:
    """The algorithm's name, with the settings in which its runs of one model and task differ besides the seed."""
    names = dict(zip(cells["run"], cells["algorithm"].astype("str"), strict=True))
    for _, group in cells.groupby(["algorithm", "model", "task"], sort=False):
        told = differences(dict(zip(group["run"], group["config"], strict=True)))
        names |= {run: f"{names[run]} {settings}".strip() for run, settings in told.items()}
    return cells["run"].map(names)
