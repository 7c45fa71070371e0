"""docs/PARITY.md says what the tests show, no more and no less."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from harness.algorithms.registry import PARTS
from tests.parity import test_advantages, test_policy_losses

ROOT = Path(__file__).parents[2]
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/PARITY.md").read_text("utf-8"), re.M | re.S))


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names_of_tests(*names: str) -> set[str]:
    """The tests of some files beside this one."""
    trees = [ast.parse((Path(__file__).parent / f"{name}.py").read_text("utf-8")) for name in names]
    functions = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in functions if name.startswith("test_")}


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def cases(section: str) -> list[str]:
    """The cases that a table names, which begin with their peer."""
    return [name for row in rows(section) for cell in row[1:] for name in code(cell) if re.match("(trl|verl)-", name)]


def test_every_deviation_has_its_test_and_every_test_its_row():
    named = [name for row in rows("Deviations") for name in code(row[3])]
    assert sorted(named) == sorted(names_of_tests("test_deviations"))


def test_every_other_quantity_has_its_test_and_every_test_its_row():
    named = [name for row in rows("Everything else") for name in code(row[2])]
    others = names_of_tests("test_estimators", "test_advantages") - {"test_advantages_are_the_same"}
    assert sorted(named) == sorted(others)


@pytest.mark.parametrize(
    ("section", "module"), [("Policy losses", test_policy_losses), ("Advantages", test_advantages)]
)
def test_every_equality_has_its_case_and_every_case_its_row(section, module):
    assert sorted(cases(section)) == sorted(module.CASES)


def test_every_case_stands_in_the_row_of_its_entry():
    for row in rows("Policy losses"):
        for name in cases("Policy losses"):
            if name in code(row[1]) + code(row[2]):
                assert test_policy_losses.CASES[name].entry == code(row[0])[0]


def test_every_algorithm_has_its_row():
    entries = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / "conf/algorithm").glob("*.yaml")}
    own_loss = {name for name, entry in entries.items() if name != "base" and "routing_replay" not in entry}
    assert [code(row[0])[0] for row in rows("Policy losses")] == sorted(own_loss)
    advantages = {name for name, function in PARTS["advantage"].items() if function.__module__.startswith("harness.")}
    assert [code(row[0])[0] for row in rows("Advantages")] == sorted(advantages)


def test_the_versions_are_those_that_are_pinned():
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    opening = (ROOT / "docs/PARITY.md").read_text("utf-8").partition("##")[0]
    for peer in ("TRL", "verl"):
        (version,) = re.findall(rf"{peer} ([\d.]+\d)", opening)
        assert f"{peer.lower()}=={version}" in pins
