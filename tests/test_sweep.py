"""Plans, what they refuse, and sweeps run by the real command."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from harness.config import compose, load
from harness.entries import conf_dir
from harness.errors import ConfigError
from harness.run import multirun_first
from harness.runs import compact
from harness.runs.directory import RunDirectory, effective_status
from harness.sweep import session
from harness.sweep.plan import Cell, check_folder, compose_jobs, expand, freeze
from harness.sweep.slots import parallel_cells, slot
from harness.sweep.tuning import rehearsed
from harness.torch_setup import set_up_environment
from tests.analysis import synthetic
from tests.tiny_run import PLAIN

_ROOT = Path(__file__).parents[1]
_TINY = [*PLAIN, "evaluation.fractions=[1.0]", "checkpoint_every=1"]
# A part that looks into the working directory for what to do to the run that calls it.
_MISCHIEF = """
import os, signal, time
from pathlib import Path
from harness.algorithms.objective import token_ratio
from harness.algorithms.registry import register

@register("ratio", "mischief")
def mischief(logprobs, old_logprobs, mask, *, kind: str):
    Path("environment").write_text(os.environ.get("GLIBC_TUNABLES", ""))
    if Path("fails").exists() and kind == "fails":
        raise RuntimeError("made to fail")
    if Path("dies").exists() and kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    lost = 0
    while Path("waits").exists() and kind == "waits":
        Path("waiting").touch()
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:  # as in a finaliser, where the first one is lost
            lost += 1
            if lost > 1:
                raise
    return token_ratio(logprobs, old_logprobs, mask)
"""


def _say_nothing_of_memory(monkeypatch):
    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with a part and algorithms of the user's own."""
    _say_nothing_of_memory(monkeypatch)
    (tmp_path / "mischief.py").write_text(_MISCHIEF)
    algorithms = tmp_path / "mine" / "algorithm"
    algorithms.mkdir(parents=True)
    for kind in ("fails", "dies", "waits"):
        ratio = f"ratio:\n  name: mischief\n  kind: {kind}\n"
        (algorithms / f"{kind}.yaml").write_text(f"defaults:\n  - grpo\n  - _self_\nname: {kind}\n{ratio}")
    (algorithms / "two_epochs.yaml").write_text("defaults:\n  - grpo\n  - _self_\nname: two_epochs\nepochs: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{_ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("LEVELFIELD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _command(*arguments):
    return [sys.executable, "-m", "harness.run", "--config-dir", "mine", *arguments, *_TINY]


def _run(*arguments):
    return subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=300)


def _runs(sweep):
    """run.json of every run directory, by algorithm."""
    files = Path("results", sweep).glob("*/run.json")
    return {run["algorithm"]: run for run in map(json.loads, (file.read_text() for file in files))}


