import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness.analysis.figures import (
    all_figures,
    clip_fraction,
    downstream_accuracy,
    equal_budget,
    expert_change,
    pairwise,
    step_reward,
    training_reward,
    true_reward,
)
from harness.analysis.phases import budget_by_phase
from harness.analysis.style import Drawing, figure_style, highlighted, looks, save, unit
from harness.analysis.sweep import Sweep, read_sweep
from tests.analysis.synthetic import ALGORITHMS, Cell, write_sweep
from tests.analysis.toy import Run, headlined


@pytest.fixture(scope="module")
def drawings(sweep: Sweep) -> dict[str, Drawing]:
    with figure_style():
        return {drawing.name: drawing for drawing in all_figures(sweep)}


def legend_labels(figure: Figure) -> set[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return {text.get_text() for legend in legends if legend for text in legend.get_texts()}


def test_every_figure_is_there(drawings: dict[str, Drawing]) -> None:
    assert list(drawings) == [
        "training_reward", "downstream_accuracy", "pairwise", "equal_budget", "performance_profile", "scaling_fit",
        "clip_fraction", "expert_change", "budget_by_phase", "training_dynamics",
    ]  # fmt: skip


def test_captions_say_n_statistic_and_interval(drawings: dict[str, Drawing]) -> None:
    for name, drawing in drawings.items():
        assert re.search(r"n\s=\s[23]|n stands beside", drawing.caption), name
        assert re.search("mean|share of runs", drawing.caption), name
        assert re.search("95 % ([a-z]+ )?interval", drawing.caption), name
    assert "n\xa0=\xa02 for ppo on tiny_dense" in drawings["training_reward"].caption


def test_what_is_not_drawn_is_said(drawings: dict[str, Drawing]) -> None:
    caption = drawings["training_reward"].caption
    assert "ppo on tiny_dense (1 failed); grpo_replay on tiny_dense (3 skipped)" in caption
    assert "2 runs that did not finish are thin lines ending in ×" in caption


def test_steps_at_zero_are_counted_where_a_log_axis_hides_them(drawings: dict[str, Drawing]) -> None:
    assert "12 of 120 of grpo on tiny_dense" in drawings["clip_fraction"].caption
    assert drawings["clip_fraction"].figure.axes[0].get_yscale() == "log"


def test_the_clip_fractions_mean_is_in_the_legend(sweep: Sweep, drawings: dict[str, Drawing]) -> None:
    rows = sweep.runs.query("variant == 'gspo' and setting == 'tiny_dense'")
    mean = rows.groupby("run")["clip_fraction/token"].mean().mean()
    assert f"gspo, mean {mean:.2g}" in legend_labels(drawings["clip_fraction"].figure)


def test_replayed_choices_are_drawn_beside_the_native_ones(drawings: dict[str, Drawing]) -> None:
    assert "drawn too, for grpo_replay on tiny_moe, mean 0." in drawings["expert_change"].caption


@pytest.mark.parametrize("name", ["training_reward", "downstream_accuracy", "clip_fraction", "expert_change"])
def test_the_data_of_a_figure_are_the_points_that_it_draws(drawings: dict[str, Drawing], name: str) -> None:
    drawing = drawings[name]
    lines = [line for axes in drawing.figure.axes for line in axes.lines if len(line.get_xdata()) > 2]
    drawn = sorted([round(float(x), 9) for x in line.get_xdata()] for line in lines)
    data = drawing.data.groupby(["metric", "setting", "variant", "line"]).filter(lambda rows: len(rows) > 2)
    groups = [rows for _, rows in data.groupby(["metric", "setting", "variant", "line"])]
    assert drawn == sorted([round(x / 1e12, 9) for x in rows["x"]] for rows in groups)
    heights = {round(float(y), 9) for line in lines for y in line.get_ydata() if y > 0}
    assert heights == {round(y, 9) for y in data["y"] if y > 0 or name != "clip_fraction"} - {0.0}


def test_data_say_what_each_point_is(drawings: dict[str, Drawing]) -> None:
    data = drawings["training_reward"].data
    mean = data.query("variant == 'gspo' and setting == 'tiny_dense'")
    assert set(mean["line"]) == {"mean"} and set(mean["n"]) == {3} and (mean["low"] < mean["high"]).all()
    alone = data.query("variant == 'ppo' and setting == 'tiny_dense'")
    assert alone["line"].nunique() == 2 and set(alone["n"]) == {1} and alone["low"].isna().all()
    assert set(data["metric"]) == {"reward/mean"} and set(data["axis"]) == {"flops"}
    start = drawings["downstream_accuracy"].data.query("line == 'cold start' and metric == 'held_out'")
    assert start["y"].tolist() == pytest.approx([0.551, 0.551], abs=1e-3)


def test_no_mean_curve_goes_past_the_limit(drawings: dict[str, Drawing]) -> None:
    for axes in drawings["training_reward"].figure.axes:
        assert max(max(line.get_xdata()) for line in axes.lines) <= 1.0  # TFLOP


def test_a_log_axis_has_room_for_the_bands(sweep: Sweep, drawings: dict[str, Drawing]) -> None:
    data, axes = drawings["clip_fraction"].data, drawings["clip_fraction"].figure.axes[0]
    assert axes.get_ylim()[1] > data["high"].max() > 1.6 * data["y"].max()


def test_names_of_two_algorithms_that_replay_are_legible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "gspo_replay", ALGORITHMS["grpo_replay"])
    cells = [Cell(name, "tiny_moe", seed) for name in ("grpo_replay", "gspo_replay") for seed in range(3)]
    drawing = expert_change(read_sweep(write_sweep(tmp_path / "sweep", cells)))
    assert drawing is not None
    first, second = drawing.figure.axes[1].texts
    shown = FigureCanvasAgg(drawing.figure).get_renderer()
    boxes = [text.get_window_extent(shown) for text in (first, second)]
    assert not boxes[0].overlaps(boxes[1])


