"""What holds for every entry of conf/algorithm, and between them."""

import ast
import math
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import harness
from harness.algorithms.__main__ import document, entries, entry
from harness.algorithms.advantages import last_tokens
from harness.algorithms.objective import aggregation_weights, policy_loss, selected_tokens, weighted_policy_loss
from harness.algorithms.registry import PARTS, part
from harness.entries import conf_dir

entry = cache(entry)
of_every_entry = pytest.mark.parametrize("name", entries())
BATCHES = settings(max_examples=10, deadline=None)
SEEDS = st.integers(0, 10_000)


@dataclass
class Inputs:
    """What a policy loss is computed from, [B, T] each; float64, so that an order of summation is no difference."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor

    def change(self, function) -> "Inputs":
        """The function of each tensor."""
        return Inputs(*(function(getattr(self, field.name)) for field in fields(self)))


def random_inputs(seed, *, rows=8, width=7, change=0.3):
    """Sequences of 1 to ``width`` tokens; each has a scale of its own for its log-ratios, up to ``change``."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)).double()
    old = -0.1 - 3 * uniform(rows, width)
    log_ratio = change * torch.logspace(-4, 0, rows).unsqueeze(1) * (2 * uniform(rows, width) - 1)
    advantages = (4 * uniform(rows, 1) - 2) * mask
    return Inputs(
        logprobs=torch.minimum(old + log_ratio, torch.tensor(-1e-3)),
        old_logprobs=old,
        advantages=advantages,
        mask=mask,
        rollout_logprobs=old + uniform(rows, width) - 0.5,
        ref_logprobs=old + uniform(rows, width) - 0.5,
    )


def further(config, inputs):
    """The log-probabilities that only some algorithms are given."""
    return {
        "rollout_logprobs": inputs.rollout_logprobs if config.old_logprobs == "trainer" else None,
        "ref_logprobs": inputs.ref_logprobs if config.kl.coefficient else None,
    }


