"""Routing replay: exact on its own routes, real gradients on foreign ones, and never a silent no-op."""

import pytest
import torch

from harness.errors import ConfigError
from harness.policy.logprobs import completion_logprobs
from harness.policy.routing import Routing, changes, check_routing, expert_layers, padding_routes, routers
from tests.policy.conftest import fresh


def record(model, batch):
    routing = Routing(model)
    with torch.no_grad(), routing.watch():
        logprobs, _ = completion_logprobs(model, batch, 1.0)
    return logprobs, routing.choices().unflatten(0, batch.input_ids.shape)


def perturbed(model, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_dense_model_has_nothing_to_route():
    dense = fresh("tiny_dense")
    assert expert_layers(dense) == routers(dense) == []
    check_routing(dense)


def test_the_routers_of_a_mixture_are_those_of_its_layers_in_order(moe):
    assert routers(moe) == [layer.mlp.gate for layer in moe.model.layers]
    assert expert_layers(moe) == [layer.mlp for layer in moe.model.layers]


def test_replaying_a_models_own_routes_changes_no_bit(moe, batch):
    logprobs, routes = record(moe, batch)
    assert routes.shape == (*batch.input_ids.shape, 3, 4)
    plain, _ = completion_logprobs(moe, batch, 1.0)
    plain_gradients = torch.autograd.grad(plain.sum(), list(moe.parameters()))
    routing = Routing(moe, routes)
    with routing.watch():
        replayed, _ = completion_logprobs(moe, batch, 1.0)
        gradients = torch.autograd.grad(replayed.sum(), list(moe.parameters()))
    assert torch.equal(replayed, logprobs)
    for own, again in zip(plain_gradients, gradients, strict=True):
        assert torch.equal(own, again)


def test_replay_uses_the_recorded_experts_and_reports_the_native_ones(moe, batch):
    _, routes = record(moe, batch)
    perturbed(moe)
    routing = Routing(moe, routes)
    with torch.no_grad(), routing.watch():
        replayed, _ = completion_logprobs(moe, batch, 1.0)
    old = routes.flatten(0, 1)
    assert changes(torch.stack(routing.used, 1), old)[0] == 0
    changed, tokens = changes(torch.stack(routing.native, 1), old)
    assert 0 < tokens <= len(old)
    assert changed >= tokens
    native, _ = record(moe, batch)
    assert not torch.allclose(native, replayed)


def test_replay_reaches_the_chosen_experts_and_no_others(moe, batch):
    """Gathering from scores that were zeroed outside the current top-k would silently give exact zeros here."""
    _, routes = record(moe, batch)
    foreign = (routes + 7) % 32  # experts that the router would not choose
    routing = Routing(moe, foreign)
    with routing.watch():
        logprobs, _ = completion_logprobs(moe, batch, 1.0)
        logprobs.sum().backward()
    rows, columns = batch.input_ids.shape
    seen = torch.arange(columns) < batch.lengths.unsqueeze(1)
    for layer, router in enumerate(routers(moe)):
        assert router.weight.grad.abs().sum() > 0
        experts = moe.model.layers[layer].mlp.experts
        reached = experts.down_proj.grad.abs().sum((1, 2)) > 0
        used = set(foreign[seen][:, layer].flatten().tolist())
        assert set(reached.nonzero().flatten().tolist()) <= set(foreign[:, :, layer].flatten().tolist())
        assert len(used & set(reached.nonzero().flatten().tolist())) > 0


def test_router_gradient_under_replay_equals_finite_differences(moe, batch):
    _, routes = record(moe, batch)
    perturbed(moe).double()
    moe.set_experts_implementation("eager")  # the grouped kernel knows no float64

    def loss():
        routing = Routing(moe, routes)
        with routing.watch():
            states = moe.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return (states[batch.positions()] ** 2).sum() / 100

    weight = routers(moe)[1].weight
    loss().backward()
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    analytic = (weight.grad * direction).sum().item()
    step = 1e-3  # the router computes its softmax in float32 whatever the model is in
    with torch.no_grad():
        weight.add_(step * direction)
        above = loss().item()
        weight.sub_(2 * step * direction)
        below = loss().item()
    numeric = (above - below) / (2 * step)
    assert abs(analytic) > 1e-6
    torch.testing.assert_close(analytic, numeric, rtol=1e-2, atol=1e-7)


def test_padding_takes_the_first_experts():
    recorded = torch.tensor([[[5, 3, 9], [7, 1, 0]]], dtype=torch.int16)  # [tokens, layers, k]
    routes = padding_routes(2, 4, like=recorded)
    assert (routes.shape, routes.dtype) == ((2, 4, 2, 3), torch.int16)
    assert (routes == torch.tensor([0, 1, 2])).all()


def test_changes_by_hand():
    old = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], dtype=torch.int16)  # [tokens, routers, k]
    new = [torch.tensor([[1, 0], [0, 5]]), torch.tensor([[3, 2], [6, 7]])]
    changed, tokens = changes(torch.stack(new, 1), old)
    assert (changed.item(), tokens.item()) == (3, 1)


def test_nothing_is_watched_afterwards(moe, batch):
    routing = Routing(moe)
    with routing.watch():
        completion_logprobs(moe, batch, 1.0)
    first = routing.choices().unflatten(0, batch.input_ids.shape).clone()
    perturbed(moe, 1.0)
    completion_logprobs(moe, batch, 1.0)
    assert torch.equal(routing.choices().unflatten(0, batch.input_ids.shape), first)


def test_choices_of_an_earlier_pass_do_not_stand_in_for_those_of_a_later_one(moe, batch):
    routing = Routing(moe)
    with routing.watch():
        moe(batch.input_ids)
    with pytest.raises(ConfigError, match="without a top-k"), routing.watch():
        pass
