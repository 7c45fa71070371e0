"""Claims: every comparison and quantity against numbers worked out by hand, every outcome, and YAML that is wrong."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from harness.analysis.claims import Claim, Finding, claims_table, findings, load_claims
from harness.analysis.declared import build
from harness.analysis.hypotheses import Hypothesis, Result, examine
from harness.analysis.intervals import NONE, bootstrap_interval, probability_of_improvement
from harness.analysis.quantities import Cost, Measurement, Score, TimeToTarget
from harness.analysis.sweep import Sweep, read_sweep
from harness.entries import conf_dir
from harness.errors import ConfigError
from tests.analysis.synthetic import Cell, write_sweep
from tests.analysis.toy import Run, toy_sweep

FINAL = Score("evaluations", "held_out", "final", since_start=False)
GAIN = replace(FINAL, since_start=True)
MEASURED = Measurement("measured")


PACES = {"a": [1, 5, 10], "b": [2, 5, 10]}  # what is spent at each evaluation


def runs(variant: str, ends: list[float], start: float = 0.5, **traits) -> list[Run]:
    """A finished run for each seed, whose score goes from the start to an end."""
    return [Run(variant, seed, (start, (start + end) / 2, end), **traits) for seed, end in enumerate(ends)]


def measured(values: dict[str, list[float]], column: str = "measured", setting: str = "tiny") -> Sweep:
    """Runs of two steps, with a column of the metrics whose mean is the value."""
    sweep = toy_sweep([Run(name, seed, setting=setting, rewards=(0, 0)) for name in values for seed in range(9)])
    by_run = {f"{name}-{setting}-s{seed}": value for name, own in values.items() for seed, value in enumerate(own)}
    sweep = replace(sweep, cells=sweep.cells[sweep.cells["run"].isin(by_run)])
    steps = sweep.runs[sweep.runs["run"].isin(by_run)]
    return replace(sweep, runs=steps.assign(**{column: steps["run"].map(by_run) + 0.1 * (2 * steps["step"] - 3)}))


def held(sweep: Sweep, kind: str, names: str, quantity, above=None, below=None, setting: str = "tiny") -> Result:
    hypothesis = Hypothesis(kind, tuple(names.split()), quantity, above, below)
    return examine(sweep, hypothesis, quantity.rows(sweep), setting)


# --- comparisons -----------------------------------------------------------------------------------------------------

A_HALF_APART = measured({"a": [0.6, 0.8, 0.6, 0.8], "b": [0.1, 0.3, 0.3, 0.1], "c": [1.0, 0.0]})
# Differences of a and b: 0.5, 0.5, 0.3, 0.7. Their standard deviation is sqrt(0.08 / 3); t of 3 degrees is 3.1824.
HALF_WIDTH = 3.18244630528 * np.sqrt(0.08 / 3) / 2


def test_a_difference_has_the_paired_t_interval():
    found = held(A_HALF_APART, "difference", "a b", MEASURED, above=0.2)
    assert found.interval == pytest.approx((0.5, 0.5 - HALF_WIDTH, 0.5 + HALF_WIDTH))
    assert (found.n, found.outcome) == (4, "supported")
    assert found.hypothesis == "measured, a minus b: above 0.2"
    assert found.measured == "0.5 (0.24 to 0.76), 4 pairs"


@pytest.mark.parametrize(
    ("above", "below", "outcome"),
    [
        (0.2, None, "supported"),
        (0.3, None, "undecided"),
        (0.77, None, "not supported"),
        (None, 0.77, "supported"),
        (None, 0.7, "undecided"),
        (None, 0.2, "not supported"),
        (0.2, 0.8, "supported"),
        (0.2, 0.7, "undecided"),
        (0.3, 0.7, "undecided"),
        (-0.2, 0.2, "not supported"),
        (0.8, 0.9, "not supported"),
    ],
)
def test_the_interval_decides(above, below, outcome):
    assert held(A_HALF_APART, "difference", "a b", MEASURED, above, below).outcome == outcome


def test_a_level_has_the_studentised_bootstrap_interval_of_the_mean():
    found = held(A_HALF_APART, "level", "a", MEASURED, 0.4, 1.0)
    ends = map(float, bootstrap_interval(np.array([0.6, 0.8, 0.6, 0.8])))
    assert found.interval == pytest.approx((0.7, *ends))
    assert found.outcome == "supported"
    assert found.hypothesis == "measured, a: 0.4 to 1"
    assert found.measured.endswith("), 4 runs")


def test_a_ratio_is_the_geometric_mean_of_the_pairs():
    sweep = measured({"a": [100, 400, 100, 400], "b": [1, 2, 2, 4]})
    found = held(sweep, "ratio", "a b", MEASURED, 30, 300)
    # Ratios 100, 200, 50, 100; logarithms ln 100 and 0, ln 2, -ln 2, 0, whose standard deviation is ln 2 sqrt(2 / 3).
    half = 3.18244630528 * np.log(2) * np.sqrt(2 / 3) / 2
    assert found.interval == pytest.approx((100, 100 * np.exp(-half), 100 * np.exp(half)))
    assert found.outcome == "supported"
    assert held(sweep, "ratio", "b a", MEASURED, 30, 300).outcome == "not supported"
    assert held(sweep, "ratio", "a b", MEASURED, 100, 300).outcome == "undecided"


def test_there_is_no_ratio_to_nothing():
    sweep = measured({"a": [0.1, 0.1, 0.1, 0.1], "b": [0.1, 0.1, 0.1, 0.0]})
    found = held(sweep, "ratio", "a b", MEASURED, above=2)
    assert found.outcome == "not tested here"
    assert found.measured == "measured, a over b: a ratio takes finite numbers above 0"


def test_a_chance_counts_all_pairs_of_runs():
    sweep = measured({"a": [3, 3, 5, 5], "b": [1, 2, 3, 4]})
    found = held(sweep, "chance", "a b", MEASURED, above=0.5)
    assert found.interval == probability_of_improvement(np.array([3, 3, 5, 5]), np.array([1, 2, 3, 4]))
    assert found.interval.value == 13 / 16  # 3 beats two, ties with one; 5 beats four
    assert found.hypothesis == "measured, probability that a has more than b: above 0.5"


@pytest.mark.parametrize(
    ("kind", "names", "reason"),
    [
        ("level", "c", "2 runs of c, where it takes 3"),
        ("difference", "a c", "2 pairs of a and c, where it takes 4"),
        ("ratio", "a c", "2 pairs of a and c, where it takes 4"),
        ("chance", "a c", "2 pairs of a and c, where it takes 4"),
        ("level", "d", "no runs of d"),
        ("difference", "d e", "no runs of d; no runs of e"),
    ],
)
def test_too_few_runs_say_nothing(kind, names, reason):
    found = held(A_HALF_APART, kind, names, MEASURED, above=0.1)
    assert found == Result(found.hypothesis, "not tested here", found.interval, found.n, reason)
    assert np.isnan(found.interval).all()


# --- quantities ------------------------------------------------------------------------------------------------------


def test_a_score_counts_runs_that_diverged_as_the_worst():
    sweep = toy_sweep([*runs("a", [0.9, 0.9, 0.9, 0.9]), *runs("b", [0.9, 0.9, 0.9]), Run("b", 3, status="diverged")])
    found = held(sweep, "difference", "a b", FINAL, above=0.0)
    assert found.interval.value == pytest.approx(0.4 / 4)  # the lowest score of any run is the start's, 0.5
    assert found.measured.endswith(", 4 pairs, 1 counted as the worst")


def test_a_gain_is_over_the_cold_start():
    sweep = toy_sweep([*runs("a", [0.7, 0.8, 0.9]), *runs("b", [0.4, 0.4, 0.4]), Run("b", 3, status="failed")])
    assert held(sweep, "level", "a", GAIN, above=0.1).interval.value == pytest.approx(0.3)
    lost = held(sweep, "level", "b", GAIN, above=0.0)
    assert (lost.outcome, lost.interval.value) == ("not supported", pytest.approx(-0.1))
    assert lost.hypothesis == "gain in held_out over the cold start, b: above 0"


def test_a_gain_is_over_what_the_run_itself_had():
    sweep = toy_sweep([Run("a", seed, (start, start + 0.25)) for seed, start in enumerate((0.125, 0.25, 0.5))])
    assert held(sweep, "level", "a", GAIN, above=0.1).interval == (0.25, 0.25, 0.25)


def test_algorithms_that_all_went_wrong_are_not_compared():
    lost = [Run(name, seed, (0.5,), status="diverged") for name in "bc" for seed in range(4)]
    sweep = toy_sweep([*runs("a", [0.9, 0.9, 0.9, 0.9]), *lost])
    found = held(sweep, "difference", "b c", FINAL, above=0.1)
    assert (found.outcome, found.n) == ("not tested here", 4)
    assert found.measured == "no run of b or c ended well, and all count as the worst"
    assert held(sweep, "difference", "a b", FINAL, above=0.1).outcome == "supported"


def test_runs_that_failed_support_nothing_where_none_ended_otherwise():
    failed = [Run("b", seed, status="failed") for seed in range(4)]
    sweep = toy_sweep([*runs("a", [0.9, 0.9, 0.9, 0.9]), *failed])
    found = held(sweep, "level", "b", GAIN, below=0.1)
    assert found.outcome == "not tested here"
    assert found.measured == "every run of b failed, which says nothing of its learning"
    diverged = toy_sweep([*runs("a", [0.9, 0.9, 0.9, 0.9]), *failed[:3], Run("b", 3, status="diverged")])
    found = held(diverged, "level", "b", GAIN, below=0.1)
    assert (found.outcome, found.worst) == ("supported", 4) and found.measured.endswith("4 counted as the worst")


def test_without_an_evaluation_of_the_cold_start_there_is_no_gain():
    sweep = toy_sweep(runs("a", [0.7, 0.8, 0.9], spent=(1, 5, 10)))
    assert held(sweep, "level", "a", GAIN, above=0).measured == "no run of a has gain in held_out over the cold start"


def test_the_gain_in_reward_begins_with_the_first_rollout_batch():
    sweep = toy_sweep([Run("a", seed, rewards=(0.25, 0.5, 0.75)) for seed in range(3)])
    reward = Score("runs", "reward/mean", "final", since_start=True)
    assert held(sweep, "level", "a", reward, above=0).interval == (0.5, 0.5, 0.5)
    area = replace(reward, summary="area", since_start=False)
    # 0.25 up to 1, then 0.375 and 0.625: their mean over a budget of 3
    assert held(sweep, "level", "a", area, above=0).interval.value == pytest.approx(1.25 / 3)


def test_a_score_without_a_name_is_the_first_task(sweep: Sweep):
    unnamed, named = replace(FINAL, name=None), FINAL
    assert unnamed.label(sweep) == named.label(sweep) == "held_out"
    assert unnamed.rows(sweep).equals(named.rows(sweep))


def test_a_measurement_is_the_mean_over_steps_of_finished_runs():
    sweep = measured({"a": [1, 2, 3, 50]})
    broken = sweep.cells["seed"] == 3
    sweep = replace(
        sweep,
        cells=sweep.cells.assign(status=sweep.cells["status"].mask(broken, "diverged")),
        runs=sweep.runs.assign(status=sweep.runs["status"].mask(sweep.runs["seed"] == 3, "diverged")),
    )
    found = held(sweep, "level", "a", MEASURED, above=0)
    assert found.interval.value == pytest.approx(2)
    assert found.measured.endswith(", 3 runs, 1 left out")
    assert held(sweep, "level", "a", Measurement("absent"), above=0).measured == "no run of a has absent"


def test_a_cost_is_a_sum_of_columns_over_another():
    sweep = toy_sweep(runs("ppo", [0.9, 0.9, 0.9]))
    costs = {"flops/critic": [6.0, 6.0, 9.0], "flops/update": 4.0, "flops/old_logprobs": [2.0, 2.0, 2.0]}
    sweep = replace(sweep, cells=sweep.cells.assign(**costs))
    quantity = Cost(("flops/critic",), ("flops/update", "flops/old_logprobs"))
    found = held(sweep, "level", "ppo", quantity, above=0)
    assert found.interval.value == pytest.approx((1 + 1 + 1.5) / 3)
    assert found.hypothesis.startswith("flops/critic relative to flops/update + flops/old_logprobs, ppo")
    misspelt = Cost(("flops/critic",), ("flops/update", "flops/old_logprob"))
    assert held(sweep, "level", "ppo", misspelt, above=0).outcome == "not tested here"


def test_the_time_to_a_target_is_infinite_where_it_was_not_reached():
    slow, fast = (0.0, 0.0, 0.0, 0.0, 0.5), (0.0, 0.5, 1.0, 1.0, 1.0)
    sweep = toy_sweep(
        [Run(name, seed, rewards=own) for name, own in {"a": fast, "b": slow}.items() for seed in range(4)]
    )
    half, most = (TimeToTarget("runs", "reward/mean", part) for part in (0.5, 0.75))
    assert half.rows(sweep)["score"].tolist() == [2.0] * 4 + [5.0] * 4
    assert most.rows(sweep)["score"].tolist() == [2.5] * 4 + [np.inf] * 4
    assert held(sweep, "chance", "b a", most, above=0.5).outcome == "supported"
    assert held(sweep, "chance", "a b", most, above=0.5).outcome == "not supported"
    assert held(sweep, "difference", "b a", half, above=2).outcome == "supported"
    endless = held(sweep, "difference", "b a", most, above=2)
    assert endless.measured.endswith("b minus a: a difference takes finite numbers")
    assert endless.hypothesis.startswith("flops to 75 % of the best gain in training reward, ")


def test_a_run_that_diverged_has_its_own_time_to_a_target_and_does_not_count_as_the_worst():
    sweep = toy_sweep([Run(name, seed, rewards=(0.0, 0.5, 1.0)) for name in "ab" for seed in range(4)])
    cells = sweep.cells.assign(status=["diverged" if run == "b-tiny-s0" else "done" for run in sweep.cells["run"]])
    found = held(replace(sweep, cells=cells), "chance", "b a", TimeToTarget("runs", "reward/mean", 0.5), above=0.5)
    assert found.measured.endswith(", 4 pairs")


def test_runs_that_are_alike_leave_it_undecided():
    sweep = toy_sweep([Run(name, seed, rewards=(0.0, 0.5, 1.0)) for name in "ab" for seed in range(4)])
    quantity = TimeToTarget("runs", "reward/mean", 0.5)
    assert held(sweep, "chance", "b a", quantity, above=0.5).outcome == "undecided"


# --- claims ----------------------------------------------------------------------------------------------------------


def result(outcome: str) -> Result:
    return Result(f"hypothesis {outcome}", outcome, NONE, 5, f"measured {outcome}")


SUPPORTED, REFUTED, OPEN, UNTESTED = map(result, ("supported", "not supported", "undecided", "not tested here"))
_FAILING = "what is given is not supported: measured not supported"
ANY = Claim("It is so", "a paper", "all", (), (Hypothesis("level", ("a",), FINAL, 0.1, None),))


@pytest.mark.parametrize(
    ("given", "results", "outcome", "words"),
    [
        ([], [SUPPORTED, SUPPORTED], "supported", "measured supported"),
        ([], [SUPPORTED, OPEN], "undecided", "measured supported; measured undecided"),
        ([], [OPEN, REFUTED], "not supported", "measured undecided; measured not supported"),
        ([], [REFUTED, UNTESTED], "not tested here", "measured not tested here"),
        ([SUPPORTED], [REFUTED], "not supported", "measured not supported"),
        (
            [replace(SUPPORTED, worst=2)],
            [SUPPORTED],
            "supported",
            "measured supported; given measured supported",
        ),
        (
            [REFUTED],
            [SUPPORTED],
            "not tested here",
            f"{_FAILING}; all the same measured supported",
        ),
        ([OPEN], [UNTESTED], "not tested here", "what is given is undecided: measured undecided"),
        ([UNTESTED], [SUPPORTED], "not tested here", "measured not tested here"),
    ],
)
def test_a_claim_holds_if_all_of_it_does_and_what_it_presupposes(given, results, outcome, words):
    found = Finding(ANY, "tiny", given, results)
    assert (found.outcome, found.measured) == (outcome, words)


@pytest.mark.parametrize(("models", "settings"), [("all", ["big", "tiny"]), ("dense", ["tiny"]), ("moe", ["big"])])
def test_a_claim_is_about_a_kind_of_model(models, settings):
    moe = measured({"a": [1, 2, 3]}, "moe/expert_change_fraction", setting="big")
    dense = measured({"a": [1, 2, 3]})
    both = {name: pd.concat([getattr(moe, name), getattr(dense, name)]) for name in ("cells", "runs", "evaluations")}
    sweep = replace(moe, settings=["big", "tiny"], **both)
    assert [found.setting for found in findings(sweep, [replace(ANY, models=models)])] == settings


def test_a_claim_about_a_kind_of_model_that_did_not_run_is_not_tested():
    (found,) = findings(toy_sweep(runs("a", [0.9, 0.9, 0.9])), [replace(ANY, models="moe")])
    assert (found.setting, found.outcome) == ("", "not tested here")
    assert found.measured == "no runs of a mixture-of-experts model"


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (runs("b", [0.9, 0.9, 0.9]), "no runs of a"),
        (runs("a", [0.9, 0.9, 0.9], status="skipped"), "a was skipped"),
        (runs("a", [0.9, 0.9, 0.9], status="running"), "no run of a has held_out"),
        (runs("a learning_rate=0.1", [0.9]), "a ran with several settings, of which the claim names none"),
        (runs("ab", [0.9, 0.9, 0.9]), "no runs of a"),
        ([], "no runs of a model"),
    ],
)
def test_what_was_not_tested_has_a_reason(cells, reason):
    (found,) = findings(toy_sweep(cells), [ANY])
    assert (found.outcome, found.measured) == ("not tested here", reason)


# --- the claims that come with the harness ---------------------------------------------------------------------------

GAINS = {  # of the score over the run
    "ppo": 0.2, "gspo": 0.4, "gspo_routing_replay": 0.4, "grpo": -0.1, "grpo_routing_replay": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Five seeds of what the literature says: GRPO fails, GSPO does not, replay recovers GRPO."""
    cells = [
        Cell(name, model, seed, gain=gain)
        for name, gain in GAINS.items()
        for model in ("tiny_dense", "tiny_moe")
        for seed in range(5)
        if model == "tiny_moe" or not name.endswith("replay")
    ]
    return read_sweep(write_sweep(tmp_path_factory.mktemp("results") / "planted", cells))


