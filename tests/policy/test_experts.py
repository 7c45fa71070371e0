"""Experts in closed form give what transformers' grouped products give, and take the place of no other kind."""

import math

import pytest
import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from harness.policy.experts import CLOSED_FORM, closed_form_experts, use_closed_form
from tests.policy.conftest import fresh
from tests.policy.families import FAMILIES, build
from tests.policy.test_packing import assert_same, dense, passes

# Experts with biases and a clamped gate, and with GELU.
_OTHERS = {"gpt_oss", "gemma4_text"}


def inputs(experts, tokens, chosen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, experts.down_proj.shape[1], generator=generator, requires_grad=True)
    weights = torch.rand(chosen.shape, generator=generator).requires_grad_()
    return hidden, chosen, weights


def by_both(experts, hidden, chosen, weights):
    """Values and all gradients by transformers' function and by ours."""
    results = []
    for function in (grouped_mm_experts_forward, closed_form_experts):
        leaves = (hidden, weights, experts.gate_up_proj, experts.down_proj)
        values = function(experts, hidden, chosen, weights)
        loss = (values * torch.linspace(-1, 2, values.numel()).view(values.shape)).sum()
        results.append([values.detach(), *torch.autograd.grad(loss, leaves)])
    return zip(*results, strict=True)


def choices(tokens, count, k, seed=0):
    return torch.rand(tokens, count, generator=torch.Generator().manual_seed(seed)).topk(k).indices


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_values_and_gradients_are_those_of_transformers(moe, tokens):
    experts = moe.model.layers[0].mlp.experts
    for theirs, ours in by_both(experts, *inputs(experts, tokens, choices(tokens, experts.num_experts, 4))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_experts_that_nobody_chooses_have_no_gradient(moe):
    experts = moe.model.layers[0].mlp.experts
    chosen = torch.tensor([[3, 5], [5, 3], [3, 30]])
    for theirs, ours in by_both(experts, *inputs(experts, 3, chosen)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    hidden, chosen, weights = inputs(experts, 3, chosen)
    closed_form_experts(experts, hidden, chosen, weights).sum().backward()
    touched = experts.down_proj.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
    assert touched == [3, 5, 30]


def test_by_hand():
    class Experts(torch.nn.Module):
        """Two of one hidden and one inner unit, and of zeros beside them: kernels take no fewer than four."""

        def __init__(self):
            super().__init__()
            gate_up, down = torch.zeros(2, 8, 4), torch.zeros(2, 4, 4)
            gate_up[:, 0, 0], gate_up[:, 4, 0] = torch.tensor([1.0, 0.5]), torch.tensor([2.0, -1.0])
            down[:, 0, 0] = torch.tensor([3.0, 4.0])
            self.gate_up_proj, self.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)

    def swiglu(gate, up):
        return gate / (1 + math.exp(-gate)) * up

    hidden = torch.tensor([[2.0, 0, 0, 0], [-1, 0, 0, 0]])
    result = closed_form_experts(
        Experts(), hidden, torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.25, 0.75], [1, 0]])
    )
    first = 0.25 * 3 * swiglu(2.0, 4.0) + 0.75 * 4 * swiglu(1.0, -2.0)
    second = 1.0 * 4 * swiglu(-0.5, 1.0)
    torch.testing.assert_close(result, torch.tensor([[first, 0, 0, 0], [second, 0, 0, 0]]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_gives_what_it_gave(family, batch):
    model = build(family)
    expected = passes(model, batch)
    model.set_experts_implementation("grouped_mm")
    use_closed_form(model)
    assert (model.config._experts_implementation == CLOSED_FORM) == (family not in _OTHERS)
    given = passes(model, batch)
    assert_same(given, expected)
    assert torch.equal(given[2], expected[2])


def test_replay_gives_what_it_gave(moe, batch):
    replay = (passes(moe, batch)[2] + 1) % 32
    expected = passes(moe, batch, replay)
    moe.set_experts_implementation("grouped_mm")
    use_closed_form(moe)
    assert_same(passes(moe, batch, replay), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_that_are_asked_for_otherwise_stay(implementation):
    model = fresh("tiny_moe")
    model.set_experts_implementation(implementation)
    use_closed_form(model)
    assert model.config._experts_implementation == implementation


def test_a_dense_model_has_none():
    model = dense("llama")
    use_closed_form(model)
    assert model.config._experts_implementation != CLOSED_FORM