@contextmanager
def _composing(overrides):
    """The configuration of a multirun, while Hydra can compose its cells."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)


def _plan(*overrides, rehearsal=False):
    with _composing(overrides) as config:
        return expand(compose_jobs(config, GlobalHydra.instance().config_loader()), rehearsal=rehearsal)


def _finished(run, **provenance):
    """A run directory as a run leaves it that is done."""
    directory = RunDirectory(run.run_dir)
    freeze(run.run_dir.parent, [Cell(run, None)])
    known = directory.read_status()["provenance"]
    directory.update_status(status="done", provenance=known | provenance)
    return directory


# --- the plan -------------------------------------------------------------------------------------------------------


def test_cells_come_in_the_order_of_hydras_job_numbers():
    cells = _plan("algorithm=ppo,gspo", "seed=0,1", "sweep=s")
    expected = [f"{algorithm}-tiny_dense-chain_sum-s{seed}" for algorithm in ("ppo", "gspo") for seed in (0, 1)]
    assert [cell.config.label for cell in cells] == expected


def test_an_interpolation_on_the_command_line_is_each_cells_own():
    cells = _plan(
        "algorithm=grpo", "algorithm.minibatches=4,8", "algorithm.name=grpo_${algorithm.minibatches}", "sweep=s"
    )
    assert [cell.config.algorithm.name for cell in cells] == ["grpo_4", "grpo_8"]


def test_a_preset_may_name_the_cells_and_the_command_line_may_narrow_them(tmp_path):
    (tmp_path / "experiment").mkdir()
    cells = "hydra:\n  sweeper:\n    params:\n      algorithm: ppo,gspo\n      seed: 0,1\n"
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nsweep: mine\n" + cells)
    preset = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    assert len(_plan(*preset)) == 4
    narrowed = [cell.config for cell in _plan(*preset, "algorithm=gspo")]
    assert [run.label for run in narrowed] == [f"gspo-tiny_dense-chain_sum-s{seed}" for seed in (0, 1)]
    assert {run.sweep for run in narrowed} == {"mine"}


def test_an_algorithm_declines_the_cells_it_cannot_apply_to():
    dense, moe = _plan("algorithm=grpo_routing_replay", "model=tiny_dense,tiny_moe", "sweep=s")
    assert dense.declined is not None and "nothing to replay" in dense.declined
    assert moe.declined is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sedd=0,1"], "sedd"),
        (["algorithm=ppo,gpso"], "algorithm/gpso"),
        (["seed=0,-1"], r"(?s)seed=-1.*in the cell seed=-1"),
        (["seed=0,0", "sweep=s"], "gspo-tiny_dense-chain_sum-s0 twice"),
        (["budget.limits.flops=1.0,2.0", "sweep=s"], r"budget.limits.flops \(1.0, here 2.0\)"),
        (["seed=0,1", "sweep=a,b"], "results/a and results/b"),
        (["hydra.sweeper._target_=optuna.Sweeper"], "basic sweeper"),
        (["seed=${gone}"], "Interpolation key 'gone' not found"),
        (["algorithm=glob(xx*)"], r"algorithm=glob\(xx\*\): this matches nothing"),
    ],
)
def test_a_plan_that_cannot_be_compared_or_composed_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        _plan(*overrides)


def test_a_frozen_plan_is_on_disk_before_anything_runs(tmp_path):
    cells = _plan("algorithm=grpo_routing_replay,gspo", f"results={tmp_path}", "sweep=s")
    freeze(tmp_path / "s", cells)
    sweep = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert sweep["cells"] == [cell.config.run_name for cell in cells]
    assert sweep["equal"]["budget"]["axis"] == "flops"
    replay, gspo = (RunDirectory(tmp_path / "s" / name).read_status() for name in sweep["cells"])
    assert (replay["status"], gspo["status"]) == ("skipped", "planned")
    assert "nothing to replay" in replay["reason"]
    assert load(tmp_path / "s" / sweep["cells"][1] / "config.yaml") == cells[1].config


def test_cells_whose_tuning_declines_them_are_planned_beside_the_others(tmp_path):
    rates = [5e-5, 1e-4, 2e-4, 4e-4, 8e-4]
    lost = [
        replace(synthetic.trial("gspo", trial, rate, 1000, gain=0.0), status="diverged", steps=10)
        for trial, rate in enumerate(rates)
    ]
    kept = [synthetic.trial("grpo", trial, rate, 1000, gain=0.1 * trial) for trial, rate in enumerate(rates)]
    synthetic.write_sweep(tmp_path / "tuned_run" / "trials", [*lost, *kept])
    cells = _plan("experiment=tuned", "algorithm=gspo,grpo", "model=tiny_dense", "seed=0", f"results={tmp_path}")
    freeze(tmp_path / "tuned_run", cells)
    runs = {
        run["algorithm"]: run
        for run in map(json.loads, map(Path.read_text, (tmp_path / "tuned_run").glob("*/run.json")))
    }
    assert {name: run["status"] for name, run in runs.items()} == {"gspo": "skipped", "grpo": "planned"}
    assert "every trial of gspo" in runs["gspo"]["reason"] and runs["gspo"]["budget"]["axis"] == "flops"


def test_trials_that_are_declined_are_cells_of_their_own(tmp_path):
    tried = ["experiment=tuned", "tuning.trial=0,1", "seed=1000", f"results={tmp_path}"]
    cells = _plan(*tried, "algorithm=grpo_routing_replay,gspo", "model=tiny_dense")
    assert sum(cell.declined is not None for cell in cells) == 2
    assert len({cell.config.run_name for cell in cells}) == 4


def test_how_a_cell_failed_stays_known_until_it_runs_again(tmp_path):
    (cell,) = _plan(f"results={tmp_path}", "seed=3", "sweep=s")
    freeze(cell.config.run_dir.parent, [cell])
    directory = RunDirectory(cell.config.run_dir)
    directory.update_status(status="failed", reason="why")
    freeze(cell.config.run_dir.parent, [cell])
    assert (directory.read_status()["status"], directory.read_status()["reason"]) == ("failed", "why")


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_overrides_may_stand_on_both_sides_of_the_flag_of_a_sweep(flag):
    arguments = ["--config-dir", "mine", "hydra/launcher=basic", flag, "sweep=s", "seed=0,1"]
    parsed = get_args_parser().parse_args(multirun_first(arguments))
    assert parsed.multirun and parsed.overrides == ["hydra/launcher=basic", "sweep=s", "seed=0,1"]
    assert parsed.config_dir == "mine"


# --- folders that would mix results ---------------------------------------------------------------------------------


def test_a_folder_with_results_of_other_code_is_refused(tmp_path):
    run = compose([f"results={tmp_path}", "sweep=s"])
    _finished(run, code="000000000000")
    with pytest.raises(ConfigError, match=r"other code \(000000000000, now .*another sweep=NAME"):
        check_folder(tmp_path / "s", [run])


def test_a_folder_with_results_at_another_budget_is_refused_naming_key_and_values(tmp_path):
    _finished(compose([f"results={tmp_path}", "sweep=s", "budget.limits.flops=5.0"]))
    with pytest.raises(ConfigError, match=r"budget.limits.flops \(5.0, here 7.0\).*another sweep=NAME"):
        check_folder(tmp_path / "s", [compose([f"results={tmp_path}", "sweep=s", "seed=1", "budget.limits.flops=7.0"])])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (['tuning.overrides=["seed=0"]', "seed=5"], "has used seed=0, which tuning.overrides give to the trials"),
        (['tuning.overrides=["seed=1002"]', "seed=5"], r"tuning.overrides \(.*1000.*, here .*1002"),
        (["tuning.trials=2", "seed=5"], r"tuning.trials \(5, here 2\)"),
    ],
)
def test_a_comparison_is_not_extended_by_other_trials(tmp_path, change, why):
    tuned = ["experiment=tuned", f"results={tmp_path}", "sweep=s", "tuning.trial=0"]
    run = compose(tuned)
    run.tuning.trial = None
    _finished(run)
    check_folder(tmp_path / "s", [compose([*tuned, "seed=5"])], rehearsal=True)
    with pytest.raises(ConfigError, match=f"{why}.*another sweep=NAME"):
        check_folder(tmp_path / "s", [compose([*tuned, *change])], rehearsal=True)


def test_of_trials_there_may_be_more_but_no_others(tmp_path):
    tuned = ["experiment=tuned", f"results={tmp_path}", "sweep=s/trials", "tuning.trial=0"]
    _finished(compose([*tuned, "seed=1000", "tuning.trials=2"]))
    check_folder(tmp_path / "s" / "trials", [compose([*tuned, "seed=1001"])])
    other = compose([*tuned, "seed=1001", 'tuning.overrides=["seed=1001"]'])
    with pytest.raises(ConfigError, match=r"tuning.overrides \(.*1000.*, here .*1001"):
        check_folder(tmp_path / "s" / "trials", [other])


def test_an_edited_citation_is_not_taken_for_what_differs(tmp_path):
    here = [f"results={tmp_path}", "sweep=s"]
    _finished(compose(here))
    check_folder(tmp_path / "s", [compose([*here, "algorithm.source=edited", "seed=1"])])
    with pytest.raises(ConfigError, match=r"is a cell of this plan with another algorithm\.epochs"):
        check_folder(tmp_path / "s", [compose([*here, "algorithm.source=edited", "algorithm.epochs=3"])])


@pytest.mark.parametrize(("content", "what"), [(None, "lost"), ("seed: 0\n", "damaged"), ("seed: {", "damaged")])
def test_results_whose_configuration_is_gone_are_named_with_what_to_do(tmp_path, content, what):
    run = compose([f"results={tmp_path}", "sweep=s"])
    file = _finished(run).path / "config.yaml"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"{file} is {what}.*: remove its run directory and run the cell again"):
        check_folder(tmp_path / "s", [run])


@pytest.mark.parametrize("key", ["provenance", "model", "task", "seed", "label"])
def test_results_that_do_not_say_whose_they_are_are_named_with_what_to_do(tmp_path, key):
    run = compose([f"results={tmp_path}", "sweep=s"])
    file = _finished(run).path / "run.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in known.items() if name != key}))
    with pytest.raises(ConfigError, match=rf"{file} is damaged \(it has no {key}\): remove its run directory and run"):
        check_folder(tmp_path / "s", [run])


def test_results_of_data_that_was_edited_since_are_refused_naming_it(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"question": "1+1", "answer": "#### 2"}\n')
    here = [f"results={tmp_path}", "sweep=s"]
    task = ["task=gsm8k", f"task.path={data}", "task.max_prompt_tokens=200", "task.max_completion_tokens=200"]
    _finished(compose([*here, *task]))
    more = compose([*here, *task, "seed=1"])
    check_folder(tmp_path / "s", [more])
    data.write_text('{"question": "1+2", "answer": "#### 3"}\n')
    with pytest.raises(ConfigError, match=rf"made with another {data} \(\w+, now \w+\).*another sweep=NAME"):
        check_folder(tmp_path / "s", [more])
    check_folder(tmp_path / "s", [compose(here)])  # it does not read that file


def test_an_algorithm_that_was_edited_is_refused_naming_what_changed(tmp_path):
    _finished(compose([f"results={tmp_path}", "sweep=s"]))
    with pytest.raises(ConfigError, match=r"algorithm.epochs \(1, here 2\)"):
        check_folder(tmp_path / "s", [compose([f"results={tmp_path}", "sweep=s", "algorithm.epochs=2"])])


@pytest.mark.parametrize("change", ["task.max_completion_tokens=13", "model.micro_batch_sequences=7"])
def test_a_model_or_task_of_one_name_has_one_meaning_in_a_folder(tmp_path, change):
    _finished(compose([f"results={tmp_path}", "sweep=s", "algorithm=grpo"]))
    with pytest.raises(ConfigError, match=re.escape(change.partition("=")[0])):
        check_folder(tmp_path / "s", [compose([f"results={tmp_path}", "sweep=s", "algorithm=gspo", change])])


def test_the_compact_form_of_a_sweep_takes_no_further_runs(tmp_path):
    kept = compact(synthetic.write_sweep(tmp_path / "s", synthetic.comparison()), tmp_path / "kept")
    with pytest.raises(ConfigError, match=rf"{kept} is the compact form .*another sweep=NAME.*harness.report {kept} "):
        check_folder(kept, [compose([f"results={tmp_path}", "sweep=kept"])])


def test_variants_of_an_algorithm_may_share_one_plan(tmp_path):
    cells = _plan(f"results={tmp_path}", "sweep=s", "algorithm.epochs=1,2")
    _finished(cells[0].config)
    check_folder(tmp_path / "s", [cell.config for cell in cells])


def test_variants_of_one_name_are_not_tuned_together_since_they_would_share_their_trials():
    variants = ["experiment=tuned", "algorithm=grpo", "model=tiny_dense", "seed=0", "algorithm.minibatches=4,8"]
    with pytest.raises(ConfigError, match=r"variants of grpo-.*algorithm\.minibatches \(4, here 8\)") as refused:
        _plan(*variants, rehearsal=True)
    advice = re.search("e.g. '(.*)'", str(refused.value))
    assert advice is not None
    names = [cell.config.algorithm.name for cell in _plan(*variants, advice[1], rehearsal=True)]
    assert names == ["grpo_4", "grpo_8"]


def test_more_seeds_and_other_algorithms_join_a_folder(tmp_path):
    _finished(compose([f"results={tmp_path}", "sweep=s"]))
    check_folder(tmp_path / "s", [compose([f"results={tmp_path}", "sweep=s", "seed=1", "algorithm=ppo"])])


def test_before_its_trials_a_cell_may_be_there_as_it_was_tuned_and_afterwards_not_otherwise(tmp_path):
    here = ["experiment=tuned", "sweep=s", f"results={tmp_path}", "tuning.trial=0"]
    _finished(compose([*here, "algorithm.search_space={optimizer.learning_rate:[9e-4,8e-4,7e-4,6e-4,5e-4]}"]))
    untuned = compose(here)
    untuned.tuning.trial = None
    check_folder(tmp_path / "s", [rehearsed(untuned)], rehearsal=True)
    with pytest.raises(ConfigError, match=r"is a cell of this plan with another algorithm\.optimizer\.learning_rate"):
        check_folder(tmp_path / "s", [compose(here)])


def test_a_comparison_that_its_folder_cannot_take_stops_before_its_trials(tmp_path):
    _finished(compose([f"results={tmp_path}", "sweep=tuned_run", "budget.limits.flops=5.0"]))
    command = [sys.executable, "-m", "harness.run", "-m", "experiment=tuned", f"results={tmp_path}", "model=tiny_dense"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(_ROOT)})
    assert ended.returncode == 2 and "budget.limits.flops (5.0, here 1000000000000.0)" in ended.stderr
    assert not (tmp_path / "tuned_run" / "trials").exists()


def test_a_damaged_run_stops_the_plan_before_it_is_frozen(tmp_path, capsys):
    given = [f"results={tmp_path}", "sweep=s", "algorithm=grpo,gspo", "seed=0"]
    metrics = _finished(_plan(*given)[0].config).path / "metrics.jsonl"
    metrics.write_text("{]\n")
    plan = tmp_path / "s" / "sweep.json"
    before = plan.read_bytes()
    with _composing(given) as config, pytest.raises(SystemExit) as ended:
        session.start(config)
    assert ended.value.code == 2 and f"{metrics}, its last line is damaged" in capsys.readouterr().err
    assert plan.read_bytes() == before and len(list((tmp_path / "s").glob("*/"))) == 1


def test_a_plan_that_never_ran_stands_in_nobodys_way(tmp_path):
    run = compose([f"results={tmp_path}", "sweep=s", "budget.limits.flops=5.0"])
    freeze(tmp_path / "s", [Cell(run, None)])
    check_folder(tmp_path / "s", [compose([f"results={tmp_path}", "sweep=s", "budget.limits.flops=7.0"])])


# --- slots ----------------------------------------------------------------------------------------------------------


def test_cells_at_once_have_cores_of_their_own_and_one_more_waits(tmp_path):
    waited = threading.Event()

    def wait():
        with slot(tmp_path, "cpu", 1):
            waited.set()

    with ExitStack() as held:
        taken = [held.enter_context(slot(tmp_path, "cpu", 1)) for _ in range(parallel_cells("cpu", 1))]
        cores = [core for units in taken for core in units]
        assert sorted(map(int, cores)) == sorted(os.sched_getaffinity(0))
        thread = threading.Thread(target=wait)
        thread.start()
        assert not waited.wait(0.5)
    assert waited.wait(30)
    thread.join()


def test_a_cell_of_more_threads_than_cores_still_runs(tmp_path):
    assert parallel_cells("cpu", 10_000) == 1
    with slot(tmp_path, "cpu", 10_000) as cores:
        assert len(cores) == len(os.sched_getaffinity(0))


# --- the real command -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cells_that_fail_or_are_killed_leave_the_others_alone_and_run_again_with_the_same_command(workplace):
    arguments = ["-m", "sweep=s", "plugins=[mischief]", "algorithm=fails,dies,grpo_routing_replay,two_epochs"]
    Path("fails").touch()
    Path("dies").touch()
    first = subprocess.Popen(_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path("results/s/sweep.json").exists() and first.poll() is None:
        time.sleep(0.05)
    # The plan is frozen: an edit now changes no cell.
    Path("mine/algorithm/two_epochs.yaml").write_text("defaults:\n  - grpo\n  - _self_\nname: two_epochs\nepochs: 3\n")
    output, errors = first.communicate(timeout=300)
    assert first.returncode == 1, errors

    assert "glibc.malloc.trim_threshold=" in Path("environment").read_text()
    runs = _runs("s")
    assert {name: run["status"] for name, run in runs.items()} == {
        "fails": "failed",
        "dies": "failed",
        "grpo_routing_replay": "skipped",
        "two_epochs": "done",
    }
    assert runs["fails"]["reason"] == "RuntimeError: made to fail"
    assert 'raise RuntimeError("made to fail")' in runs["fails"]["traceback"]
    assert "SIGKILL" in runs["dies"]["reason"]
    assert runs["two_epochs"]["budget"]["spent"]["updates"] == 8
    (frozen,) = Path("results/s").glob("two_epochs-*/config.yaml")
    assert "\n  epochs: 2\n" in frozen.read_text()

    plan, _, progress = output.partition("4 cells in results/s: 3 to do, 1 skipped\n")
    assert "nothing to replay" in re.sub(r"\s+", " ", plan)
    assert "fails-tiny_dense-chain_sum-s0: failed" in progress and "    RuntimeError: made to fail\n" in progress
    assert "4 cells: 2 failed, 1 done, 1 skipped" in progress

    Path("mine/algorithm/two_epochs.yaml").write_text("defaults:\n  - grpo\n  - _self_\nname: two_epochs\nepochs: 2\n")
    Path("fails").unlink()
    Path("dies").unlink()
    done = (frozen.parent / "run.json").read_bytes()
    second = _run(*arguments)
    assert second.returncode == 0, second.stderr
    assert [run["status"] for run in _runs("s").values()].count("done") == 3
    assert (frozen.parent / "run.json").read_bytes() == done
    litter = {path.name for path in Path("results/s").iterdir()} - {frozen.parent.name}
    assert {name for name in litter if "-tiny_dense-" not in name} == {".lock", ".slots", "sweep.json"}


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_with_the_same_command(workplace):
    arguments = ["-m", "sweep=s", "plugins=[mischief]", "algorithm=waits,two_epochs"]
    Path("waits").touch()
    command = subprocess.Popen(
        _command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background with Ctrl-C ignored, and tests may be run like that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (Path("waiting").exists() and _runs("s")["two_epochs"]["status"] == "done") and command.poll() is None:
        time.sleep(0.05)
    refused = _run(*arguments)
    assert refused.returncode == 2 and f"process {command.pid}" in refused.stderr
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=120)
    assert command.returncode == 130, errors
    runs = _runs("s")
    assert {name: run["status"] for name, run in runs.items()} == {"waits": "interrupted", "two_epochs": "done"}
    assert effective_status({**runs["waits"], "status": "running"}) == "interrupted"  # its process is gone

    Path("waits").unlink()
    assert _run(*arguments).returncode == 0
    assert {run["status"] for run in _runs("s").values()} == {"done"}


def _processes_of_group(group):
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(file.parent.name)
    return found


@pytest.mark.slow
def test_of_a_command_that_is_killed_no_process_is_left(workplace):
    Path("waits").touch()
    command = subprocess.Popen(
        _command("-m", "sweep=s", "plugins=[mischief]", "algorithm=waits,two_epochs"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # One worker is at a cell then, and one waits for what there is to do.
    while not (Path("waiting").exists() and _runs("s")["two_epochs"]["status"] == "done") and command.poll() is None:
        time.sleep(0.05)
    command.kill()
    command.wait()
    deadline = time.monotonic() + 120
    while _processes_of_group(command.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _processes_of_group(command.pid)
    runs = _runs("s")
    assert {name: run["status"] for name, run in runs.items()} == {"waits": "interrupted", "two_epochs": "done"}
    assert effective_status({**runs["waits"], "status": "running"}) == "interrupted"  # its process is gone


@pytest.mark.slow
def test_a_trial_that_fails_is_the_worst_and_the_comparison_goes_on(workplace):
    Path("fails").touch()
    tuning = ["tuning.trials=2", 'tuning.overrides=["seed=1000"]', "hydra/launcher=basic", "model=tiny_dense", "seed=0"]
    space = ["~algorithm.search_space", "+algorithm.search_space={ratio.kind:[fails,waits]}"]
    ended = _run("-m", "experiment=tuned", "plugins=[mischief]", "algorithm=fails", *tuning, *space)
    assert ended.returncode == 0, ended.stderr
    trials = [json.loads(file.read_text())["status"] for file in Path("results/tuned_run/trials").glob("*/run.json")]
    assert sorted(trials) == ["done", "failed"]
    (chosen,) = Path("results/tuned_run").glob("fails-*/config.yaml")
    assert "\n    kind: waits\n" in chosen.read_text() and _runs("tuned_run")["fails"]["status"] == "done"


@pytest.mark.slow
def test_where_every_trial_fails_the_command_has_failed(workplace):
    tuning = ["tuning.trials=1", 'tuning.overrides=["seed=1000"]', "hydra/launcher=basic", "model=tiny_dense", "seed=0"]
    ended = _run("-m", "experiment=tuned", "algorithm=two_epochs", *tuning, "task.max_prompt_tokens=2")
    assert ended.returncode == 1, ended.stderr
    assert (
        "Not complete (1 cell: 1 skipped)" in ended.stdout and _runs("tuned_run")["two_epochs"]["status"] == "skipped"
    )


@pytest.mark.slow
def test_a_single_run_that_is_done_is_left_as_it_is(workplace):
    assert _run("algorithm=two_epochs").returncode == 0
    (run_dir,) = Path("results/runs").iterdir()
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file() and path.name != ".lock"}
    assert {"config.yaml", "run.json", "metrics.jsonl", "evaluations.jsonl"} <= before.keys()
    again = _run("algorithm=two_epochs")
    assert again.returncode == 0 and "1 cell: 1 done" in again.stdout
    assert {name: (run_dir / name).read_bytes() for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=gpso"], "algorithm/gpso: no such entry; near it are gspo"),
        (["-m", "algorithm.optimizer.lr=1"], "algorithm.optimizer.lr: no such key; there are learning_rate"),
        (["sedd=1"], "sedd: no such key; near it are seed"),
        (["algorithm=grpo_routing_replay"], "nothing to replay"),
        (["experiment=step_rewards"], "of a sweep (seed=0,1,2 algorithm=ppo,grpo,gspo,gspo_token task=chain_sum,"),
        (["budget.limits.updates=-1"], "budget.limits.updates"),
        (["-m", "seed=0,1", "budget.limits.updates=0"], "budget.limits.updates"),
    ],
)
def test_bad_input_stops_before_anything_is_written(workplace, arguments, message):
    refused = subprocess.run([sys.executable, "-m", "harness.run", *arguments], capture_output=True, text=True)
    assert refused.returncode == 2
    assert message in refused.stderr and len(refused.stderr.splitlines()) <= 2  # the second says in which cell
    assert not Path("results").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=grpo"], "sweep=runs is for single runs, which may differ in anything: give sweep=NAME"),
        (["sweep=s", "algorithm=grpo,no_yaml"], "mine/algorithm/no_yaml.yaml, line 2: this is not YAML: "),
        (["sweep=s", "plugins=[no_python]"], "plugins: no_python: SyntaxError: "),
        (["experiment=tuned", "sweep=s", "tuning.trials=two"], "tuning.trials"),
        (["sweep=s", "results=/proc/nowhere"], "results=/proc/nowhere: "),
    ],
)
def test_what_stops_the_plan_of_a_sweep_launches_nothing(workplace, arguments, message):
    """Of any other error than an exit Hydra would warn, and launch the jobs of whatever plan the folder has."""
    Path("mine/algorithm/no_yaml.yaml").write_text("name: [mine\n")
    Path("no_python.py").write_text("def\n")
    refused = _run("-m", *arguments)
    assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    assert not Path("results").exists() or not list(Path("results").glob("*/*/"))


@pytest.mark.slow
def test_an_entry_that_is_no_yaml_is_named_with_the_line(workplace):
    Path("mine/algorithm/no_yaml.yaml").write_text("name: mine\nepochs: [1\nsource: x\n")
    refused = _run("algorithm=no_yaml")
    where = f"{workplace}/mine/algorithm/no_yaml.yaml, line 3: this is not YAML: "
    assert refused.returncode == 2 and refused.stderr.startswith(where) and len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_an_entry_that_ours_would_be_taken_for_stops_the_command(workplace, multirun):
    Path("mine/algorithm/grpo.yaml").write_text("name: mine\n")
    refused = _run(*multirun, "algorithm=two_epochs")
    assert refused.returncode == 2 and "algorithm/grpo.yaml has the name of an entry of ours" in refused.stderr
    assert not Path("results").exists()


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [[], ["-m", "sweep=s"]])
def test_a_cache_that_cannot_be_kept_stops_the_command(workplace, monkeypatch, multirun):
    monkeypatch.setenv("LEVELFIELD_CACHE", "/dev/null/cache")
    refused = _run(*multirun, "algorithm=two_epochs")
    assert (
        refused.returncode == 2 and "LEVELFIELD_CACHE: cold starts cannot be kept in /dev/null/cache" in refused.stderr
    )
    assert not Path("results").exists() or not list(Path("results").glob("*/*/"))


@pytest.mark.parametrize("given", [None, ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"), ("MALLOC_TOP_PAD_", "65536")])
def test_how_memory_is_kept_is_what_the_user_says_or_our_own(given, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GLIBC_TUNABLES"):  # for monkeypatch to put them back
        monkeypatch.setenv(name, "")
    _say_nothing_of_memory(monkeypatch)
    if given:
        monkeypatch.setenv(*given)
    set_up_environment(threads=3)
    told = subprocess.run(
        [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ.get('GLIBC_TUNABLES'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    threads, memory = told.stdout.split()
    assert threads == "3" and told.stderr == ""
    if given is None:
        assert "glibc.malloc.trim_threshold=" in memory
    else:
        assert memory == (given[1] if given[0] == "GLIBC_TUNABLES" else "None")
