"""Experts in closed form give what transformers' grouped products give, and take the place of no other kind."""

import math

import pytest
import torch
from torch.nn import functional
from transformers.integrations.moe import grouped_mm_experts_forward

from harness.policy.experts import CLOSED_FORM, closed_form_experts, use_closed_form
from tests.policy.conftest import fresh
from tests.policy.families import FAMILIES, build
from tests.policy.test_packing import assert_same, dense, passes

# Experts with biases and a clamped gate; with GELU.
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
        """Two of one hidden and one inner unit, and of zeros beside them: kernels take sixteen."""

        def __init__(self):
            super().__init__()
            gate_up, down = torch.zeros(2, 32, 16), torch.zeros(2, 16, 16)
            gate_up[:, 0, 0], gate_up[:, 16, 0] = torch.tensor([1.0, 0.5]), torch.tensor([2.0, -1.0])
            down[:, 0, 0] = torch.tensor([3.0, 4.0])
            self.gate_up_proj, self.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)

    def swiglu(gate, up):
        return gate / (1 + math.exp(-gate)) * up

    hidden, expected = torch.zeros(2, 16), torch.zeros(2, 16)
    hidden[:, 0] = torch.tensor([2.0, -1])
    result = closed_form_experts(
        Experts(), hidden, torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.25, 0.75], [1, 0]])
    )
    first = 0.25 * 3 * swiglu(2.0, 4.0) + 0.75 * 4 * swiglu(1.0, -2.0)
    second = 1.0 * 4 * swiglu(-0.5, 1.0)
    expected[:, 0] = torch.tensor([first, second])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_gives_what_it_gave(family, batch):
    model = build(family)
    expected = passes(model, batch)
    model.set_experts_implementation("grouped_mm")
    use_closed_form(model)
    assert (model.config._experts_implementation == CLOSED_FORM) == (family not in _OTHERS)
    given = passes(model, batch)
    torch.testing.assert_close(given[0], expected[0], rtol=1e-4, atol=1e-5)
    for gradient, own in zip(given[1], expected[1], strict=True):
        # Against float64 transformers' own are as far off as ours, in the least stable of the families.
        torch.testing.assert_close(gradient, own, rtol=1e-3, atol=2e-4 * float(own.abs().max()) + 1e-7)


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
    model = dense("phi3")  # whose gate_up_proj and down_proj are linear layers
    model.config._experts_implementation = "grouped_mm"
    use_closed_form(model)
    assert model.config._experts_implementation == "grouped_mm"


def changed(experts, monkeypatch, gate=None, scale=None):
    if gate:
        monkeypatch.setattr(type(experts), "_apply_gate", lambda self, projected: gate(*projected.chunk(2, -1)))
    for parameter in experts.parameters() if scale is not None else ():
        parameter.data.normal_(std=0.01, generator=torch.Generator().manual_seed(0)).mul_(scale)


@pytest.mark.parametrize(
    "gate",
    [
        lambda gate, up: functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10),  # where small states never come
        lambda gate, up: functional.gelu(gate) * up,
        lambda gate, up: functional.silu(up) * gate,
    ],
    ids=["clamped", "gelu", "swapped"],
)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_another_gate_stays_transformers(moe, monkeypatch, gate, scale):
    for layer in moe.model.layers:
        changed(layer.mlp.experts, monkeypatch, gate, scale)
    moe.set_experts_implementation("grouped_mm")
    use_closed_form(moe)
    assert moe.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(("scale", "same"), [(1.0, True), (0.0, False)])
def test_small_experts_are_compared_by_their_size_and_zeros_prove_nothing(moe, monkeypatch, scale, same):
    for layer in moe.model.layers:
        changed(layer.mlp.experts, monkeypatch, scale=scale)
    moe.set_experts_implementation("grouped_mm")
    use_closed_form(moe)
    assert (moe.config._experts_implementation == CLOSED_FORM) == same


def test_under_autocast_they_are_transformers(moe):
    experts = moe.model.layers[0].mlp.experts
    hidden, chosen, weights = inputs(experts, 8, choices(8, experts.num_experts, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = closed_form_experts(experts, hidden.bfloat16(), chosen, weights)
    assert given.dtype == torch.bfloat16
    expected = closed_form_experts(experts, hidden, chosen, weights)
    torch.testing.assert_close(given.float(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))
