"""Algorithms that are not in the repository: YAML alone, or a part of their own."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from harness.algorithms.objective import policy_loss
from harness.algorithms.registry import PARTS
from harness.config import compose
from tests.tiny_run import METRICS, lines, planned, run_cell

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
CENTRED_AND_UNNORMALISED = """
defaults: [grpo, _self_]
name: my_dr_grpo
source: arXiv 2503.20783
advantage: {scale: none}
aggregation: {name: constant_length, length: 10}
"""
BOUNDED_WEIGHT = """
defaults: [base, _self_]
name: my_cispo
source: arXiv 2506.13585
advantage: {name: group, scale: std, epsilon: 1.0e-6}
ratio: {name: token}
surrogate: {name: cispo, lower: 0.0, upper: 2.0}
aggregation: {name: sequence_sum}
"""


@pytest.fixture
def outside(tmp_path):
    """Writes an entry into a folder of its own."""

    def write(name, text):
        (tmp_path / "algorithm").mkdir(exist_ok=True)
        (tmp_path / "algorithm" / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The part of CONTRIBUTING.md as an importable module; what it registers is forgotten afterwards."""
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    (tmp_path / "positive_clip.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    compose()
    monkeypatch.setitem(PARTS, "surrogate", dict(PARTS["surrogate"]))
    yield code
    sys.modules.pop("positive_clip", None)


def loss_of(config, ratios, advantages):
    """The loss of tokens with these ratios [B, T], one advantage a row, and old log-probabilities of -1."""
    ratios = torch.tensor(ratios)
    old = torch.full_like(ratios, -1.0)
    advantages = torch.tensor(advantages).unsqueeze(1).expand_as(ratios)
    return policy_loss(old + ratios.log(), old, advantages, torch.ones_like(ratios), config)


def test_grpo_without_normalisations_is_yaml_alone(outside):
    config = compose(["algorithm=my_dr_grpo"], outside("my_dr_grpo", CENTRED_AND_UNNORMALISED)).algorithm
    loss, metrics = loss_of(config, [[1.1, 1.5], [0.9, 0.5]], [1.0, -2.0])
    assert loss.item() == pytest.approx((-(1.1 + 1.27) + 2 * (0.9 + 0.8)) / 20)
    assert metrics["clip_fraction/token"] == 0.5


def test_a_bounded_weight_is_yaml_alone(outside):
    config = compose(["algorithm=my_cispo"], outside("my_cispo", BOUNDED_WEIGHT)).algorithm
    loss, metrics = loss_of(config, [[0.5, 4.0]], [1.0])
    assert loss.item() == pytest.approx(-(0.5 * (math.log(0.5) - 1) + 2 * (math.log(4) - 1)))
    assert metrics["clip_fraction/token"] == 0.0
    assert metrics["ratio/outside_fraction"] == 0.5


def test_a_new_surrogate_is_one_short_file_and_one_entry(outside, plugin, cold_starts):
    assert len(plugin.splitlines()) < 30
    (entry,) = re.findall(r"```yaml\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    folder = outside("positive_grpo", entry)
    arguments = ["algorithm=positive_grpo", "plugins=[tests.tiny_run,positive_clip]"]
    config = compose(arguments, folder).algorithm
    loss, metrics = loss_of(config, [[1.1, 1.5], [0.9, 0.5]], [1.0, -2.0])
    assert loss.item() == pytest.approx(-(1.1 + 1.27) / 2 / 2)
    assert metrics["clip_fraction/token"] == 0.25

    directory = planned(folder / "results", *arguments, config_dir=folder)
    assert run_cell(directory) == "done", directory.read_status()["traceback"]
    assert [row["step"] for row in lines(directory, METRICS)] == [1, 2]
