from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from harness.analysis.decisions import further_seeds
from harness.analysis.scores import Metric, scores
from harness.analysis.sweep import Sweep
from harness.analysis.verdicts import Verdict, headlines, leaders, verdicts
from tests.analysis.toy import Run, toy_sweep

HELD_OUT = Metric("evaluations", "held_out")
BASE = [0.70, 0.72, 0.71, 0.69, 0.73, 0.70]


def ended(variant: str, values: Sequence[float], **others: str) -> list[Run]:
    return [Run(variant, seed, [value], [10], **others) for seed, value in enumerate(values)]


def judge(*runs: Sequence[Run], margin: float = 0.02, baseline: str | None = None) -> list[Verdict]:
    sweep = toy_sweep([run for several in runs for run in several])
    return verdicts(scores(sweep, HELD_OUT), HELD_OUT, sweep.variants, margin, baseline)


def above(by: Sequence[float]) -> list[float]:
    return [base + more for base, more in zip(BASE, by, strict=False)]


# Gaps of 0.04, 0.05 and 0.06 have mean 0.05 and spread 0.00894; t of 0.975 with five degrees of freedom is 2.5706.
CLEAR = above([0.04, 0.05, 0.06, 0.06, 0.05, 0.04])
NEAR = above([0.001, -0.001, 0.002, -0.002, 0.003, 0.0])
UNCLEAR = above([0.10, -0.04, 0.08, -0.06, 0.05, -0.01])


def test_the_better_one_is_named_with_effect_interval_pairs_and_p() -> None:
    (found,) = judge(ended("grpo", CLEAR), ended("gspo", BASE))
    half = 2.5706 * np.sqrt(0.0004 / 5) / np.sqrt(6)
    assert (found.outcome, found.n, found.comparisons, found.further_seeds) == ("better", 6, 1, 0)
    assert (found.difference, found.low, found.high) == pytest.approx((0.05, 0.05 - half, 0.05 + half), abs=1e-5)
    assert found.p_holm < 0.001


def test_the_first_of_a_pair_may_be_the_worse_one() -> None:
    (found,) = judge(ended("gspo", BASE), ended("grpo", CLEAR))
    assert (found.first, found.outcome) == ("gspo", "worse") and found.difference == pytest.approx(-0.05)


def test_a_difference_inside_the_margin_is_none() -> None:
    (found,) = judge(ended("grpo", NEAR), ended("gspo", BASE))
    assert found.outcome == "equivalent" and found.further_seeds == 0
    (strict,) = judge(ended("grpo", NEAR), ended("gspo", BASE), margin=0.001)
    assert strict.outcome == "undecided"


def test_what_is_open_says_what_would_settle_it() -> None:
    (found,) = judge(ended("grpo", UNCLEAR), ended("gspo", BASE))
    spread = float(np.std([0.10, -0.04, 0.08, -0.06, 0.05, -0.01], ddof=1))
    assert found.outcome == "undecided"
    assert found.further_seeds == further_seeds(0.02, spread, 6, 1, 0.02)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_with_too_few_seeds_nothing_is_decided_or_ranked(seeds: int) -> None:
    found = judge(ended("grpo", CLEAR[:seeds]), ended("gspo", BASE))
    (one,) = found
    assert (one.outcome, one.n, one.least, one.further_seeds) == ("too few", seeds, 4, 4 - seeds)
    pairs = "1 pair" if seeds == 1 else f"{seeds} pairs"
    assert leaders(found) == {"tiny": []}
    assert headlines(found) == [
        f"On tiny, nothing is ranked on held_out: {pairs} of runs with a score, where it takes 4."
    ]


def test_more_comparisons_take_more_seeds_and_stronger_evidence() -> None:
    two, four = (
        judge(ended("a", above([0.02, 0.03, 0.01, 0.04])), *(ended(name, BASE[:4]) for name in others))
        for others in (["b"], ["b", "c", "d"])
    )
    assert two[0].outcome == "better" and two[0].p_holm == two[0].p
    assert four[0].outcome == "too few" and (four[0].comparisons, four[0].least) == (6, 5)
    assert four[0].p_holm == pytest.approx(6 * four[0].p)


def test_what_is_decided_already_makes_the_rest_easier() -> None:
    found = judge(ended("a", CLEAR), ended("b", BASE), ended("c", UNCLEAR))
    assert [one.outcome for one in found] == ["better", "undecided", "undecided"]
    last = found[2]
    spread = float(np.std([0.10, -0.04, 0.08, -0.06, 0.05, -0.01], ddof=1))
    assert last.further_seeds == further_seeds(last.difference, spread, 6, 2, 0.02)  # two of the three are open
    assert last.further_seeds != further_seeds(last.difference, spread, 6, 3, 0.02)


def test_against_a_baseline_only_its_pairs_are_compared() -> None:
    found = judge(ended("ppo", BASE), ended("grpo", CLEAR), ended("gspo", NEAR), baseline="ppo")
    assert [(one.first, one.second, one.comparisons) for one in found] == [("grpo", "ppo", 2), ("gspo", "ppo", 2)]
    assert judge(ended("ppo", BASE), ended("grpo", CLEAR), baseline="absent") == []


def test_against_a_baseline_nothing_is_said_of_the_others_among_themselves() -> None:
    runs = [ended("base", BASE), ended("a", CLEAR), ended("b", CLEAR), ended("c", NEAR), ended("d", UNCLEAR)]
    assert headlines(judge(*runs, baseline="base"), "base") == [
        "On tiny, compared with base on held_out. Higher: a, b. Within 0.02 of it: c. Undecided: d."
    ]
    (few,) = headlines(judge(ended("base", BASE[:2]), ended("a", CLEAR[:2]), baseline="base"), "base")
    assert few == "On tiny, compared with base on held_out. Not ranked, for it takes 4 pairs of runs: a."


