"""TensorBoard for real; wandb and trackio as recordings of their signatures (wandb 0.31, trackio 0.43)."""

import sys
import time
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.cell import run_cell
from harness.config import compose
from harness.errors import ConfigError
from harness.runs.directory import EVALUATIONS, METRICS, RunDirectory
from harness.runs.loggers import LOGGERS, open_loggers
from harness.trainer import Trainer
from tests.tiny_run import UPDATES, lines, planned


class FakeRun:
    """What both packages' runs have in common, and what was done with this one."""

    def __init__(self, settings):
        self.settings, self.rows, self.metrics, self.exit_code = settings, [], {}, None

    def log(self, data, step=None):
        assert self.exit_code is None, "logged after the end"
        self.rows.append((data, step))

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def finish(self, exit_code=0):
        self.exit_code = exit_code

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.finish(exit_code=1 if kind else 0)


@pytest.fixture
def runs(monkeypatch):
    """The runs that were begun with packages that look like wandb and trackio."""
    begun = []

    def begin(settings):
        begun.append(FakeRun(settings))
        return begun[-1]

    def wandb_init(*, entity=None, project=None, dir=None, id=None, name=None, config=None, group=None, mode=None,
                   resume=None):  # fmt: skip
        return begin(locals())

    def trackio_init(project, *, name=None, group=None, config=None, resume="never", embed=True, auto_log_gpu=None,
                     auto_log_cpu=None):  # fmt: skip
        return begin(locals())

    for package, init in (("wandb", wandb_init), ("trackio", trackio_init)):
        module = ModuleType(package)
        module.__spec__ = ModuleSpec(package, None, origin="a test")
        module.init = init
        monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # or the logger would leave it set
    return begun


def log(overrides, directory, rows, steps=0):
    """Log (step, values) with what the overrides choose, in a run that has so many steps behind it."""
    config = compose([*overrides, "device=cpu", "sweep=mine"])
    if (directory / "tensorboard").exists():
        time.sleep(1.1)  # TensorBoard orders a process' files by the second, then by a number without leading zeros
    with open_loggers(config, RunDirectory(directory), steps) as write:
        for step, values in rows:
            write(values, step)
    return config


def scalars(directory):
    """(step, value) of every tag, as TensorBoard shows them."""
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_event_files_hold_what_is_a_finite_number_at_its_step(tmp_path):
    rows = [(0, {"eval/sums": 0.5}), (1, {"loss": 2, "kl": None}), (2, {"loss": 0.25, "kl": float("nan")})]
    log([], tmp_path, [*rows, (3, {"loss": float("-inf"), "kl": 1.5})])
    assert scalars(tmp_path) == {"eval/sums": [(0, 0.5)], "loss": [(1, 2.0), (2, 0.25)], "kl": [(3, 1.5)]}


def test_a_continued_run_shows_each_step_once(tmp_path):
    log([], tmp_path, [(step, {"loss": 0.5}) for step in (1, 2, 3, 4, 5)])
    log([], tmp_path, [(step, {"loss": 0.25}) for step in (4, 5, 6)], steps=3)
    assert scalars(tmp_path)["loss"] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25), (5, 0.25), (6, 0.25)]


def test_a_run_that_begins_again_shows_nothing_of_before(tmp_path):
    log([], tmp_path, [(0, {"eval/sums": 0.5}), (1, {"loss": 0.5})])
    log([], tmp_path, [(1, {"loss": 0.25})])
    assert scalars(tmp_path) == {"loss": [(1, 0.25)], "eval/sums": []}


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with open_loggers(compose(["device=cpu"]), RunDirectory(tmp_path), 0) as write:
        write({"loss": 0.5}, 1)
        assert scalars(tmp_path) == {"loss": [(1, 0.5)]}


