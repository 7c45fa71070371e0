"""The figures behind the verdicts: pairs, equal budgets on every axis, performance profiles, and scaling fits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.analysis.aggregates import profiles
from harness.analysis.efficiency import EqualBudget
from harness.analysis.evidence import (
    headline_end,
    headline_equal_budgets,
    headline_improvements,
    headline_label,
    headline_scaling_fits,
    headline_scores,
    headline_smoothing,
    headline_verdicts,
    seconds_doubt,
)
from harness.analysis.intervals import MIN_RUNS_FOR_INTERVAL, RESAMPLES
from harness.analysis.panels import absent_cells, legend, panels, title
from harness.analysis.scaling import ScalingFit
from harness.analysis.style import Drawing, Look, Unit, highlights_note, looks, plain, unit
from harness.analysis.sweep import Sweep
from harness.analysis.verdicts import Verdict, beaten

_LINE = 0.165  # inches that an interval takes
_MOST_BELOW = 10  # variants of an axis, where the axes stand one below the other
_MOST_PAIRS = 28  # of one setting, as many as eight variants have
_PAIR = ["setting", "first", "second"]
_UNDECIDED = (0.45, 0.45, 0.45)
_PARTS = 25  # of the budget, over which points are averaged
_WORST = "Runs that diverged or failed count as the worst"


def pairwise(sweep: Sweep) -> Drawing | None:
    """Of every pair the mean difference, and the chance that a run of the first scores higher."""
    pairs = [verdict for verdict in headline_verdicts(sweep) if verdict.n >= MIN_RUNS_FOR_INTERVAL]
    if not pairs:
        return None
    shown = [pair for setting in sweep.settings for pair in _shown(sweep, pairs, setting)]
    margin = shown[0].margin
    data = pd.DataFrame(map(vars, shown))[[*_PAIR, "n", "outcome", "difference", "low", "high"]]
    chances = headline_improvements(sweep).drop(columns="n")
    data = data.merge(chances, on=_PAIR, suffixes=("", "_of_probability"))
    heights = [_LINE * count + 0.55 for count in data.groupby("setting", sort=False).size()]
    names = list(data["first"] + " − " + data["second"])
    figure, grid = panels(2, heights, beside=names)
    look = looks(sweep)
    for (difference, chance), (setting, here) in zip(grid, data.groupby("setting", sort=False), strict=True):
        for place, line in enumerate(here.to_dict("records")):
            winner = {"better": line["first"], "worse": line["second"]}.get(line["outcome"])
            color, filled = look[winner].color if winner else _UNDECIDED, winner is not None
            _draw_interval(difference, place, (line["low"], line["difference"], line["high"]), color, filled=filled)
            of_chance = (line["low_of_probability"], line["probability"], line["high_of_probability"])
            _draw_interval(chance, place, of_chance, color, filled=filled)
        if margin:
            difference.axvspan(-margin, margin, color="#e9e9e9", zorder=0)
        difference.locator_params(axis="x", nbins=4)
        chance.set_xlim(-0.03, 1.03)
        for axes, middle in ((difference, 0.0), (chance, 0.5)):
            axes.axvline(middle, color="#888888", linewidth=0.8)
            axes.set_title(title(str(setting)))
        _label_lines(difference, range(len(here)), [names[place] for place in here.index])
    grid[-1, 0].set_xlabel(f"Difference in {plain(headline_label(sweep))}")
    grid[-1, 1].set_xlabel("Chance that the first is higher")
    left_out = f" Of a model with more than {_MOST_PAIRS} pairs only those with the variant that has the highest mean."
    band = f"; within the grey band, ±{margin:g}, it does not matter" if margin else ""
    caption = (
        f"{headline_end(sweep)}. Left: mean difference of runs that share a seed, first "
        f"minus second, with its 95 % t interval{band}. Right: "
        "probability that a run of the first scores higher than a run of the second, with Newcombe's 95 % interval. "
        f"Filled, in the colour of the better one: better by verdict (paired t test, after Holm for the pairs of a "
        f"model); open: undecided, too few, or no difference that matters. {_n(data['n'], 'pairs of runs')}. {_WORST}."
    )
    caption += left_out if len(shown) < len(pairs) else ""
    return Drawing("pairwise", "Pairs at the end of the budget", caption, figure, data)


def equal_budget(sweep: Sweep) -> Drawing | None:
    """The mean of every variant at an equal budget on every axis."""
    found = headline_equal_budgets(sweep)
    data = pd.concat([_means(one) for one in found], ignore_index=True) if found else pd.DataFrame()
    if data.empty or data["mean_low"].isna().all():
        return None
    settings = [setting for setting in sweep.settings if setting in set(data["setting"])]
    many = data["variant"].nunique() > _MOST_BELOW
    figure = (_axes_beside if many else _axes_below)(sweep, found, data, settings)
    order = f" In the order of the means at equal {sweep.axis.replace('_', ' ')}." if many else ""
    order += highlights_note(sweep)
    caption = (
        f"{headline_label(sweep)} where all had spent equally much on an axis: the most that every finished run of the "
        f"model had spent on it, interpolated between measurements{headline_smoothing(sweep)}.{order}"
        " Points: mean over seeds, open where another variant is better by verdict (paired t test, "
        f"after Holm for all pairs of a model on an axis); bars: 95 % bootstrap interval of the mean ({RESAMPLES:,} "
        f"resamples), where n is 3 or more. {_n(data['n'], 'runs')}. {_WORST}."
    )
    absent = absent_cells(sweep, settings)
    caption += f" Without a point: {absent}." if absent else ""
    caption = f"{caption} {seconds_doubt(sweep)}".strip()
    return Drawing("equal_budget", "Equal budgets on every axis", caption, figure, data)


def performance_profiles(sweep: Sweep) -> Drawing | None:
    """The share of each variant's runs that score above a level."""
    data = profiles(headline_scores(sweep))
    if data.empty or data["n"].max() < MIN_RUNS_FOR_INTERVAL:
        return None
    settings = [setting for setting in sweep.settings if setting in set(data["setting"])]
    look, variants = looks(sweep), [variant for variant in sweep.variants if variant in set(data["variant"])]
    banded = sum(not look[variant].faint for variant in variants)
    band = {"step": "post", "linewidth": 0, "alpha": 0.3 / banded}  # all lie over each other
    figure, grid = panels(len(settings), [2.6])
    for column, setting in enumerate(settings):
        axes = grid[0, column]
        for variant, line in data[data["setting"] == setting].groupby("variant", sort=False):
            own = look[str(variant)]
            axes.plot(line["level"], line["share"], drawstyle="steps-post", **_line(own))
            if not own.faint:
                axes.fill_between(line["level"], line["low"], line["high"], color=own.color, **band)
        axes.set(title=title(setting), xlabel=f"{plain(headline_label(sweep))} above")
    grid[0, 0].set(ylabel="Share of runs", ylim=(-0.03, 1.03))
    legend(figure, look, variants)
    caption = (
        f"Performance profiles (Agarwal et al. 2021): the share of runs whose {headline_end(sweep)} "
        f"lies above each level.{highlights_note(sweep)} Bands: Wilson's 95 % interval of each share by itself. "
        f"{_n(data['n'], 'runs')}. {_WORST}."
    )
    return Drawing("performance_profile", "Performance profiles", caption, figure, data)