def test_planted_truth_is_found(planted: Sweep):
    found = {(one.claim.statement, one.setting): one.outcome for one in findings(planted, load_claims())}
    by_words = {
        "higher downstream accuracy": ("supported", "supported"),
        "more training reward": ("supported", "supported"),
        "learns faster": ("supported", "supported"),
        "two orders of magnitude": ("supported", "supported"),  # 0.25 against 0.0015
        "where GRPO does not": (None, "supported"),
        "on which it otherwise fails": (None, "supported"),
        "10 % of the expert choices": (None, "supported"),  # 0.09
        "insensitive": (None, "undecided"),  # equal, but five seeds cannot show it within 0.02
        "rollout engine's own likelihoods": ("not tested here", "not tested here"),
        "critic costs": ("not supported", "not supported"),  # 0.3 of the FLOPs against 0.15 + 0.25
    }
    expected = {
        (statement, setting): outcome
        for words, outcomes in by_words.items()
        for statement in {statement for statement, _ in found if words in statement}
        for setting, outcome in zip(("tiny_dense", "tiny_moe"), outcomes, strict=True)
        if outcome
    }
    assert found == expected


def test_where_both_get_worse_none_learns_faster():
    cells = [Run(name, seed, (0.5, 0.4, 0.3), spent=spent) for name, spent in PACES.items() for seed in range(6)]
    found = held(toy_sweep(cells), "chance", "a b", TimeToTarget("evaluations", "held_out", 0.75), above=0.5)
    assert found.outcome == "not tested here"