def test_runs_that_diverged_lose_and_are_named() -> None:
    broken = [replace(run, status="diverged") for run in ended("gspo", BASE)[:2]]
    waiting = Run("gspo", 6, [0.9], [10], status="running")
    (found,) = judge(ended("grpo", CLEAR), broken, ended("gspo", BASE)[2:], [waiting, Run("grpo", 6, [0.9], [10])])
    assert (found.n, found.worst) == (6, 2)  # the one that is not over has no score


def test_runs_that_all_diverged_are_not_alike_but_undecided() -> None:
    broken = [[replace(run, status="diverged") for run in ended(name, BASE)] for name in "bc"]
    found = judge(ended("a", CLEAR), *broken)
    assert [(one.outcome, one.worst) for one in found] == [("better", 6), ("better", 6), ("undecided", 12)]
    assert (found[2].difference, found[2].further_seeds) == (0, None)
    (few,) = judge(broken[0][:2], broken[1][:2])
    assert few.outcome == "too few"


def test_those_with_enough_runs_are_ranked_and_the_others_named() -> None:
    found = judge(ended("a", CLEAR), ended("b", BASE), ended("c", NEAR), ended("d", CLEAR[:1]))
    assert [one.outcome for one in found if "d" in (one.first, one.second)] == ["too few"] * 3
    assert leaders(found) == {"tiny": ["a"]}
    assert headlines(found) == [
        "On tiny, a scores higher than every other on held_out. Decided: a scores higher than b (by 0.050, 0.041 to "
        "0.059); a scores higher than c (by 0.050, 0.040 to 0.059). Not ranked, for it takes 5 pairs of runs: d."
    ]


def test_of_two_that_lack_runs_with_each_other_neither_is_ranked_before_the_other() -> None:
    late = [replace(run, seed=run.seed + 6) for run in ended("c", BASE)]
    found = judge(ended("a", CLEAR) + [Run("a", seed + 6, [0.9], [10]) for seed in range(6)], ended("b", BASE), late)
    assert [one.outcome for one in found] == ["better", "better", "too few"]
    assert leaders(found) == {"tiny": []} and headlines(found)[0].startswith("On tiny, nothing is ranked")


def test_the_leaders_are_those_that_none_is_better_than() -> None:
    found = judge(ended("a", CLEAR), ended("b", [value + 0.001 for value in CLEAR]), ended("c", BASE))
    assert leaders(found) == {"tiny": ["a", "b"]}
    assert headlines(found) == [
        "On tiny, a and b differ by less than 0.02 on held_out, and no other scores higher. Decided: a scores higher "
        "than c (by 0.050, 0.041 to 0.059); b scores higher than c (by 0.051, 0.042 to 0.060)."
    ]
    (pair,) = headlines(judge(ended("a", BASE), ended("b", CLEAR)))
    assert pair == "On tiny, on held_out: b scores higher than a (by 0.050, 0.041 to 0.059)."
    many = [ended(name, [value - 0.05 * place for value in CLEAR]) for place, name in enumerate("abcde")]
    assert headlines(judge(*many))[0].endswith("every other on held_out. 10 of 10 pairs are decided (see the table).")
    alone = judge(ended("a", CLEAR), ended("b", BASE), ended("c", NEAR))
    assert headlines(alone)[0].startswith("On tiny, a scores higher than every other on held_out. Decided: a")
    unclear = judge(ended("a", UNCLEAR), ended("b", BASE))
    assert headlines(unclear) == ["On tiny, which of a and b scores highest on held_out is undecided."]
    ahead_of_one = judge(ended("a", CLEAR), ended("b", above([0.14, -0.04, 0.10, 0.01, 0.02, -0.05])), ended("c", BASE))
    assert headlines(ahead_of_one)[0].startswith(
        "On tiny, which of a and b scores highest on held_out is undecided. Decided: a scores higher than c (by"
    )


def test_settings_are_judged_each_by_itself() -> None:
    found = judge(
        ended("a", CLEAR), ended("b", BASE), ended("a", BASE, setting="large"), ended("b", CLEAR, setting="large")
    )
    assert [(one.setting, one.outcome, one.comparisons) for one in found] == [
        ("tiny", "better", 1),
        ("large", "worse", 1),
    ]
    assert leaders(found) == {"tiny": ["a"], "large": ["b"]}
    assert [one.outcome for one in found] == ["better", "worse"]


@pytest.mark.parametrize(("other", "then"), [(0.5, "equivalent"), (0.25, "better")])
def test_scores_without_a_spread_take_as_many_pairs_as_any_do(other: float, then: str) -> None:
    (few,) = judge(ended("a", [0.5] * 3), ended("b", [other] * 3))
    assert (few.outcome, few.further_seeds) == ("too few", few.least - 3)
    (enough,) = judge(ended("a", [0.5] * few.least), ended("b", [other] * few.least))
    assert enough.outcome == then


def test_three_seeds_on_disk_rank_nothing(sweep: Sweep) -> None:
    found = verdicts(scores(sweep, HELD_OUT), HELD_OUT, sweep.variants)
    assert len(found) == 3 + 6 and {one.outcome for one in found} == {"too few"}
    assert leaders(found) == {"tiny_dense": [], "tiny_moe": []}
