"""The fingerprint of the code: of what affects numbers, whatever Python leaves beside it."""

import shutil

import pytest

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
