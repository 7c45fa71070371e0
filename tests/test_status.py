"""What the terminal says about a sweep, from its folder alone."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from harness.runs.directory import RunDirectory
from harness.runs.reading import NoRuns, load_runs
from harness.status import read_cells, summary
from harness.sweep.progress import Progress

_ROOT = Path(__file__).parents[1]
_REFERENCE = _ROOT / "results" / "reference"


def _cell(folder, label, **fields):
    directory = RunDirectory(folder / f"{label}-0123abcd")
    directory.path.mkdir(parents=True)
    known = {"label": label, "budget": {"axis": "flops", "limit": 100.0}, "status": "planned"}
    directory.update_status(**known | fields)
    return directory


def _spent(flops):
    """The `budget` of run.json."""
    return {"axis": "flops", "limit": 100.0, "spent": {"flops": flops}}


def _running(folder, label, **fields):
    return _cell(folder, label, status="running", pid=os.getpid(), host=socket.gethostname(), **fields)


def _row(step, flops, seconds, reward=0.25):
    return {
        "step": step,
        "reward/mean": reward,
        "clip_fraction/token": 0.0125,
        "budget/flops": flops,
        "budget/device_seconds": seconds,
    }


def _status(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "harness.status", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_running_cell_tells_what_it_has_spent_and_how_long_it_will_take(tmp_path):
    _running(tmp_path, "gspo").append_metrics([_row(step=5, flops=25.0, seconds=10.0)])
    (cell,) = read_cells(tmp_path)
    assert (cell.status, cell.step, cell.reward, cell.clip_fraction) == ("running", 5, 0.25, 0.0125)
    assert cell.spent == 0.25
    assert cell.seconds_left == 30.0
    assert summary([cell]) == "1 cell: 1 running; about 0:00:30 left"


def test_cells_to_do_count_in_the_time_left(tmp_path):
    _running(tmp_path, "a").append_metrics([_row(step=5, flops=25.0, seconds=10.0)])
    _running(tmp_path, "b").append_metrics([_row(step=5, flops=50.0, seconds=10.0)])
    _cell(tmp_path, "c")
    # 30 s and 10 s left of the running ones, (40 + 20) / 2 s for the third, two at a time.
    assert summary(read_cells(tmp_path)) == "3 cells: 2 running, 1 to do; about 0:00:35 left"


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path):
    directory = _running(tmp_path, "gspo")
    directory.append_metrics([_row(step=1, flops=10.0, seconds=1.0)])
    with open(directory.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "budget/fl')
    assert read_cells(tmp_path)[0].step == 1


def test_a_sweep_kept_without_its_lines_still_tells_what_was_spent(tmp_path):
    _cell(tmp_path, "gspo", status="done", budget=_spent(101.0))
    assert read_cells(tmp_path)[0].spent == 1.01


def test_the_command_names_every_cell_and_why_some_did_not_train(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _cell(tmp_path, "gspo-s0", status="done")
    _cell(tmp_path, "ppo-s0", status="failed", reason="ValueError: [bold]boom[/bold]")
    _cell(tmp_path, "replay-s0", status="skipped", reason="nothing to replay")
    _cell(tmp_path, "replay-s1", status="skipped", reason="nothing to replay")
    _cell(tmp_path, "grpo-s0", status="running", pid=gone.pid, host=socket.gethostname())
    shown = _status(tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "5 cells: 1 failed, 1 interrupted, 1 done, 2 skipped" in shown.stdout
    for cell, status in (("gspo", "done"), ("ppo", "failed"), ("replay", "skipped"), ("grpo", "interrupted")):
        assert re.search(rf"^{cell}-s0 +{status}", shown.stdout, re.MULTILINE)
    assert "ppo-s0 failed: ValueError: [bold]boom[/bold]" in shown.stdout
    assert "replay-s0, replay-s1 skipped: nothing to replay" in shown.stdout


def test_of_a_sweep_in_compact_form_the_last_steps_are_shown_too(tmp_path):
    run = json.loads((_REFERENCE / "sweep.json").read_text())["cells"][0]
    (cell,) = (cell for cell in read_cells(_REFERENCE) if cell.name == run)
    last = load_runs(_REFERENCE).query("run == @run").iloc[-1]
    assert (cell.step, cell.reward) == (last["step"], last["reward/mean"]) and cell.spent == pytest.approx(1, abs=0.02)


def test_a_run_of_a_sweep_in_compact_form_has_lost_nothing():
    run = json.loads((_REFERENCE / "sweep.json").read_text())["cells"][0]
    assert [cell.reason for cell in read_cells(_REFERENCE / run)] == [None]


def test_the_cells_stand_in_the_order_of_the_plan(tmp_path):
    for label in ("a", "b", "c"):
        _cell(tmp_path, label)
    (tmp_path / "sweep.json").write_text('{"cells": ["c-0123abcd", "a-0123abcd"]}')
    assert [cell.label for cell in read_cells(tmp_path)] == ["c", "a", "b"]


def test_variants_of_an_algorithm_are_told_apart_by_what_differs(tmp_path):
    for minibatches in (4, 8):
        config = {"algorithm": {"name": "grpo", "minibatches": minibatches, "epochs": 1}, "seed": 0, "sweep": "s"}
        path = tmp_path / f"grpo-s0-{minibatches}"
        path.mkdir()
        RunDirectory(path).update_status(label="grpo-s0", status="planned")
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    _cell(tmp_path, "ppo-s0")
    told = ["grpo-s0 minibatches=4", "grpo-s0 minibatches=8", "ppo-s0"]
    assert [cell.label for cell in read_cells(tmp_path)] == told
    with Progress(sorted(path for path in tmp_path.iterdir()), Console(file=io.StringIO())) as progress:
        assert [cell.label for cell in progress.cells()] == told


def test_labels_are_no_markup(tmp_path):
    for name in ("[/x]", "[bold]"):
        config = {"algorithm": {"name": "grpo"}, "task": {"prompt": name}}
        path = tmp_path / f"grpo-s0-{len(name)}"
        path.mkdir()
        RunDirectory(path).update_status(label="grpo-s0", status="planned")
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    shown = _status(tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "grpo-s0 prompt=[/x]" in shown.stdout and "grpo-s0 prompt=[bold]" in shown.stdout


def test_a_missing_folder_is_named_with_the_mend(tmp_path):
    shown = _status(tmp_path / "nowhere")
    assert shown.returncode == 2
    assert "nowhere" in shown.stderr and "results/NAME" in shown.stderr and "Traceback" not in shown.stderr
    with pytest.raises(NoRuns, match="holds no runs"):
        read_cells(tmp_path)


def test_status_answers_without_loading_torch():
    code = "import harness.status, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(_ROOT)}).returncode == 0


def test_a_failure_is_told_at_once_with_the_end_of_its_traceback(tmp_path):
    directory = _running(tmp_path, "ppo-s0")
    output = io.StringIO()
    with Progress([directory.path], Console(file=output, width=200)):
        trace = "\n".join(f"line {number}" for number in range(40)) + "\nValueError: [red]boom"
        directory.update_status(status="failed", reason="ValueError: [red]boom", traceback=trace)
    assert "ppo-s0: failed: ValueError: [red]boom" in output.getvalue()
    assert "    line 39\n    ValueError: [red]boom\n" in output.getvalue()
    assert "line 20" not in output.getvalue()


def test_without_a_terminal_a_cell_is_told_of_when_it_passes_a_quarter_of_its_budget(tmp_path):
    directory = _running(tmp_path, "gspo-s0")
    output = io.StringIO()
    with Progress([directory.path], Console(file=output, width=200)):
        directory.append_metrics([_row(step=1, flops=10.0, seconds=1.0)])
    assert output.getvalue() == ""
    with Progress([directory.path], Console(file=output, width=200)):
        directory.append_metrics([_row(step=3, flops=30.0, seconds=3.0, reward=0.5)])
    assert output.getvalue() == ("gspo-s0: running, 30% of the budget, step 3, reward 0.500, clip fraction 1.25e-02\n")


def test_a_run_whose_first_step_passed_the_budget_says_what_a_step_costs(tmp_path):
    directory = _cell(tmp_path, "gspo-s0", status="done", budget=_spent(250.0))
    (directory.path / "config.yaml").write_text("seed: 0\n")
    directory.append_metrics([_row(step=1, flops=250.0, seconds=1.0)])
    (cell,) = read_cells(tmp_path)
    assert cell.reason is not None
    assert cell.reason.startswith("its first step passed budget.limits.flops=100: a step costs 250, ")
    assert "gspo-s0 done: its first step passed" in _status(tmp_path).stdout
    directory.append_metrics([_row(step=2, flops=500.0, seconds=2.0)])
    directory.update_status(budget=_spent(500.0))
    assert read_cells(tmp_path)[0].reason is None


def test_a_run_that_is_done_and_lacks_its_last_lines_says_so(tmp_path):
    directory = _cell(tmp_path, "gspo-s0", status="done", budget=_spent(100.0))
    (directory.path / "config.yaml").write_text("seed: 0\n")
    directory.append_metrics([_row(step=1, flops=50.0, seconds=1.0)])
    assert (
        read_cells(tmp_path)[0].reason == "metrics.jsonl is not whole: remove its run directory and run the cell again"
    )
    directory.append_metrics([_row(step=2, flops=100.0, seconds=2.0)])
    assert read_cells(tmp_path)[0].reason is None


def test_how_an_earlier_attempt_ended_is_no_news(tmp_path):
    failed = _cell(tmp_path, "ppo-s0", status="failed", reason="old", traceback="old")
    output = io.StringIO()
    with Progress([failed.path], Console(file=output, width=200)) as progress:
        (cell,) = progress.cells()
    assert cell.status == "planned"
    assert output.getvalue() == ""
