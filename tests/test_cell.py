"""What a planned run refuses to start with: other code, plugins or data than it was planned with."""

import errno
import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest

from harness.cell import run_cell
from harness.runs.directory import METRICS, RunDirectory
from harness.sweep.launch import _settle
from tests.tiny_run import lines, planned


def _failed(directory):
    """Why a run failed before its first step."""
    assert run_cell(directory) == "failed"
    assert lines(directory, METRICS) == []
    return directory.read_status()["reason"]


def test_a_run_that_was_planned_with_other_code_fails_and_says_so(tmp_path, cold_starts):
    directory = planned(tmp_path)
    directory.update_status(provenance=directory.read_status()["provenance"] | {"code": "000000000000"})
    expected = r"the code has changed since this run was planned \(000000000000, now \w{12}\): .* another sweep=NAME"
    assert re.search(expected, _failed(directory))


def test_of_a_configuration_that_cannot_run_the_message_is_told_alone(tmp_path, cold_starts):
    directory = planned(tmp_path, "task.max_prompt_tokens=2")
    assert _failed(directory).startswith("task.max_prompt_tokens=2: a prompt has ")
    assert directory.read_status()["traceback"] is None


@pytest.mark.parametrize("edited", ["rows.jsonl", "my_part.py"])
def test_a_run_whose_data_or_plugin_was_edited_since_its_plan_fails_and_says_so(
    tmp_path, cold_starts, monkeypatch, edited
):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_part", raising=False)  # that of the other case
    (tmp_path / "my_part.py").write_text('"""A plugin that adds nothing."""\n')
    rows = [json.dumps({"question": f"{n} + {n} =", "answer": f"#### {2 * n}"}) for n in range(10, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = ["task=gsm8k", f"task.path={tmp_path}/rows.jsonl", "task.prompt='{question}'", "task.max_prompt_tokens=20"]
    directory = planned(tmp_path, "plugins=[tests.tiny_run,my_part]", *data)
    with open(tmp_path / edited, "a") as file:
        file.write("\n")
    name = re.escape(edited.removesuffix(".py"))
    assert re.search(rf"{name} \(\w{{12}}, now \w{{12}}\) has changed since this run was planned", _failed(directory))


@pytest.mark.parametrize("end", ["done", "failed", "killed"])
def test_an_end_that_a_full_disk_cannot_keep_is_told_on_the_terminal(tmp_path, monkeypatch, capsys, end):
    directory, keep = planned(tmp_path), RunDirectory.update_status
    directory.save_state({})

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("harness.cell._train", full if end == "failed" else lambda directory: None)
    monkeypatch.setattr(
        RunDirectory, "update_status", lambda own, **kept: (keep if kept["status"] == "running" else full)(own, **kept)
    )
    if end == "killed":
        _settle(directory, SimpleNamespace(exitcode=-signal.SIGKILL, pid=0), "failed")
    else:
        assert run_cell(directory) == end
    assert directory.state_path.exists()  # what the same command continues from
    assert capsys.readouterr().err == (
        f"{directory.path}: [Errno 28] No space left on device: nothing more can be kept there; free some space and "
        "give the same command again\n"
    )


def test_a_run_that_began_with_other_packages_is_not_continued(tmp_path, cold_starts, monkeypatch):
    directory = planned(tmp_path, "budget.limits.updates=12", "checkpoint_every=1")
    monkeypatch.setattr("harness.trainer.Trainer.finish", lambda trainer: 1 / 0)
    assert run_cell(directory) == "failed" and directory.state_path.exists()
    monkeypatch.undo()
    provenance = directory.read_status()["provenance"]
    older = provenance["packages"] | {"torch": "1.0"}
    directory.update_status(provenance=provenance | {"packages": older})
    assert run_cell(directory) == "failed"
    assert directory.read_status()["reason"].startswith(
        f"this run began with other packages (torch 1.0, now {provenance['packages']['torch']}): install those again"
    )
    assert directory.read_status()["provenance"]["packages"] == older
    directory.update_status(provenance=provenance)
    assert run_cell(directory) == "done"
    assert not directory.state_path.exists()  # nothing continues from it any more
