"""Curves in panels, and the words that a caption owes the reader about them."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.analysis.intervals import MIN_RUNS_FOR_INTERVAL, RESAMPLES
from harness.analysis.statistics import Curve
from harness.analysis.style import Look, Unit, highlights_note, plain
from harness.analysis.sweep import Sweep

_LETTER = 0.06  # inches that a letter of a label takes, about
_TITLE = 24  # letters of a panel's title in a line
_BESIDE = 2.6  # inches that labels beside the panels may take of them
Curves = Mapping[tuple[str, str], Curve]  # by (variant, setting)


def panels(
    columns: int,
    heights: Sequence[float],
    *,
    sharey: Literal["row", "none"] = "row",
    width: float = 3.7,
    beside: Sequence[str] = (),
    below: Sequence[str] = (),
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels: (figure, axes `[rows, columns]`). Sizes are inches of one panel.

    More than three columns get narrower, so that a page that scales the figure down leaves its text legible.

    Args:
        beside, below: labels to the left of the panels, and of a legend below each: where they are long, the figure is
            wider, since a layout without room for them comes apart.
    """
    width = max(min(width, max(3 * width / columns, 2.4)), 0.7 + _length(below))
    across = max(width * columns, 5.6) + max(0.0, _length(beside) - _BESIDE)
    figure = Figure(figsize=(across, sum(heights) + 0.35), layout="constrained")
    grid = {"height_ratios": list(heights)}
    axes = figure.subplots(len(heights), columns, squeeze=False, sharey=sharey, sharex="col", gridspec_kw=grid)
    return figure, axes


def title(setting: str) -> str:
    """Of a panel: the model, and the task, where there are several, below it; what is long goes on in another line."""
    breakable = (part.replace("_", "_ ") for part in setting.split("/"))
    lines = (line.replace("_ ", "_") for part in breakable for line in textwrap.wrap(part, _TITLE))
    return plain("\n".join(lines))


def draw_curve(axes: Axes, curve: Curve, look: Look, unit: Unit, *, log: bool = False, marker: str = "") -> None:
    """The mean with its interval, or single runs where there are too few; unfinished runs end in a cross.

    A faint one is a thin line, whose interval would cover others'.
    """
    dashes = {"dashes": look.dashes} if look.dashes else {}
    style: dict[str, Any] = {"color": look.color, "marker": marker, "markersize": 3.5, **dashes}
    if look.faint:
        style |= {"linewidth": 0.8, "markersize": 2.0, "zorder": 1}
    if len(curve.x):
        axes.plot(curve.x / unit.scale, _positive(curve.mean, log), **style)
        if not look.faint:
            low = np.maximum(curve.low, np.finfo(float).tiny) if log else curve.low
            axes.fill_between(curve.x / unit.scale, low, curve.high, color=look.color, alpha=0.16, linewidth=0)
    else:
        for x, y in curve.finished.values():
            axes.plot(x / unit.scale, _positive(y, log), **{**style, "linewidth": 1.0, "alpha": 0.9})
    for x, y in curve.unfinished.values():
        y = _positive(y, log)
        axes.plot(x / unit.scale, y, **{**style, "linewidth": 0.8, "alpha": 0.75})
        axes.plot(x[-1:] / unit.scale, y[-1:], color=look.color, marker="x", markersize=6, linestyle="none")


def drawn_points(by_metric: Mapping[str, Curves], axis: str) -> pd.DataFrame:
    """What :func:`draw_curve` draws, point by point; a point that a log axis cannot show is here all the same.

    Returns:
        metric, axis, setting, variant, line (`mean`, or the name of a run that is drawn by itself), n (runs in the
        line), x (in the axis's unit), y, low, high (NaN of single runs).
    """
    lines = [
        pd.DataFrame(
            {"metric": metric, "axis": axis, "setting": setting, "variant": variant, "line": line, "n": n}
            | dict(zip(("x", "y", "low", "high"), points, strict=True))
        )
        for metric, curves in by_metric.items()
        for (variant, setting), curve in curves.items()
        for line, (n, *points) in _lines(curve).items()
    ]
    return pd.concat(lines, ignore_index=True)


def log_axis(axes: Axes, curves: Sequence[Curve]) -> None:
    """A log axis over all that is drawn, but a decade below the smallest line at most: bands that reach 0 leave it.

    The axis stays linear where every value is 0, since nothing could be drawn, and where all lie within a factor of
    two, of which its ticks would show nothing.
    """
    drawn = [value for curve in curves for value in _drawn(curve)]
    if drawn and max(drawn) > 2 * min(drawn):
        axes.set_yscale("log")
        highs = [float(value) for curve in curves for value in curve.high if np.isfinite(value)]
        top = max(1.6 * max(drawn), 1.1 * max(highs, default=0.0))
        axes.set_ylim(bottom=0.9 * 10.0 ** np.floor(np.log10(min(drawn)) + 1e-9), top=top)