def test_points_that_no_line_joins_are_told_apart_and_inside_the_panel() -> None:
    runs = [Run(f"a {rate}", 0, [0.5 + rate / 10], [9.9 + rate / 100]) for rate in range(3)]
    sweep = headlined(runs)
    sweep = replace(sweep, cells=sweep.cells.assign(algorithm="a"), runs=sweep.evaluations)
    sweep = replace(sweep, evaluations=sweep.evaluations.assign(fraction=1.0, n=256, stderr=0.03))
    drawing = downstream_accuracy(sweep)
    assert drawing is not None
    axes = drawing.figure.axes[0]
    marks = {line.get_marker() for line in axes.lines if line.get_marker() not in ("None", "x")}
    assert len(marks) == 3
    assert {handle.get_marker() for handle in drawing.figure.legends[0].legend_handles} == marks
    assert axes.get_xlim()[1] > 1.02 * 9.92
    assert "cold start" not in drawing.caption


def test_dollars_are_no_formulas(tmp_path: Path) -> None:
    cells = [Cell("a$b_{$", "$x^$", seed) for seed in range(3)] + [Cell("b", "$x^$", seed) for seed in range(3)]
    with figure_style():
        for drawing in all_figures(read_sweep(write_sweep(tmp_path / "sweep", cells))):
            save(drawing, tmp_path)
    assert (tmp_path / "pairwise.png").exists()


def test_long_names_leave_the_panels_their_width(tmp_path: Path) -> None:
    names = [f"{'a_rather_long_name_' * 3}{number}" for number in range(3)]
    cells = [
        Cell(name, "a_model_with_a_rather_long_name_that_somebody_chose", seed) for name in names for seed in range(3)
    ]
    found = read_sweep(write_sweep(tmp_path / "sweep", cells))
    with figure_style():
        for drawing in all_figures(found):
            save(drawing, tmp_path)
            figure = drawing.figure
            shown = FigureCanvasAgg(figure).get_renderer()
            for axes in figure.axes:
                assert axes.get_window_extent(shown).width > 1.4 * figure.dpi, drawing.name
                drawn = [*axes.get_yticklabels(), axes.title, *filter(None, [axes.get_legend()])]
                for box in (one.get_window_extent(shown) for one in drawn):
                    assert 0 <= box.x0 and box.x1 <= figure.bbox.width, drawing.name


def test_algorithms_that_the_code_never_heard_of_are_drawn(tmp_path: Path) -> None:
    names = [f"invented_{number}" for number in range(10)]
    cells = [Cell(name, "my_model", seed) for name in names for seed in range(3)]
    found = read_sweep(write_sweep(tmp_path / "sweep", cells))
    reward, phases = training_reward(found), budget_by_phase(found)
    assert reward and legend_labels(reward.figure) == set(names)
    ticks = {label.get_text() for label in phases.figure.axes[0].get_yticklabels()} if phases else set()
    assert ticks == {f"{name} (n = 3)" for name in names}


