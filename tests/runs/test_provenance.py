"""Fingerprints of the code and of what a run reads: of what affects numbers, whatever Python leaves beside it."""

import shutil

import pytest

from harness.config import compose
from harness.runs import provenance


def test_compiled_modules_half_written_or_whole_are_no_code(tmp_path, monkeypatch):
    expected = provenance.fingerprint(["policy"])
    shutil.copytree(provenance._HARNESS / "policy", tmp_path / "policy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "_HARNESS", tmp_path)
    assert provenance.fingerprint(["policy"]) == expected
    (tmp_path / "policy" / "__pycache__").mkdir()
    (tmp_path / "policy" / "__pycache__" / "critic.cpython-311.pyc.140071").write_bytes(b"half")
    assert provenance.fingerprint(["policy"]) == expected
    (tmp_path / "policy" / "critic.py").write_text("changed")
    assert provenance.fingerprint(["policy"]) != expected


@pytest.mark.parametrize(("module", "decides"), [("machine.py", True), ("trainer.py", True), ("report.py", False)])
def test_only_code_that_decides_numbers_counts(tmp_path, monkeypatch, module, decides):
    """The processor's name, which machine.py finds, decides which library multiplies."""
    shutil.copytree(provenance._HARNESS, tmp_path / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "_HARNESS", tmp_path / "harness")
    before = provenance.code_fingerprint.__wrapped__()
    (tmp_path / "harness" / module).write_text("changed")
    assert (provenance.code_fingerprint.__wrapped__() != before) == decides


def test_every_file_that_a_run_reads_has_a_fingerprint_that_changes_with_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    files = ["alone_part.py", "packed_part/inner.py", "rows.jsonl", "tasks/mine.yaml"]
    for file in [*files, "packed_part/__init__.py"]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}')
    data, tasks = str(tmp_path / "rows.jsonl"), str(tmp_path / "tasks")
    given = ["plugins=[alone_part,packed_part]", "task=gsm8k", f"task.path={data}", f"evaluation.task_path={tasks}"]
    config = compose([*given, "task.max_prompt_tokens=200", "task.max_completion_tokens=200"])
    names = ["alone_part", "packed_part", data, tasks]
    for file, name in zip(files, names, strict=True):
        before = provenance.inputs_fingerprint(config)
        assert set(before) == {*names, "conf/task/chain_sum.yaml"}
        assert provenance.changed_input({"inputs": before}, before) is None
        with open(tmp_path / file, "a") as opened:
            opened.write("# changed\n")
        after = provenance.inputs_fingerprint(config)
        assert {key for key in after if after[key] != before[key]} == {name}
        assert provenance.changed_input({"inputs": before}, after) == f"{name} ({before[name]}, now {after[name]})"