def test_the_claims_name_algorithms_that_there_are():
    entries = {file.stem for file in (conf_dir() / "algorithm").glob("*.yaml")}
    claims = load_claims()
    named = {name for claim in claims for part in (*claim.given, *claim.all_of) for name in part.algorithms}
    assert len(claims) == len(list((conf_dir() / "claims").glob("*.yaml"))) and named <= entries
    assert [claim.source for claim in claims] == sorted(claim.source for claim in claims)


def test_the_table_has_a_line_for_every_claim_and_model(planted: Sweep):
    table = claims_table(planted)
    assert table.header == ["claim", "model", "outcome", "measured", "hypothesis", "source"]
    by_model = table.frame.groupby("claim")["model"].apply(list)
    assert by_model[by_model.index.str.contains("higher downstream")].item() == ["tiny_dense", "tiny_moe"]
    replay = table.frame[table.frame["claim"].str.contains("otherwise fails")].to_dict("records")
    assert [line["hypothesis"] for line in replay] == [
        "given gain in held_out over the cold start, grpo: below 0.02; "
        "gain in held_out over the cold start, grpo_routing_replay: above 0.02"
    ]


def test_the_paper_that_all_claims_are_of_is_named_once(planted: Sweep, tmp_path: Path):
    table = claims_table(planted)
    assert set(table.shown["source"]) <= {f"section {place}" for place in ("2", "5.1", "5.2", "5.3", "5.4")}
    assert table.note.endswith(" Sources are in Zheng et al. 2025, arXiv 2507.18071.")
    assert table.frame["source"].str.startswith("Zheng et al. 2025, arXiv 2507.18071, section ").all()
    own = (conf_dir() / "claims" / "clip_fraction.yaml").read_text().replace("Zheng et al.", "Someone else")
    (tmp_path / "own.yaml").write_text(own)
    assert "Sources are in" not in claims_table(replace(planted, claims=tmp_path)).note