def test_a_run_that_was_interrupted_shows_what_its_json_lines_say(cold_starts, tmp_path, monkeypatch):
    overrides = [f"budget.limits.updates={5 * UPDATES}", "evaluation.fractions=[0,1]", "checkpoint_every=2"]
    directory = planned(tmp_path, *overrides)
    step = Trainer.step

    def interrupted(trainer):
        step(trainer)
        if trainer.steps == 3:  # logged, but not in the checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert run_cell(directory) == "interrupted"
    assert run_cell(directory) == "done"
    shown = scalars(directory.path)
    rows = lines(directory, METRICS)
    assert shown["reward/mean"] == [(row["step"], pytest.approx(row["reward/mean"])) for row in rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    scores = [(row["step"], pytest.approx(row["score"])) for row in lines(directory, EVALUATIONS)]
    assert shown["eval/chain_sum_held_out"] == scores
    assert [step for step, _ in scores] == [0, 5]


# --- wandb and trackio -----------------------------------------------------------------------------------------------


def test_wandb_has_the_run_by_its_name_below_the_run_directory(runs, tmp_path):
    config = log(["logger=wandb"], tmp_path, [(1, {"loss": 0.5, "kl": None}), (0, {"eval/sums": 0.25})])
    (run,) = runs
    assert run.rows == [({"loss": 0.5, "step": 1}, None), ({"eval/sums": 0.25, "step": 0}, None)]
    assert run.metrics == {"*": "step"}  # the steps of wandb itself cannot go back
    shown = {key: run.settings[key] for key in ("project", "name", "group", "entity", "mode", "dir", "resume")}
    assert shown == {
        "project": "levelfield", "name": config.run_name, "group": "mine", "entity": None, "mode": "offline",
        "dir": str(tmp_path), "resume": None,
    }  # fmt: skip
    assert run.settings["config"]["algorithm"]["optimizer"]["learning_rate"] == config.algorithm.optimizer.learning_rate
    assert run.exit_code == 0


def test_wandb_takes_project_entity_and_mode_from_the_configuration(runs, tmp_path):
    log(["logger=wandb", "logger.project=p", "logger.entity=me", "logger.mode=online"], tmp_path, [])
    assert [runs[0].settings[key] for key in ("project", "entity", "mode")] == ["p", "me", "online"]


def test_wandb_continues_the_same_run_and_no_other(runs, tmp_path):
    log(["logger=wandb"], tmp_path, [])
    log(["logger=wandb"], tmp_path, [], steps=3)
    log(["logger=wandb", "seed=1"], tmp_path, [])
    with open_loggers(compose(["logger=wandb", "device=cpu", "sweep=other"]), RunDirectory(tmp_path), 0):
        pass
    first, continued, seed, sweep = (run.settings["id"] for run in runs)
    assert first == continued and len({first, seed, sweep}) == 3
    assert all(len(identity) <= 64 for identity in (first, seed, sweep))  # wandb takes no more
    assert [run.settings["resume"] for run in runs] == [None, "allow", None, None]


def test_trackio_has_the_run_by_its_name(runs, tmp_path):
    config = log(["logger=trackio", "logger.project=p"], tmp_path, [(1, {"loss": 0.5, "kl": float("nan")})])
    log(["logger=trackio"], tmp_path, [(4, {"loss": 0.25})], steps=3)
    first, continued = runs
    assert first.rows == [({"loss": 0.5}, 1)] and continued.rows == [({"loss": 0.25}, 4)]
    assert [first.settings[key] for key in ("project", "name", "group")] == ["p", config.run_name, "mine"]
    assert first.settings["config"]["seed"] == config.seed
    assert [run.settings["resume"] for run in runs] == ["never", "allow"]
    assert first.exit_code == continued.exit_code == 0


def test_runs_are_finished_when_training_fails(runs, tmp_path):
    config = compose(["logger.loggers=[wandb,trackio]", "device=cpu"])
    with pytest.raises(RuntimeError, match="boom"), open_loggers(config, RunDirectory(tmp_path), 0):
        raise RuntimeError("boom")
    assert [run.exit_code for run in runs] == [1, 0]  # trackio knows no exit code


def test_several_loggers_at_once_show_the_same(runs, tmp_path):
    log([f"logger.loggers=[{','.join(LOGGERS)}]"], tmp_path, [(1, {"loss": 0.5})])
    assert scalars(tmp_path) == {"loss": [(1, 0.5)]}
    assert [run.rows[0][0]["loss"] for run in runs] == [0.5, 0.5]


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["json_lines", "tensorboard", "wandb", "trackio"])
def test_only_the_chosen_loggers_are_imported(runs, tmp_path, monkeypatch, entry):
    config = compose([f"logger={entry}", "device=cpu"])
    for package in {*LOGGERS, "torch.utils.tensorboard"} - {entry, f"torch.utils.{entry}"}:
        monkeypatch.setitem(sys.modules, package, None)  # an import of it would raise
    with open_loggers(config, RunDirectory(tmp_path), 0) as write:
        write({"loss": 0.5}, 1)
    assert [path.name for path in tmp_path.iterdir()] == (["tensorboard"] if entry == "tensorboard" else [])


def test_by_default_there_are_event_files_and_nothing_else():
    assert compose(["device=cpu"]).logger.loggers == ["tensorboard"]


def test_loggers_do_not_change_which_run_it_is(runs):
    names = {compose([f"logger={entry}", "device=cpu"]).run_name for entry in ("json_lines", "tensorboard", "wandb")}
    assert len(names) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logger.loggers=[tensorboad]"], r"logger\.loggers has tensorboad: choose from tensorboard, wandb, trackio"),
        (["logger.mode=onlin"], r"logger\.mode=onlin: choose offline or online"),
        (["logger.project=a/b"], r"logger\.project=a/b: use letters"),
    ],
)
def test_loggers_that_cannot_be_are_refused_naming_key_and_mend(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose([*overrides, "device=cpu"])


@pytest.mark.parametrize("folder", [False, True], ids=["absent", "only a folder of its name"])
def test_a_logger_that_is_not_installed_is_refused_before_any_compute(tmp_path, monkeypatch, folder):
    if folder:  # wandb makes one where it is used without `dir`
        (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("harness.validation.find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(ConfigError, match=r"logger\.loggers has wandb, which is not installed: pip install wandb"):
        compose(["logger=wandb", "device=cpu"])