def legend(figure: Figure, looks: Mapping[str, Look], variants: Sequence[str], *, markers: bool = False) -> None:
    """One legend above all panels, in the sweep's order; of lines, or of the markers of points that are drawn alone."""
    entries = _entries(looks, {variant: variant for variant in variants})
    handles = [_handle(look, label, markers=markers) for look, label in entries]
    longest = max((len(label) for _, label in entries), default=1)
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 12 / (8 + longest))))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))  # panels keep their size
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.8)


def panel_legend(axes: Axes, looks: Mapping[str, Look], labels: Mapping[str, str]) -> None:
    """A legend below a panel, which gives a label to each variant."""
    handles = [_handle(look, label) for look, label in _entries(looks, labels)]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.19), handlelength=2.6)


def runs_note(sweep: Sweep, curves: Curves) -> str:
    """Statistic, interval and n of the curves drawn, and what was not drawn and why."""
    means = [curve for curve in curves.values() if len(curve.x)]
    few = [curve for curve in curves.values() if 0 < curve.n < MIN_RUNS_FOR_INTERVAL]
    unfinished = sum(len(curve.unfinished) for curve in curves.values())
    parts: list[str] = [note] if (note := highlights_note(sweep).strip()) else []
    if means:
        parts.append(
            f"Lines: mean over the seeds of finished runs; bands: 95 % bootstrap interval of that mean over seeds "
            f"({RESAMPLES:,} resamples)."
        )
    parts.append(_counts(curves))
    if few:
        parts.append("With fewer than 3 runs each is drawn by itself, without interval.")
    if unfinished:
        runs = "1 run that did not finish is a thin line ending" if unfinished == 1 else (
            f"{unfinished} runs that did not finish are thin lines ending"
        )  # fmt: skip
        parts.append(f"{runs} in ×, in no mean.")
    absent = absent_cells(sweep, {setting for _, setting in curves})
    if absent:
        parts.append(f"Without a line: {absent}.")
    return " ".join(parts)


def _lines(curve: Curve) -> dict[str, tuple[int, np.ndarray, np.ndarray, Any, Any]]:
    """By name: n, x, y, low and high of what is drawn of a curve."""
    mean = {"mean": (curve.n, curve.x, curve.mean, curve.low, curve.high)}
    single = curve.unfinished if len(curve.x) else {**curve.finished, **curve.unfinished}
    return (mean if len(curve.x) else {}) | {run: (1, x, y, np.nan, np.nan) for run, (x, y) in single.items()}


def _counts(curves: Curves) -> str:
    by_n: dict[int, list[str]] = {}
    for (variant, setting), curve in curves.items():
        by_n.setdefault(curve.n, []).append(f"{variant} on {setting}")
    if len(by_n) == 1:
        return f"{_n(next(iter(by_n)))} for every line."
    usual = max(by_n, key=lambda n: len(by_n[n]))
    others = "; ".join(f"{_n(n)} for {', '.join(names)}" for n, names in sorted(by_n.items()) if n != usual)
    return f"{_n(usual)} for every line, but {others}."


def _n(n: int) -> str:
    return f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n}"


def absent_cells(sweep: Sweep, settings: Collection[str]) -> str:
    """The cells of these settings that left nothing to draw, by status."""
    bare = sweep.cells[~sweep.cells["run"].isin(sweep.runs["run"]) & sweep.cells["setting"].isin(settings)]
    names = []
    for variant, setting, cells in sweep.groups(bare):
        counts = ", ".join(f"{count} {status}" for status, count in cells["status"].value_counts(sort=False).items())
        names.append(f"{variant} on {setting} ({counts})")
    return "; ".join(names)


def _length(labels: Sequence[str]) -> float:
    return _LETTER * max(map(len, labels), default=0)


def _entries(looks: Mapping[str, Look], labels: Mapping[str, str]) -> list[tuple[Look, str]]:
    """Of a legend: the variants with a colour of their own, and one entry for all others."""
    own = [(looks[variant], label) for variant, label in labels.items() if not looks[variant].faint]
    others = [looks[variant] for variant in labels if looks[variant].faint]
    return [*own, *((look, f"{len(others)} others") for look in others[:1])]


def _handle(look: Look, label: str, *, markers: bool = False) -> Line2D:
    line = Line2D([], [], color=look.color, label=plain(label))
    if markers:
        line.set(marker=look.marker, linestyle="none")
    elif look.dashes:
        line.set_dashes(look.dashes)
    return line


def _positive(values: np.ndarray, log: bool) -> np.ndarray:
    """On a log axis a zero is a gap, not a plunge."""
    return np.where(values > 0, values, np.nan) if log else values


def _drawn(curve: Curve) -> list[float]:
    lines = [curve.mean] if len(curve.x) else [y for _, y in curve.finished.values()]
    lines = [*lines, *(y for _, y in curve.unfinished.values())]
    return [float(value) for line in lines for value in line if value > 0]