def scaling(sweep: Sweep) -> Drawing | None:
    """The sigmoids that hold, with the points that they are fitted to and the asymptotes that they head for."""
    fits = headline_scaling_fits(sweep)
    held = [fit for fit in fits if fit.reason is None]
    if not held:
        return None
    metrics = list(dict.fromkeys(fit.metric for fit in held))
    settings = [setting for setting in sweep.settings if setting in {fit.setting for fit in held}]
    budget, look = unit(sweep.axis, sweep.limit), looks(sweep)
    figure, grid = panels(len(settings), [2.7] * len(metrics))
    for row, metric in enumerate(metrics):
        for column, setting in enumerate(settings):
            here = [fit for fit in held if (fit.metric, fit.setting) == (metric, setting)]
            here.sort(key=lambda fit: look[fit.variant].faint)  # which have no place to the right
            for place, fit in enumerate(here):
                _draw_fit(grid[row, column], fit, look[fit.variant], budget, place)
            grid[row, column].set_xlim(left=0)
            grid[0, column].set_title(title(setting))
            grid[-1, column].set_xlabel(budget.label)
        grid[row, 0].set_ylabel(plain(metric))
    legend(figure, look, [variant for variant in sweep.variants if variant in {fit.variant for fit in held}])
    caption = (
        "Sigmoid of ScaleRL (arXiv 2510.13786) from the cold start's level towards an asymptote, fitted to every point "
        f"of the finished runs. Dots: their means over each {_PARTS}th part of the budget; bands: pointwise 95 % "
        "interval over seeds (bootstrap standard error, Student's t); bars to the right: the asymptote, with its "
        f"interval, likewise.{highlights_note(sweep)} {_n(pd.Series([fit.n for fit in held]), 'runs')}. "
        f"{_without_fit(fits)}"
    )
    return Drawing("scaling_fit", "Scaling fit", caption.strip(), figure, pd.DataFrame(list(_drawn_fits(held))))