def test_claims_about_algorithms_that_were_not_run_are_listed_below_the_table(tmp_path: Path):
    cells = [Cell(name, "tiny_moe", seed) for name in ("grpo", "gspo") for seed in range(4)]
    table = claims_table(read_sweep(write_sweep(tmp_path / "sweep", cells)))
    shown, kept = set(table.shown["claim"]), set(table.frame["claim"])
    assert "GSPO learns faster than GRPO" in shown and shown < kept
    critic = "PPO's critic costs about as much compute and memory as the policy"
    assert f"Not tested, for there are no runs of ppo: {critic} (tiny_moe)." in table.remarks
    folded = {claim for claim in kept - shown if sum(claim in remark for remark in table.remarks) == 1}
    assert folded == kept - shown and not shown & {claim for claim in kept if claim in " ".join(table.remarks)}
    assert not table.shown["measured"].str.startswith("no runs of").any()


def test_claims_about_another_kind_of_model_are_listed_below_the_table(tmp_path: Path):
    cells = [Cell(name, "tiny_dense", seed) for name in ("grpo", "gspo") for seed in range(4)]
    table = claims_table(read_sweep(write_sweep(tmp_path / "sweep", cells)))
    assert set(table.shown["model"]) == {"tiny_dense"}
    assert any(
        remark.startswith("Not tested, for there are no runs of a mixture-of-experts model: ")
        for remark in table.remarks
    )


