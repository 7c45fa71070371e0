"""How figures look: one colour and line style per variant everywhere, readable units, files that do not vary."""

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from harness.analysis.scores import headline_metric, scores
from harness.analysis.sweep import Sweep
from harness.analysis.table import short

_DASHES: Sequence[tuple[float, ...]] = ((), (5, 1.6), (1.4, 1.2), (6, 1.5, 1.4, 1.5), (3, 1), (8, 2, 1, 2, 1, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P")  # as many as there are dashes
_PALETTE = (0, 3, 2, 4, 1, 9, 5, 6, 7, 8)  # seaborn's colour-blind palette, neighbours as unlike as can be
_HIGHLIGHTED = 8  # lines that can be told apart where there are more algorithms than colours
_GREY = (0.72, 0.72, 0.72)
_CAPTION_SIZE = 7.5
_AXES = {"device_seconds": "Device time", "flops": "Compute", "tokens": "Sampled tokens", "queries": "Prompts"}
_SCALES = {
    "flops": ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")),
    "device_seconds": ((3600.0, "h"), (1.0, "s")),
}
_COUNTS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1.0, ""))


@dataclass(frozen=True)
class Look:
    """Of one variant."""

    color: tuple[float, float, float]
    dashes: tuple[float, ...]
    marker: str  # where a variant has points and no line
    faint: bool = False  # one of many, behind those that are highlighted


@dataclass(frozen=True)
class Unit:
    """Of a budget axis: values are divided by `scale`."""

    scale: float
    symbol: str
    label: str

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{short(value / self.scale)} {self.symbol}".strip()


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        name: of its files.
        caption: says n, the statistic and the interval.
        data: the very points that are drawn, in tidy form.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame


@contextmanager
def figure_style() -> Iterator[None]:
    """Everything that draws or saves a figure happens inside."""
    settings = {
        **seaborn.axes_style("whitegrid"),
        **seaborn.plotting_context("paper"),
        "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#555555",
        "axes.titleweight": "bold",
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "svg.fonttype": "path",
        "svg.hashsalt": "levelfield",
        "savefig.dpi": 160,
    }
    with matplotlib.rc_context(settings):
        yield


def looks(sweep: Sweep) -> dict[str, Look]:
    """A look for every variant: the colour tells the algorithm, the line style helps where colours do not print.

    Where there are more algorithms than colours, only the :func:`highlighted` variants have one.
    """
    algorithm_of = dict(zip(sweep.cells["variant"], sweep.cells["algorithm"], strict=True))
    shown = highlighted(sweep)
    algorithms = list(dict.fromkeys(algorithm_of[variant] for variant in shown))
    colorblind = seaborn.color_palette("colorblind", 10)
    palette = [colorblind[index] for index in _PALETTE]
    styles = list(zip(_DASHES, _MARKERS, strict=True))
    searched = len(shown) > len(algorithms)
    seen: dict[str, int] = {}
    result = {variant: Look(_GREY, (), _MARKERS[0], faint=True) for variant in sweep.variants}
    for variant in shown:
        algorithm = algorithm_of[variant]
        index = algorithms.index(algorithm)
        place = seen.get(algorithm, 0) if searched else index
        seen[algorithm] = seen.get(algorithm, 0) + 1
        result[variant] = Look(palette[index % len(palette)], *styles[place % len(styles)])
    return result


@lru_cache(maxsize=1)
def highlighted(sweep: Sweep) -> list[str]:
    """The variants that figures show in colour: all of them, or of too many the baseline and those that score highest.

    Highest by their mean rank over the settings, at the end of the budget. Of several that made the same runs, as some
    do whose parts never come into play, the first stands for all.
    """
    ran = sweep.compared if len(sweep.compared) else sweep.cells
    metric = headline_metric(sweep)
    if ran["algorithm"].nunique() <= len(_PALETTE) or metric is None:
        return sweep.variants
    runs = scores(sweep, metric).pivot_table("score", "variant", ["setting", "seed"], sort=False)
    means = runs.T.groupby("setting").mean().T
    ranks = means.rank(ascending=False).mean(axis=1).sort_values(kind="stable")
    baseline = [sweep.baseline] if sweep.baseline in runs.index else []
    order = runs.loc[[*baseline, *ranks.index.drop(baseline)]].drop_duplicates()
    if len(order) < _HIGHLIGHTED:  # most have no score yet
        return sweep.variants
    return [variant for variant in sweep.variants if variant in order.index[:_HIGHLIGHTED]]


def highlights_note(sweep: Sweep) -> str:
    """What a caption owes the reader about colours, with a space before it; nothing where every variant has one."""
    shown = highlighted(sweep)
    if len(shown) == len(sweep.variants):
        return ""
    first = f"{sweep.baseline}, with which all are compared, and " if sweep.baseline else ""
    count = len(shown) - bool(sweep.baseline)
    return (
        f" In colour: {first}the {count} of the highest mean score at the end of the budget, of equal ones the first; "
        "grey: all others."
    )


def plain(text: str) -> str:
    """Text of a run's making, in which matplotlib is not to find formulas."""
    return text.replace("$", r"\$")


def unit(axis: str, size: float) -> Unit:
    """The unit in which values up to `size` on a budget axis are easy to read."""
    scales = _SCALES.get(axis, _COUNTS)
    scale, symbol = next((entry for entry in scales if math.isfinite(size) and size >= entry[0]), scales[-1])
    name = _AXES.get(axis, axis.replace("_", " ").capitalize())
    return Unit(scale, symbol, f"{name} ({symbol})" if symbol else name)


def budget_text(sweep: Sweep) -> str:
    """The budget that is compared at: one for all, or one for each setting where another axis was chosen."""
    measure = unit(sweep.axis, sweep.limit)
    each = [f"{measure.text(limit)} on {setting}" for setting, limit in sweep.limits.items()]
    return ", ".join(each) or measure.text(sweep.limit)


def save(drawing: Drawing, folder: Path) -> bytes:
    """Write NAME.csv, and NAME.png and NAME.svg with the caption drawn below.

    Returns:
        The SVG without its caption, for a page that sets it.
    """
    figure = drawing.figure
    drawing.data.to_csv(folder / f"{drawing.name}.csv", index=False, lineterminator="\n")
    _settle(figure)
    bare = io.BytesIO()
    figure.savefig(bare, format="svg", metadata={"Date": None})
    _draw_caption(figure, drawing.caption)
    figure.savefig(folder / f"{drawing.name}.svg", format="svg", metadata={"Date": None})
    figure.savefig(folder / f"{drawing.name}.png", format="png")
    return bare.getvalue()


def _settle(figure: Figure) -> None:
    """Lay the panels out for good, rounded: the solver's last bits vary from time to time, and SVG hashes every bit."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(Bbox(axes.get_position().get_points().round(6)))


def _draw_caption(figure: Figure, caption: str) -> None:
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(caption, width=int(width * 17.5))
    below = (len(lines) * _CAPTION_SIZE * 1.35 + 10) / 72
    total = height + below
    figure.set_size_inches(width, total)
    for axes in figure.axes:
        left, bottom, across, up = axes.get_position().bounds
        axes.set_position((left, (below + bottom * height) / total, across, up * height / total))
    figure.text(
        0.1 / width, (below - 4 / 72) / total, plain("\n".join(lines)),
        va="top", ha="left", fontsize=_CAPTION_SIZE, color="#333333", linespacing=1.25,
    )  # fmt: skip
