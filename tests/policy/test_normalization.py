"""The fused normalisation gives what transformers' own gives, gradients too, and takes the place of no other kind."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from harness.policy.normalization import RMSNorm, fuse_normalization
from tests.policy.conftest import fresh
from tests.policy.families import FAMILIES, build
from tests.policy.test_packing import assert_same, dense, passes

SHAPES = [(5, 64), (1, 7, 64), (2, 3, 4, 16), (0, 16)]


def norms(shape, epsilon=1e-6):
    """transformers' own and the fused one, with gains of the same random values, and what they are to normalise."""
    generator = torch.Generator().manual_seed(0)
    own = Qwen3RMSNorm(shape[-1], epsilon)
    own.weight = nn.Parameter(torch.rand(shape[-1], generator=generator) + 0.5)
    return own, RMSNorm(nn.Parameter(own.weight.detach().clone()), epsilon), torch.randn(shape, generator=generator)


def test_by_hand():
    norm = RMSNorm(nn.Parameter(torch.tensor([1.0, 2.0])), 0.0)
    expected = torch.tensor([[3.0, 8.0]]) / 12.5**0.5
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), expected)
    large = RMSNorm(nn.Parameter(torch.ones(2)), 12.5)
    torch.testing.assert_close(large(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_transformers(shape, epsilon):
    own, fused, states = norms(shape, epsilon)
    results = []
    for norm in (own, fused):
        leaf = states.clone().requires_grad_()
        normalized = norm(leaf)
        (normalized * torch.linspace(-1, 2, normalized.numel()).view(shape)).sum().backward()
        results.append((normalized.detach(), leaf.grad, norm.weight.grad))
        with torch.no_grad():
            torch.testing.assert_close(norm(states), normalized.detach(), rtol=1e-5, atol=1e-6)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_slopes():
    norm = RMSNorm(nn.Parameter(torch.linspace(0.5, 2, 6, dtype=torch.float64)), 0.1)
    states = torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda states, _: norm(states), (states.transpose(0, 1), norm.weight))


def test_in_bfloat16_it_is_computed_and_given_in_the_precision_of_its_gain():
    own, fused, states = norms((3, 4, 16))
    rounded = fused(states.bfloat16())
    assert rounded.dtype == own(states.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(rounded, own(states.bfloat16().float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_of_experts_gives_what_it_gave(family, batch):
    model = build(family)
    before = passes(model, batch)
    fuse_normalization(model)
    after = passes(model, batch)
    assert_same(after, before)


@pytest.mark.parametrize(
    ("family", "fused"), [("llama", 5), ("qwen2", 5), ("qwen3", 9), ("phi3", 5), ("gemma", 0), ("gpt2", 0)]
)
def test_dense_families_give_what_they_gave(family, fused, batch):
    model = dense(family)
    before = passes(model, batch)
    fuse_normalization(model)
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == fused
    assert_same(passes(model, batch), before)


def test_the_weights_stay_the_models_own(tmp_path):
    model = fresh("tiny_moe")
    weights = dict(model.named_parameters())
    fuse_normalization(model)
    assert not any(type(module).__name__ == "Qwen3MoeRMSNorm" for module in model.modules())
    after = dict(model.named_parameters())
    assert list(after) == list(weights) and all(after[name] is weight for name, weight in weights.items())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert model.model.norm.weight.min() == 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(again.get_parameter(name), weight) for name, weight in weights.items())


class OneMore(Qwen3RMSNorm):
    def forward(self, hidden_states):
        return (1 + self.weight) * super().forward(hidden_states)


class NoEpsilon(Qwen3RMSNorm):
    def forward(self, hidden_states):
        return self.weight * hidden_states * hidden_states.square().mean(-1, keepdim=True).rsqrt()


class Gated(Qwen3RMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states)


@pytest.mark.parametrize("other", [OneMore, NoEpsilon, Gated])
def test_what_gives_something_else_keeps_its_place(other):
    model, kind = fresh("tiny_dense"), type("OtherRMSNorm", (other,), {})
    model.model.norm = kind(model.config.hidden_size)
    fuse_normalization(model)
    assert type(model.model.norm) is kind
    assert isinstance(model.model.layers[0].input_layernorm, RMSNorm)
