"""Joint projections give what transformers' three give, or are not taken."""

import copy

import pytest
import torch

from harness.policy import normalization, projections
from harness.policy.critic import Critic
from harness.policy.loading import prepare_layers
from harness.policy.normalization import fuse_normalization
from harness.policy.packing import drop_padding
from harness.policy.projections import (
    GatedFeedForward,
    JointAttention,
    join_projections,
    stacked,
)
from tests.policy.conftest import fresh, make_batch
from tests.policy.families import build
from tests.policy.test_packing import assert_same, dense, passes

# Projections with biases; heads that are normalised; embeddings that are scaled; or none of it.
DENSE = {
    "llama": {},
    "llama with biases": {"attention_bias": True},
    "gemma": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3 with wider heads": {"head_dim": 32},
    "qwen2 with wider heads": {"head_dim": 48},
}
# As published, from the ninth position on.
_SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
_SCALED |= {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}


def as_on_a_gpu(monkeypatch):
    """The ways of a GPU under autocast, but with float32 in the place of bfloat16, so that nothing is rounded."""
    for module in (normalization, projections):
        monkeypatch.setattr(module, "autocast_dtype", lambda states: torch.float32)


def joint_layers(model):
    return [module for module in model.modules() if isinstance(module, JointAttention)]


def assert_nothing_changes(model, monkeypatch=None):
    """Or not on a GPU either, with ``monkeypatch``."""
    batch = make_batch(group_size=3)
    with torch.no_grad():  # so that biases and gains are not those that change nothing
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    fuse_normalization(model)
    drop_padding(model)
    before, parameters = passes(model, batch), dict(model.named_parameters())
    join_projections(model)
    assert len(joint_layers(model)) == len(model.base_model.layers)
    if monkeypatch is not None:
        as_on_a_gpu(monkeypatch)
    assert_same(passes(model, batch), before)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is given for name, given in parameters.items())


@pytest.mark.parametrize("family", DENSE)
def test_dense_families(family):
    assert_nothing_changes(dense(family.split()[0], **DENSE[family]))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_families_of_experts(family):
    assert_nothing_changes(build(family))


def gated_layers(model):
    return [module for module in model.modules() if isinstance(module, GatedFeedForward)]


@pytest.mark.parametrize("family", DENSE)
def test_dense_families_on_a_gpu(family, monkeypatch):
    model = dense(family.split()[0], **DENSE[family])
    assert_nothing_changes(model, monkeypatch)
    assert len(gated_layers(model)) == (0 if family == "gemma" else len(model.base_model.layers))  # of GELU


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_families_of_experts_on_a_gpu(family, monkeypatch):
    model = build(family)
    assert_nothing_changes(model, monkeypatch)
    assert len(gated_layers(model)) == (family == "qwen3_moe")  # whose first layer has no experts


def test_feed_forward_layers_with_biases_stay():
    model = dense("llama", mlp_bias=True)
    drop_padding(model)
    join_projections(model)
    assert not gated_layers(model) and joint_layers(model)


class Clamped(torch.nn.Module):
    def forward(self, states):
        return torch.nn.functional.silu(states).clamp(max=100)


def test_gates_that_clamp_large_states_stay():
    layer = dense("llama").model.layers[0].mlp
    GatedFeedForward(layer)
    layer.act_fn = Clamped()
    with pytest.raises(ValueError, match="something else"):
        GatedFeedForward(layer)


def test_stacked_weights_are_rounded_and_their_gradients_are_not_mixed(monkeypatch):
    monkeypatch.setattr(projections, "autocast_dtype", lambda states: torch.bfloat16)
    weights = [torch.randn(rows, 3, requires_grad=True) for rows in (2, 1)]
    together = stacked(weights)
    assert torch.equal(together, torch.cat(weights).bfloat16())
    gradient = torch.randn(3, 3).bfloat16()
    for found, right in zip(torch.autograd.grad(together, weights, gradient), gradient.split([2, 1]), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, right.float())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {}),  # one projection already
        ("gpt2", {}),
        ("glm", {"head_dim": 8, "partial_rotary_factor": 0.5}),  # only half of a head is rotated
        ("cohere", {}),  # neighbours are rotated, not halves
        ("olmo2", {}),  # normalised across heads
        ("mistral", {"sliding_window": 4}),  # not without padding
    ],
)
def test_other_layers_stay(family, changes):
    model = dense(family, **changes)
    batch = make_batch(group_size=3)
    fuse_normalization(model)
    drop_padding(model)
    before, modules = passes(model, batch), list(model.modules())
    join_projections(model)
    assert not joint_layers(model)
    assert {module for module in model.modules() if not isinstance(module, GatedFeedForward)} <= set(modules)
    assert_same(passes(model, batch), before)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmo", {"clip_qkv": 8.0}),  # beyond what is tried
        ("ministral3", {"rope_parameters": _SCALED}),  # behind what is tried
        ("doge", {}),  # by parameters that are zero at first
    ],
)
def test_layers_whose_difference_a_few_fresh_tokens_do_not_show_stay(family, changes):
    model = dense(family, head_dim=8, **changes)
    fuse_normalization(model)
    drop_padding(model)
    join_projections(model)
    assert not joint_layers(model)


def test_heads_that_are_normalised_as_transformers_does_stay():
    model = fresh("tiny_dense")
    drop_padding(model)
    join_projections(model)
    assert not joint_layers(model)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_kernels_for_one_core_and_operations_for_more_give_the_same(name):
    batch, found, threads = make_batch(group_size=3), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = fresh(name)
            prepare_layers(model, "cpu")
            found.append(passes(model, batch))
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(found[0][0], found[1][0])  # they round in other places
    assert_same(*found)


def test_copies_have_layers_of_their_own():
    model = fresh("tiny_dense")
    prepare_layers(model, "cpu")
    critic = Critic(copy.deepcopy(model))
    assert joint_layers(critic) and joint_layers(critic)[0].q_proj.weight is not joint_layers(model)[0].q_proj.weight
    batch = make_batch()
    torch.nn.init.ones_(critic.head.weight)
    before = critic(batch)
    with torch.no_grad():
        joint_layers(model)[0].q_proj.weight.zero_()
    assert torch.equal(critic(batch), before)


def test_gradients_are_the_same_where_activations_are_computed_again():
    batch, found = make_batch(), []
    for again in (False, True):
        model = fresh("tiny_dense")
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        prepare_layers(model, "cpu")
        model.train(again)
        found.append(passes(model, batch))
    assert_same(*found)