def test_a_sweep_that_tests_no_claim_has_no_table():
    assert claims_table(toy_sweep(runs("a", [0.9, 0.9, 0.9]))).frame.empty


def test_nothing_is_compared_on_three_seeds(sweep: Sweep):
    outcomes = {
        one.outcome
        for one in findings(sweep, load_claims())
        if any(len(hypothesis.algorithms) > 1 for hypothesis in one.claim.all_of)
    }
    assert outcomes == {"not tested here"}


# --- YAML ------------------------------------------------------------------------------------------------------------

GOOD = {
    "statement": "Mine is better",
    "source": "unpublished",
    "models": "all",
    "given": [],
    "all_of": [
        {
            "kind": "difference",
            "algorithms": ["mine", "grpo"],
            "quantity": {
                "kind": "score",
                "source": "evaluations",
                "name": "held_out",
                "summary": "final",
                "since_start": False,
            },  # fmt: skip
            "above": 0.02,
            "below": None,
        }
    ],
}
REMOVED = object()


def write(folder: Path, claim, name: str = "mine.yaml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(claim if isinstance(claim, str) else yaml.safe_dump(claim))
    return folder


def test_a_folder_adds_claims_and_replaces_namesakes(tmp_path):
    ours = load_claims()
    assert build(Claim, GOOD) in (found := load_claims(write(tmp_path, GOOD))) and len(found) == len(ours) + 1
    found = load_claims(write(tmp_path, GOOD, "reward.yaml"))
    assert len(found) == len(ours) + 1 and not any("more training reward" in claim.statement for claim in found)


def test_a_folder_without_claims_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no claims there; give a folder of YAML files"):
        load_claims(tmp_path / "nowhere")


COST = {"kind": "cost", "of": ["flops/update"], "over": ["flops/update"]}
TIMED = {"kind": "time_to_target", "source": "runs", "name": "reward/mean", "part": 0.5}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("statment", "x", r"statment: no such key; the keys here are statement, source, models, given, all_of"),
        ("source", REMOVED, r"source is absent: the keys here are statement"),
        ("statement", 3, r"statement=3: expected text"),
        ("models", "sparse", r"models='sparse': expected all or dense or moe"),
        ("given", None, r"given=None: expected a list"),
        ("all_of", [], r"all_of=\[\]: give one hypothesis or more"),
        ("all_of.0", "grpo", r"all_of\[0\] is 'grpo': give a mapping of the keys kind, algorithms"),
        ("all_of.0.kind", "quotient", r"all_of\[0\]\.kind=quotient: no such comparison; there are level, difference"),
        ("all_of.0.algorithms", ["grpo"], r"all_of\[0\]\.algorithms=\['grpo'\]: kind=difference takes 2"),
        ("all_of.0.algorithms", ["grpo", "grpo"], r"all_of\[0\]\.algorithms=\['grpo', 'grpo'\]: name two that are not"),
        ("all_of.0.algorithms", "grpo", r"all_of\[0\]\.algorithms='grpo': expected a list"),
        ("all_of.0.algorithms", ["grpo", 1], r"all_of\[0\]\.algorithms\[1\]=1: expected text"),
        ("all_of.0.above", "0.02x", r"all_of\[0\]\.above='0\.02x': expected a finite number or null"),
        ("all_of.0.above", True, r"all_of\[0\]\.above=True: expected a finite number or null"),
        ("all_of.0.above", float("inf"), r"all_of\[0\]\.above=inf: expected a finite number or null"),
        ("all_of.0.above", None, r"all_of\[0\]\.above=None and below=None: give a bound"),
        ("all_of.0.below", 0.01, r"all_of\[0\]\.above=0\.02 and below=0\.01: .* above less than below"),
        ("all_of.0.quantity", "score", r"all_of\[0\]\.quantity\.kind=score: no such kind"),
        (
            "all_of.0.quantity.kind",
            "scores",
            r"quantity\.kind=scores: no such kind; there are score, measurement, cost",
        ),
        ("all_of.0.quantity.summary", "last", r"all_of\[0\]\.quantity\.summary='last': expected final or area"),
        ("all_of.0.quantity.since_start", REMOVED, r"all_of\[0\]\.quantity\.since_start is absent"),
        ("all_of.0.quantity.since_start", 0, r"all_of\[0\]\.quantity\.since_start=0: expected true or false"),
        ("all_of.0.quantity.part", 1.0, r"all_of\[0\]\.quantity\.part: no such key; the keys here are source, name"),
        ("all_of.0.quantity", TIMED | {"part": 1.5}, r"all_of\[0\]\.quantity\.part=1\.5: .* above 0 and at most 1"),
        (
            "all_of.0.quantity",
            TIMED | {"name": None},
            r"all_of\[0\]\.quantity\.name is null, which is for .*evaluations",
        ),
        ("all_of.0.quantity", COST | {"over": []}, r"all_of\[0\]\.quantity\.over=\[\]: name one"),
        (
            "all_of.0.quantity",
            COST | {"over": ["run"]},
            r"all_of\[0\]\.quantity\.over has run: no cost; costs begin with",
        ),
        (
            "all_of.0.quantity",
            {"kind": "measurement", "name": "status"},
            r"all_of\[0\]\.quantity\.name=status: it tells",
        ),
        ("all_of.0.quantity", TIMED | {"name": "label"}, r"all_of\[0\]\.quantity\.name=label: it tells runs and steps"),
    ],
)
def test_a_claim_that_is_wrong_names_file_key_and_mend(tmp_path, path, value, message):
    claim = deepcopy(GOOD)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = claim
    for key in parents:
        place = place[key]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ConfigError, match=rf"mine\.yaml: {'.*' if message.startswith('quantity') else ''}{message}"):
        load_claims(write(tmp_path, claim))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("statement: 'open", r"mine\.yaml: cannot be read as YAML"),
        ("statement: a\nstatement: b\n", r"mine\.yaml: cannot be read as YAML .*statement"),
        ("[1, 2]", r"mine\.yaml: the file is \[1, 2\]: give a mapping of the keys"),
        ("3", r"mine\.yaml: "),
        ("", r"mine\.yaml: statement is absent"),
    ],
)
def test_a_file_that_is_no_claim_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_claims(write(tmp_path, text))