def _axes_below(sweep: Sweep, found: Sequence[EqualBudget], data: pd.DataFrame, settings: Sequence[str]) -> Figure:
    """A panel for each setting, in which the budget axes stand one below the other, each with all variants."""
    variants = [variant for variant in sweep.variants if variant in set(data["variant"])]
    look, size = looks(sweep), len(variants) + 1.7  # lines of an axis, its heading and a gap among them
    figure, grid = panels(len(settings), [_LINE * size * len(found) + 0.5], beside=variants)
    for column, setting in enumerate(settings):
        axes = grid[0, column]
        for place, one in enumerate(found):
            _heading(axes, place * size, f"equal {_equal(sweep, one, setting)}")
            own = data[(data["setting"] == setting) & (data["axis"] == one.axis)]
            _draw_means(axes, own, look, {name: place * size + 1 + at for at, name in enumerate(variants)})
        axes.locator_params(axis="x", nbins=6)
        axes.set(title=title(setting), xlabel=plain(headline_label(sweep)))
    places = [place * size + 1 + index for place in range(len(found)) for index in range(len(variants))]
    _label_lines(grid[0, 0], places, variants * len(found), above=0.8)
    return figure


def _axes_beside(sweep: Sweep, found: Sequence[EqualBudget], data: pd.DataFrame, settings: Sequence[str]) -> Figure:
    """A panel for each setting and budget axis, with the variants in the order of their means on the first of them,
    which is the axis that the sweep is compared on."""
    look = looks(sweep)
    found = sorted(found, key=lambda one: one.axis != sweep.axis)
    main = data[data["axis"] == found[0].axis].sort_values("mean", ascending=False, kind="stable")
    orders = {setting: list(main.loc[main["setting"] == setting, "variant"]) for setting in settings}
    heights = [_LINE * len(order) + 0.6 for order in orders.values()]
    figure, grid = panels(len(found), heights, width=1.9, beside=list(data["variant"]))
    for row, (setting, order) in enumerate(orders.items()):
        for column, one in enumerate(found):
            axes = grid[row, column]
            own = data[(data["setting"] == setting) & (data["axis"] == one.axis)]
            _draw_means(axes, own, look, {name: at for at, name in enumerate(order)})
            axes.locator_params(axis="x", nbins=4)
            axes.set_title(f"{title(setting)}\nequal " + _equal(sweep, one, setting).replace(": ", ":\n"))
            grid[-1, column].set_xlabel(plain(headline_label(sweep)))
        _label_lines(grid[row, 0], range(len(order)), order)
    return figure


def _draw_means(axes: Axes, lines: pd.DataFrame, look: Mapping[str, Look], places: Mapping[str, float]) -> None:
    """Means with their intervals, each variant's at its place."""
    for line in lines.to_dict("records"):
        interval = line["mean_low"], line["mean"], line["mean_high"]
        name = line["variant"]
        _draw_interval(axes, places[name], interval, look[name].color, filled=line["unbeaten"])


def _shown(sweep: Sweep, pairs: Sequence[Verdict], setting: str) -> list[Verdict]:
    """All of a setting, against a baseline in the order of their differences; or where these are too many those with
    the variant of the highest mean."""
    here = [pair for pair in pairs if pair.setting == setting]
    if sweep.baseline:
        return sorted(here, key=lambda pair: -pair.difference)
    if len(here) <= _MOST_PAIRS:
        return here
    rows, drawn = headline_scores(sweep), {name for pair in here for name in (pair.first, pair.second)}
    own = rows[(rows["setting"] == setting) & rows["variant"].isin(drawn)]
    highest = own.groupby("variant", sort=False)["score"].mean().idxmax()
    return [pair for pair in here if highest in (pair.first, pair.second)]


def _means(one: EqualBudget) -> pd.DataFrame:
    """The means on an axis, with whether none is better."""
    columns = ["setting", "axis", "budget", "variant", "n", "mean", "mean_low", "mean_high"]
    means, lost = one.means.dropna(subset="mean")[columns], beaten(one.verdicts)
    names = zip(means["setting"], means["variant"], strict=True)
    return means.assign(unbeaten=[name not in lost for name in names])