def differentiate(config, inputs):
    """Loss, its gradient with respect to the log-probabilities [B, T], and metrics."""
    logprobs = inputs.logprobs.clone().requires_grad_()
    loss, metrics = policy_loss(
        logprobs, inputs.old_logprobs, inputs.advantages, inputs.mask, config, **further(config, inputs)
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, metrics


def assert_same(result, expected):
    """Loss, gradient and metrics agree but for rounding."""
    torch.testing.assert_close(result[0], expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result[1], expected[1], rtol=1e-9, atol=1e-12)
    assert result[2] == pytest.approx(expected[2], rel=1e-9, abs=1e-12)


@of_every_entry
def test_an_entry_bears_the_name_of_its_file(name):
    assert entry(name).name == name


@of_every_entry
@BATCHES
@given(seed=SEEDS, pieces=st.sampled_from([2, 4, 8]))
def test_the_loss_does_not_depend_on_the_micro_batches(name, seed, pieces):
    config, inputs = entry(name), random_inputs(seed)
    weights = aggregation_weights(inputs.mask, config)
    selected = selected_tokens(inputs.advantages, inputs.old_logprobs, inputs.mask, config)
    logprobs = inputs.logprobs.clone().requires_grad_()
    total, gathered = torch.zeros((), dtype=torch.float64), None
    for rows in torch.randperm(8, generator=torch.Generator().manual_seed(seed)).chunk(pieces):
        micro = inputs.change(lambda tensor, rows=rows: tensor[rows])
        loss, metrics = weighted_policy_loss(
            logprobs[rows],
            micro.old_logprobs,
            micro.advantages,
            micro.mask,
            weights[rows],
            selected[rows],
            config,
            **further(config, micro),
        )
        total = total + loss
        if gathered is None:
            gathered = metrics
        else:
            gathered.update(metrics)
    (gradient,) = torch.autograd.grad(total, logprobs)
    assert_same((total.detach(), gradient, gathered.compute()), differentiate(config, inputs))


@of_every_entry
@BATCHES
@given(seed=SEEDS, columns=st.integers(1, 5))
def test_the_loss_does_not_depend_on_padding(name, seed, columns):
    config, inputs = entry(name), random_inputs(seed)
    loss, gradient, metrics = differentiate(config, inputs.change(lambda tensor: F.pad(tensor, (0, columns))))
    assert_same((loss, gradient[:, :-columns], metrics), differentiate(config, inputs))


@of_every_entry
@BATCHES
@given(seed=SEEDS)
def test_the_loss_does_not_depend_on_the_order_of_sequences(name, seed):
    config, inputs = entry(name), random_inputs(seed)
    if config.selection.get("pick") == "random":
        pytest.skip("a random pick among the candidates hits others when they stand elsewhere")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    loss, gradient, metrics = differentiate(config, inputs)
    assert_same(differentiate(config, inputs.change(lambda tensor: tensor[order])), (loss, gradient[order], metrics))


@of_every_entry
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_positions_may_hold_anything(name, junk):
    config, inputs = entry(name), random_inputs(3)
    clean = differentiate(config, inputs)
    valid, mask = inputs.mask.bool(), inputs.mask
    dirty = inputs.change(lambda tensor: torch.where(valid, tensor, junk))
    dirty.mask = mask
    assert_same(differentiate(config, dirty), clean)
    assert clean[1][~valid].eq(0).all()


@of_every_entry
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_log_ratios_stay_finite(name, sign):
    inputs = random_inputs(3, rows=2, width=2).change(torch.ones_like)
    inputs.logprobs = torch.tensor([[-500.0, -1e-9], [-1e-9, -1e-9]])
    inputs.old_logprobs = inputs.rollout_logprobs = inputs.ref_logprobs = inputs.logprobs.flip(1)
    inputs.advantages = inputs.advantages * sign
    loss, gradient, metrics = differentiate(entry(name), inputs.change(Tensor.float))
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert all(map(math.isfinite, metrics.values()))


@of_every_entry
@BATCHES
@given(seed=SEEDS)
def test_ratio_one_gives_the_plain_policy_gradient(name, seed):
    """The gradient of a log-probability is then -A times its weight in the aggregation; 0 where Clip-Cov leaves it out.

    So it is for SAPO since f'(1) = 1, for GMPO and GSPO since a mean over the sequence shares out what its elements sum
    up, for VESPO and TOPR since their weights are 1 there, for KL-Cov and DRO since their penalties are level. The KL
    penalty k3 is level too where the policy is its reference, and the rollout's correction is 1 where both agree.
    """
    config, inputs = entry(name), random_inputs(seed)
    inputs.logprobs = inputs.rollout_logprobs = inputs.ref_logprobs = inputs.old_logprobs
    _, gradient, metrics = differentiate(config, inputs)
    plain = -inputs.advantages * aggregation_weights(inputs.mask, config)
    selected = selected_tokens(inputs.advantages, inputs.old_logprobs, inputs.mask, config)
    clips = getattr(PARTS["surrogate"][config.surrogate["name"]], "clips", False)
    torch.testing.assert_close(gradient, plain.masked_fill(selected & clips, 0.0))
    assert metrics["clip_fraction/token"] == pytest.approx(float((selected & clips).sum() / inputs.mask.sum()))


@of_every_entry
@BATCHES
@given(seed=SEEDS)
def test_clipped_is_what_has_lost_its_gradient(name, seed):
    config, inputs = entry(name), random_inputs(seed, change=0.5)
    inputs.rollout_logprobs = inputs.old_logprobs  # no token is left out by the correction
    inputs.ref_logprobs = inputs.logprobs  # none is moved by a penalty alone
    _, gradient, metrics = differentiate(config, inputs)
    gone = (gradient == 0) & inputs.mask.bool()
    assert metrics["clip_fraction/token"] == pytest.approx(float(gone.sum() / inputs.mask.sum()))
    assert metrics["clip_fraction/token"] == pytest.approx(metrics["clip_fraction/low"] + metrics["clip_fraction/high"])
    assert metrics["clip_fraction/sequence"] == pytest.approx(float(gone.any(1).double().mean()))


@BATCHES
@given(seed=SEEDS)
def test_gspo_equals_gspo_token_where_advantages_are_constant(seed):
    inputs = random_inputs(seed, change=1e-2)
    assert_same(differentiate(entry("gspo"), inputs), differentiate(entry("gspo_token"), inputs))


def test_gspo_differs_from_gspo_token_where_advantages_are_not_constant():
    inputs = random_inputs(0, change=1e-4)
    inputs.advantages = inputs.advantages * torch.arange(7)
    gradients = [differentiate(entry(name), inputs)[1] for name in ("gspo", "gspo_token")]
    assert not torch.allclose(*gradients)


@of_every_entry
@BATCHES
@given(seed=SEEDS)
def test_advantages_depend_neither_on_padding_nor_on_the_order_of_completions(name, seed):
    function, part_settings = part("advantage", entry(name).advantage)
    inputs = random_inputs(seed)
    mask, order = inputs.mask, torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    ends, group_ids = last_tokens(mask), torch.tensor([5, 5, 5, 5, 2, 2, 9, 9])
    rewards = ends * inputs.rollout_logprobs

    def advantages(change):
        values = change(inputs.ref_logprobs)
        return function(change(rewards), change(ends), group_ids[order], change(mask), values, **part_settings)[0]

    padded = advantages(lambda tensor: F.pad(tensor[order], (0, 3)))
    shuffled = advantages(lambda tensor: tensor[order])
    torch.testing.assert_close(padded, F.pad(shuffled, (0, 3)))
    plain, _ = function(rewards, ends, group_ids, mask, inputs.ref_logprobs, **part_settings)
    torch.testing.assert_close(shuffled, plain[order])
    assert plain[~mask.bool()].eq(0).all()


def test_every_algorithm_may_try_the_same_number_of_values():
    assert {tuple(map(len, entry(name).search_space.values())) for name in entries()} == {(5,)}


def test_every_part_is_used_by_an_entry():
    used = {(kind, getattr(entry(name), kind)["name"]) for name in entries() for kind in PARTS}
    ours = {(kind, name) for kind in PARTS for name, f in PARTS[kind].items() if f.__module__.startswith("harness.")}
    assert ours == used


# --- no code knows an algorithm's name ------------------------------------------------------------------------------

SOURCES = sorted(Path(harness.__file__).parent.rglob("*.py"))
# Some algorithms are named after their one new part, whose name code may know.
NAMES = set(entries()) - {"cispo", "sapo", "vespo"}
LOOKUPS = ("get", "startswith", "endswith", "__eq__")


def branches_on_names(source: str, names: set[str] = NAMES) -> list[str]:
    """Where a module compares something with one of the names, or looks up by one, or by ``algorithm.name``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            operands = [node.subject, *(case.pattern for case in node.cases)]
        elif isinstance(node, ast.Subscript):
            operands = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOKUPS:
            operands = node.args
        else:
            continue
        leaves = [leaf for operand in operands for leaf in ast.walk(operand)]
        named = any(isinstance(leaf, ast.Constant) and leaf.value in names for leaf in leaves)
        if named or any(ast.unparse(operand).endswith("algorithm.name") for operand in operands):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCES[0].parent).as_posix())
def test_no_code_branches_on_the_name_of_an_algorithm(path):
    # The peers' own configurations have values of the same names.
    names = set() if path.parent.name == "exporting" else NAMES
    assert branches_on_names(path.read_text(encoding="utf-8"), names) == []


@pytest.mark.parametrize(
    "source",
    [
        "if algorithm.name == other: pass",
        "x = 1 if name == 'gspo' else 2",
        "if name in ('ppo', 'other'): pass",
        "match name:\n    case 'grpo': pass",
        "loss = LOSSES[config.algorithm.name]",
        "loss = LOSSES.get('dapo')",
        "if name.startswith('grpo'): pass",
    ],
)
def test_a_branch_on_a_name_is_found(source):
    assert len(branches_on_names(source)) == 1


def test_the_table_in_the_documentation_is_what_the_configuration_says():
    page = conf_dir().parent / "docs" / "ALGORITHMS.md"
    expected = document([entry(name) for name in entries()])
    assert page.read_text(encoding="utf-8") == expected + "\n", "python -m harness.algorithms > docs/ALGORITHMS.md"


def test_the_command_that_prints_the_table_takes_no_argument():
    command = [sys.executable, "-m", "harness.algorithms", "gspo"]
    refused = subprocess.run(command, cwd=Path(harness.__file__).parents[1], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == "" and "unrecognized arguments: gspo" in refused.stderr
