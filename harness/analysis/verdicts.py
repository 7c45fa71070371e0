"""Who is better, by how much, how sure, and what would settle what is open: verdicts on pairs of variants, in words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from harness.analysis.decisions import (
    LEVEL,
    Differences,
    differences,
    further_seeds,
    holm,
    least_pairs,
    outcomes,
)
from harness.analysis.scores import Metric, counts, none_ended_well, paired, pairs

Outcome = Literal["better", "worse", "equivalent", "undecided", "too few"]
_LISTED = 6  # decided pairs that a sentence names
_FEWEST = 3  # pairs whose spread says enough to plan with


@dataclass(frozen=True)
class Verdict:
    """What the runs say of one pair in one setting; `outcome` is that of `first` against `second`.

    Attributes:
        metric: its label.
        difference, low, high: mean of first - second over n pairs and its 95 % interval, which is not corrected; NaN of
            fewer than two pairs.
        p, p_holm: of the paired t test, and after Holm for the `comparisons` of the setting; NaN likewise.
        margin: differences inside of it do not matter.
        least: pairs below which nothing is decided (:func:`harness.analysis.decisions.least_pairs`).
        further_seeds: that would decide it with a probability of 80 %, if difference and spread are as measured (at
            least `least - n`); 0 where it is decided, None where more than 1,000, or where no run ended well.
        worst: runs of the two that count as the worst because they diverged or failed.
    """

    setting: str
    metric: str
    first: str
    second: str
    outcome: Outcome
    difference: float
    low: float
    high: float
    n: int
    p: float
    p_holm: float
    comparisons: int
    margin: float
    least: int
    further_seeds: int | None
    worst: int


def verdicts(
    rows: pd.DataFrame,
    metric: Metric,
    variants: Sequence[str],
    margin: float | None = None,
    baseline: str | None = None,
) -> list[Verdict]:
    """Compare the variants of each setting, all with all, or all with a baseline.

    Args:
        rows: as :func:`harness.analysis.scores.scores` returns them.
        variants: in the order in which pairs are named.
        margin: the metric's own if None; a difference whose interval lies inside ±margin counts as none, even if it is
            certain.
    """
    margin = metric.margin if margin is None else margin
    found = []
    for setting, here in rows.groupby("setting", sort=False):
        compared = pairs(here, variants, baseline)
        scores = [paired(here, first, second) for first, second in compared]
        tested = [differences(x, y) for x, y in scores]
        corrected = holm(np.array([one.p for one in tested]))
        undecided = max(1, len(compared) - int((corrected <= LEVEL).sum()))
        least = least_pairs(len(compared)) if compared else 0
        for (first, second), (x, _), one, p_holm in zip(compared, scores, tested, corrected, strict=True):
            about, n = counts(here[here["variant"].isin([first, second])]), len(x)
            outcome: Outcome = outcomes(one, p_holm, margin).item() if n >= least else "too few"
            lost = n >= least and none_ended_well(here, first, second)
            verdict = Verdict(
                setting=str(setting),
                metric=metric.label,
                first=first,
                second=second,
                outcome="undecided" if lost else outcome,
                difference=float(one.mean),
                low=float(one.low),
                high=float(one.high),
                n=n,
                p=float(one.p),
                p_holm=float(p_holm),
                comparisons=len(compared),
                margin=margin,
                least=least,
                further_seeds=None if lost else _further(outcome, one, n, undecided, margin, least),
                worst=about["worst"],
            )
            found.append(verdict)
    return found


def leaders(found: Sequence[Verdict]) -> dict[str, list[str]]:
    """By setting: the ranked variants that none is better than; empty where there are too few runs to rank anything.

    Ranked are those that all have enough pairs of runs with each other.
    """
    lost = beaten(found)
    return {
        setting: [name for name in _ranked(here) if (setting, name) not in lost]
        for setting, here in _by_setting(found).items()
    }


def beaten(found: Sequence[Verdict]) -> set[tuple[str, str]]:
    """(setting, variant) of those that another is better than."""
    losers = {"better": "second", "worse": "first"}
    return {(one.setting, getattr(one, losers[one.outcome])) for one in found if one.outcome in losers}


def headlines(found: Sequence[Verdict], baseline: str | None = None) -> list[str]:
    """One sentence per setting: who leads, as far as the runs tell, or how all compare with the baseline."""
    if baseline is not None:
        return [_against(here, baseline) for here in _by_setting(found).values()]
    return [_headline(here, leaders(here)[setting], _ranked(here)) for setting, here in _by_setting(found).items()]


def _further(outcome: Outcome, seen: Differences, n: int, comparisons: int, margin: float, least: int) -> int | None:
    if outcome not in ("undecided", "too few"):
        return 0
    if n < _FEWEST:
        return least - n
    more = further_seeds(float(seen.mean), float(seen.spread), n, comparisons, margin)
    return None if more is None else max(more, least - n)


def _by_setting(found: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    settings = dict.fromkeys(verdict.setting for verdict in found)
    return {setting: [verdict for verdict in found if verdict.setting == setting] for setting in settings}


def _names(here: Sequence[Verdict]) -> list[str]:
    return list(dict.fromkeys(name for verdict in here for name in (verdict.first, verdict.second)))


def _ranked(here: Sequence[Verdict]) -> list[str]:
    """The variants of a setting without those that lack runs with the most others, until none lacks any."""
    names = _names(here)
    few = [(verdict.first, verdict.second) for verdict in here if verdict.outcome == "too few"]
    while few:
        lacking = Counter(name for pair in few for name in pair)
        names = [name for name in names if lacking[name] < max(lacking.values())]
        few = [pair for pair in few if set(pair) <= set(names)]
    return names if len(names) > 1 else []


def _headline(here: Sequence[Verdict], leading: Sequence[str], ranked: Sequence[str]) -> str:
    one = here[0]
    if not leading:
        runs = f"{_count(min(verdict.n for verdict in here), 'pair')} of runs with a score"
        return f"On {one.setting}, nothing is ranked on {one.metric}: {runs}, where it takes {one.least}."
    left_out = [name for name in _names(here) if name not in ranked]
    among = [verdict for verdict in here if verdict.first in ranked and verdict.second in ranked]
    absent = f" Not ranked, for it takes {one.least} pairs of runs: {', '.join(left_out)}." if left_out else ""
    return _in_front(among, leading) + absent


def _in_front(here: Sequence[Verdict], leading: Sequence[str]) -> str:
    """Which of the ranked variants lead, and which pairs are decided."""
    one, where = here[0], f"On {here[0].setting}"
    if len(leading) == 1:
        behind = [verdict for verdict in here if leading[0] in (verdict.first, verdict.second)]
        if not all(verdict.outcome in ("better", "worse") for verdict in behind):
            first = f"{where}, none scores higher than {leading[0]} on {one.metric}, which is not ahead of every other."
        elif len(behind) == 1:
            return f"{where}, on {one.metric}: {_decided(behind)}."
        else:
            first = f"{where}, {leading[0]} scores higher than every other on {one.metric}."
        return f"{first}{_also(here)}"
    names = f"{', '.join(leading[:-1])} and {leading[-1]}"
    between = [verdict for verdict in here if verdict.first in leading and verdict.second in leading]
    if all(verdict.outcome == "equivalent" for verdict in between):
        others = ", and no other scores higher" if len(between) < len(here) else ""
        first = f"{where}, {names} differ by less than {one.margin:g} on {one.metric}{others}."
    else:
        first = f"{where}, which of {names} scores highest on {one.metric} is undecided."
    return f"{first}{_also(here)}"


def _also(here: Sequence[Verdict]) -> str:
    """The pairs that are decided, if there are any, as a sentence with a space before it."""
    decided = [verdict for verdict in here if verdict.outcome in ("better", "worse")]
    if len(decided) > _LISTED:
        return f" {len(decided)} of {len(here)} pairs are decided (see the table)."
    return f" Decided: {_decided(decided)}." if decided else ""


def _decided(pairs: Sequence[Verdict]) -> str:
    said = []
    for one in pairs:
        winner, loser = (one.first, one.second) if one.outcome == "better" else (one.second, one.first)
        low, high = sorted(map(abs, (one.low, one.high)))
        said.append(f"{winner} scores higher than {loser} (by {abs(one.difference):.3f}, {low:.3f} to {high:.3f})")
    return "; ".join(said)


def _against(here: Sequence[Verdict], baseline: str) -> str:
    """How the others compare with the baseline, which is the second of every pair."""
    one = here[0]
    words = {
        "better": "Higher", "worse": "Lower", "equivalent": f"Within {one.margin:g} of it", "undecided": "Undecided",
        "too few": f"Not ranked, for it takes {one.least} pairs of runs",
    }  # fmt: skip
    by_outcome = {outcome: [verdict.first for verdict in here if verdict.outcome == outcome] for outcome in words}
    said = [f"{words[outcome]}: {', '.join(names)}." for outcome, names in by_outcome.items() if names]
    return f"On {one.setting}, compared with {baseline} on {one.metric}. {' '.join(said)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