@pytest.fixture(scope="module")
def misled(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two tasks: one with reward errors, the other with rewards for steps that one algorithm declines."""
    cells = [
        Cell(algorithm, "tiny_dense", seed, task=task, misled=0.4 * (task == "biased"), step_reward=task == "steps")
        for algorithm in ("grpo", "gspo")
        for task in ("biased", "steps")
        for seed in range(3)
    ]
    for cell in cells[-3:]:
        cell.status, cell.reason, cell.steps = "skipped", "one ratio a sequence", 0
    return read_sweep(write_sweep(tmp_path_factory.mktemp("results") / "sweep", cells))


def ends(drawing: Drawing | None) -> dict[str, dict[tuple[float, ...], float]]:
    """By panel title: where each line ends, by colour."""
    assert drawing
    return {
        axes.get_title(): {line.get_color(): float(line.get_ydata()[-1]) for line in axes.lines}
        for axes in drawing.figure.axes
    }


def test_each_task_has_a_panel_of_its_own(misled: Sweep) -> None:
    with figure_style():
        for drawing in all_figures(misled):
            tasks = {axes.get_title().replace("/", "\n").rpartition("\n")[2] for axes in drawing.figure.axes}
            assert tasks <= {"biased", "steps", ""}, drawing.name
            assert "biased" in tasks or drawing.name == "step_reward"
            # On steps there is no pair, since one of the two declined, and no fit that holds.
            assert "steps" in tasks or drawing.name in ("pairwise", "scaling_fit")
    panels = ends(training_reward(misled))
    assert {title: len(lines) for title, lines in panels.items()} == {"tiny_dense\nbiased": 2, "tiny_dense\nsteps": 1}


def test_the_true_reward_is_drawn_apart_where_it_differs(misled: Sweep, drawings: dict[str, Drawing]) -> None:
    trained, true = ends(training_reward(misled)), ends(true_reward(misled))
    for color, end in trained["tiny_dense\nbiased"].items():
        assert true["tiny_dense\nbiased"][color] == pytest.approx(end - 0.4 * 40 / 40.5, abs=0.01)
    assert true["tiny_dense\nsteps"] == trained["tiny_dense\nsteps"]
    drawing = training_reward(misled)
    assert drawing and "with the reward model's errors" in drawing.caption
    assert "true_reward" not in drawings and "errors" not in drawings["training_reward"].caption


def test_the_reward_of_steps_is_drawn_where_there_are_any(misled: Sweep, drawings: dict[str, Drawing]) -> None:
    drawing = step_reward(misled)
    assert list(ends(drawing)) == ["tiny_dense\nsteps"]
    assert drawing and "gspo on tiny_dense/steps (3 skipped)" in drawing.caption
    assert "step_reward" not in drawings


def test_without_experts_there_is_no_figure_of_them(tmp_path: Path) -> None:
    assert expert_change(read_sweep(write_sweep(tmp_path / "sweep", [Cell("gspo", "tiny_dense", 0)]))) is None


def test_a_look_belongs_to_one_variant_only(sweep: Sweep) -> None:
    found = looks(sweep)
    assert list(found) == sweep.variants
    assert len({(look.color, look.dashes) for look in found.values()}) == len(sweep.variants)


def test_a_sweep_that_has_not_begun_has_no_figures(tmp_path: Path) -> None:
    cells = [Cell("gspo", "tiny_moe", 0, status="planned", steps=0)]
    found = read_sweep(write_sweep(tmp_path / "sweep", cells))
    assert all_figures(found) == []
    for draw in (training_reward, clip_fraction, expert_change):
        assert draw(found) is None


@pytest.mark.parametrize(
    ("axis", "value", "text"),
    [
        ("flops", 2.5e12, "2.5 TFLOP"),
        ("flops", 9e8, "900 MFLOP"),
        ("device_seconds", 60, "60 s"),
        ("device_seconds", 1800, "1,800 s"),
        ("device_seconds", 7200, "2 h"),
        ("tokens", 5e5, "500 thousand"),
        ("updates", 200, "200"),
    ],
)
def test_budgets_are_written_in_readable_units(axis: str, value: float, text: str) -> None:
    assert unit(axis, value).text(value) == text


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Twelve algorithms, each better than the one before it, but for the last, which makes the runs of the eleventh."""
    names = [f"a{place:02}" for place in range(12)]
    cells = [Cell(name, "tiny_dense", seed, gain=0.3 * int(name[1:])) for name in names for seed in range(3)]
    root = write_sweep(tmp_path_factory.mktemp("crowd") / "sweep", cells)
    copies = {cell.seed: cell for cell in cells if cell.algorithm == "a10"}
    for cell in cells[-3:]:
        shutil.copy(root / copies[cell.seed].name / "evaluations.jsonl", root / cell.name / "evaluations.jsonl")
    return read_sweep(root)


def test_of_more_algorithms_than_colours_the_best_have_one(crowd: Sweep) -> None:
    best = [f"a{place:02}" for place in range(3, 11)]
    assert highlighted(crowd) == best
    look = looks(crowd)
    assert [name for name in crowd.variants if not look[name].faint] == best
    assert len({look[name].color for name in best}) == len(best)
    drawing = training_reward(crowd)
    assert drawing is not None and "the 8 of the highest mean score" in drawing.caption
    (legend,) = drawing.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*best, "4 others"]
    (axes,) = drawing.figure.axes
    assert len(axes.lines) == 12 and len(axes.collections) == 8  # a band for each that has a colour
    assert set(drawing.data["variant"]) == set(crowd.variants)


