"""Where the budget went: what the critic, the replay and the rollouts cost."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from harness.analysis.intervals import RESAMPLES
from harness.analysis.panels import panels, title
from harness.analysis.statistics import estimate
from harness.analysis.style import Drawing, plain, unit
from harness.analysis.sweep import Sweep, columns_of

# Paul Tol's light scheme: safe for colour-blind readers, and unlike the colours of the algorithms.
_COLORS = ("#77AADD", "#BBCC33", "#EEDD88", "#FFAABB", "#EE8866", "#44BB99", "#99DDFF", "#AAAAAA")
_COSTS = {"flops": "flops", "seconds": "device_seconds"}  # cost of a phase -> the budget axis that it adds up to
_SMALLEST_LABEL = 0.065  # of the axis


def budget_by_phase(sweep: Sweep) -> Drawing | None:
    """Stacked bars of FLOPs and device-seconds by phase, for every variant and setting."""
    table = phase_costs(sweep)
    if table.empty:
        return None
    settings, costs = table["setting"].unique(), table["cost"].unique()
    drawn = set(table["phase"])
    # Over all that are known, so that a phase has its colour in every report.
    known = dict(zip(columns_of(sweep.cells, "seconds/").values(), itertools.cycle(_COLORS), strict=False))
    colors = {phase: color for phase, color in known.items() if phase in drawn}
    bars = table.groupby("setting")["variant"].nunique()
    heights = [0.6 + 0.34 * int(bars[setting]) for setting in settings]
    figure, axes = panels(len(costs), heights, width=4.4, beside=list(map(_label, table["variant"], table["n"])))
    for column, cost in enumerate(costs):
        of_cost = table[table["cost"] == cost]
        measure = unit(_COSTS[cost], float(of_cost["total"].max()))
        widest = float(of_cost[["total", "high"]].max(axis=None)) / measure.scale
        for row, setting in enumerate(settings):
            records = of_cost[of_cost["setting"] == setting].to_dict("records")
            _bars(axes[row, column], records, colors, measure.scale, widest)
            axes[row, column].set_title(title(setting))
        axes[-1, column].set_xlabel(measure.label)
    handles = [Patch(color=color, label=phase.replace("_", " ")) for phase, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), handlelength=1.2)
    caption = (
        "What a run spent by phase, to its last step, mean over finished runs; inside a bar the share of its total, "
        "where there is room. "
        f"n stands beside each bar. Black: 95 % bootstrap interval of the total over seeds ({RESAMPLES:,} resamples), "
        "where n is 3 or more. Evaluation, checkpoints, logging and start-up are not charged."
    )
    return Drawing("budget_by_phase", "Budget by phase", caption, figure, table)


def phase_costs(sweep: Sweep) -> pd.DataFrame:
    """One row per (variant, setting, cost, phase): n, mean (FLOPs or seconds), share; total, low, high of all."""
    rows = []
    for variant, setting, cells in sweep.groups(sweep.finished(sweep.cells)):
        for cost in _COSTS:
            columns = columns_of(cells, f"{cost}/")
            phases = {name: phase for name, phase in columns.items() if cells[name].fillna(0).any()}
            total = estimate(cells[list(phases)].sum(axis=1))
            for name, phase in phases.items():
                mean = float(cells[name].fillna(0).mean())
                rows.append(
                    {"variant": variant, "setting": setting, "cost": cost, "phase": phase, "n": total.n, "mean": mean}
                    | {"share": mean / total.mean, "total": total.mean, "low": total.low, "high": total.high}
                )
    return pd.DataFrame(rows)


def _bars(axes: Axes, rows: list[dict[str, Any]], colors: dict[str, str], scale: float, widest: float) -> None:
    """One bar per variant; `rows` are those of :func:`phase_costs` for one panel, `widest` what its axis holds."""
    variants = {row["variant"]: row for row in rows}
    for place, (variant, any_row) in enumerate(variants.items()):
        own, left = {row["phase"]: row for row in rows if row["variant"] == variant}, 0.0
        for phase in (phase for phase in colors if phase in own):
            width = own[phase]["mean"] / scale
            axes.barh(place, width, left=left, height=0.68, color=colors[phase], edgecolor="white")
            if width >= _SMALLEST_LABEL * widest:
                text = f"{own[phase]['share']:.0%}"
                axes.text(left + width / 2, place, text, ha="center", va="center", fontsize=7.5, color="#222222")
            left += width
        if np.isfinite(any_row["low"]):
            ends = [any_row["low"] / scale, any_row["high"] / scale]
            below = place + 0.28  # the shares
            axes.plot(ends, [below, below], color="black", linewidth=1.4, solid_capstyle="butt")
    axes.set_yticks(range(len(variants)), [plain(_label(row["variant"], row["n"])) for row in variants.values()])
    axes.set_ylim(len(variants) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def _label(variant: str, n: int) -> str:
    return f"{variant} (n = {n})"