def _equal(sweep: Sweep, one: EqualBudget, setting: str) -> str:
    budget = one.budgets[setting]
    measure = unit(one.axis, sweep.limit if one.axis == sweep.axis else budget)
    return f"{one.axis.replace('_', ' ')}: {measure.text(budget)}"


def _draw_interval(
    axes: Axes, place: float, interval: tuple[float, float, float], color: tuple[float, float, float], *, filled: bool
) -> None:
    """Low, value and high on one line; without a bar where there is no interval."""
    low, value, high = interval
    axes.plot([low, high], [place, place], color=color, linewidth=1.5, solid_capstyle="butt")
    face = color if filled else "white"
    axes.plot([value], [place], marker="o", markersize=5, color=color, markerfacecolor=face, markeredgewidth=1.3)


def _heading(axes: Axes, place: float, text: str) -> None:
    across = axes.get_yaxis_transform()
    said = axes.text(0.01, place, text, transform=across, va="center", fontsize=8, color="#444444", style="italic")
    said.set_in_layout(False)


def _label_lines(axes: Axes, places: Sequence[float], labels: Sequence[str], above: float = 0.0) -> None:
    """Names to the left of the lines, the first on top."""
    axes.set_yticks(places, list(map(plain, labels)))
    axes.set_ylim(max(places) + 0.7, min(places) - 0.7 - above)
    axes.tick_params(axis="y", length=0)


def _line(look: Look) -> dict[str, Any]:
    thin = {"linewidth": 0.8, "zorder": 1} if look.faint else {}
    return {"color": look.color, **thin} | ({"dashes": look.dashes} if look.dashes else {})


def _draw_fit(axes: Axes, fit: ScalingFit, look: Look, budget: Unit, place: int) -> None:
    """The curve with its band and points; to the right, at its own place, the asymptote with its interval."""
    if look.faint:
        axes.plot(fit.x / budget.scale, fit.y, **_line(look))
        return
    points, color = _averaged(fit), look.color
    axes.plot(points["x"] / budget.scale, points["y"], ".", color=color, markersize=4, alpha=0.55)
    axes.plot(fit.x / budget.scale, fit.y, **_line(look))
    axes.fill_between(fit.x / budget.scale, fit.low, fit.high, color=color, alpha=0.14, linewidth=0)
    aside = fit.x[-1] / budget.scale * (1.05 + 0.035 * place)
    axes.plot([aside, aside], fit.asymptote[1:], color=color, linewidth=1.5, solid_capstyle="butt")
    axes.plot([aside], [fit.asymptote.value], marker="o", markersize=4, color=color)


def _averaged(fit: ScalingFit) -> pd.DataFrame:
    """Means of x and y over parts of the budget."""
    points = pd.DataFrame(fit.points, columns=["x", "y"])
    part = np.ceil(points["x"] / fit.x[-1] * _PARTS)
    return points.groupby(part).mean()


def _drawn_fits(held: Sequence[ScalingFit]) -> Iterator[dict[str, object]]:
    for fit in held:
        names = {"metric": fit.metric, "axis": fit.axis, "setting": fit.setting, "variant": fit.variant, "n": fit.n}
        for x, y in _averaged(fit).itertuples(index=False):
            yield {**names, "line": "mean", "x": x, "y": y}
        for x, y, low, high in zip(fit.x, fit.y, fit.low, fit.high, strict=True):
            yield {**names, "line": "fit", "x": x, "y": y, "low": low, "high": high}
        asymptote = fit.asymptote
        yield {**names, "line": "asymptote", "y": asymptote.value, "low": asymptote.low, "high": asymptote.high}


def _without_fit(fits: Sequence[ScalingFit]) -> str:
    """Which curves are not there; the table says why."""
    some = {fit.metric for fit in fits if fit.reason is None}
    missing: dict[str, list[str]] = {}
    for fit in fits:
        if fit.reason is not None:
            where = f"{fit.metric} on {fit.setting}" if fit.metric in some else fit.metric
            missing.setdefault(where, []).append(fit.variant if fit.metric in some else "all")
    said = [f"{where} ({', '.join(dict.fromkeys(names))})" for where, names in missing.items()]
    return f"No curve where the fit does not hold (the table says why): {'; '.join(said)}." if said else ""


def _n(counts: pd.Series, noun: str) -> str:
    """How many, of the lines that are drawn."""
    least, most = int(counts.min()), int(counts.max())
    return f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{least if least == most else f'{least} to {most}'} {noun} each"