def test_runs_that_did_not_finish_are_drawn_of_the_others_too(crowd: Sweep) -> None:
    lost = crowd.cells.loc[(crowd.cells["algorithm"] == "a00") & (crowd.cells["seed"] == 0), "run"]
    runs, cells = (
        frame.assign(status=frame["status"].where(~frame["run"].isin(lost), "diverged"))
        for frame in (crowd.runs, crowd.cells)
    )
    drawing = training_reward(replace(crowd, runs=runs, cells=cells))
    assert drawing is not None and "1 run that did not finish is a thin line ending" in drawing.caption
    crosses = [line for line in drawing.figure.axes[0].lines if line.get_marker() == "x"]
    assert [line.get_color() for line in crosses] == [looks(crowd)["a00"].color]


def test_before_there_are_scores_all_have_a_colour(crowd: Sweep) -> None:
    begun = {name: getattr(crowd, name).assign(status="running") for name in ("cells", "runs", "evaluations")}
    early = replace(crowd, **begun)
    assert highlighted(early) == crowd.variants


def test_a_baseline_has_a_colour_among_many(crowd: Sweep) -> None:
    against = replace(crowd, baseline="a00")
    assert highlighted(against) == ["a00", *(f"a{place:02}" for place in range(4, 11))]
    drawing = pairwise(against)
    assert drawing is not None
    assert list(drawing.data["first"]) == ["a10", "a11", *(f"a{place:02}" for place in range(9, 0, -1))]


def test_the_axes_of_many_variants_stand_beside_each_other_in_the_order_of_the_means(crowd: Sweep) -> None:
    drawing = equal_budget(crowd)
    assert drawing is not None and "In the order of the means at equal flops" in drawing.caption
    first, *others = drawing.figure.axes
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert labels == ["a10", "a11", *(f"a{place:02}" for place in range(9, -1, -1))]
    assert "equal flops" in first.get_title() and {"equal device seconds"} <= {
        axes.get_title().split("\n")[1].rstrip(":") for axes in others
    }


def test_a_phase_has_its_colour_in_every_report(tmp_path: Path, drawings: dict[str, Drawing]) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [Cell("gspo", "tiny_dense", seed) for seed in (0, 1)]))
    without_critic = sweep.cells.assign(**{"seconds/critic": 0.0, "flops/critic": 0.0})
    drawing = budget_by_phase(replace(sweep, cells=without_critic))
    assert drawing is not None
    colors = [
        {patch.get_label(): patch.get_facecolor() for patch in figure.legends[0].get_patches()}
        for figure in (drawing.figure, drawings["budget_by_phase"].figure)
    ]
    assert "critic" in colors[1] and "critic" not in colors[0]
    assert colors[0] == {phase: color for phase, color in colors[1].items() if phase != "critic"}
