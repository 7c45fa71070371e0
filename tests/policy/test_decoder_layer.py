"""Layers in halves give what they gave as a whole, or are not taken."""

import pytest
import torch
from torch import nn

from harness.policy import one_core as functions
from harness.policy.decoder_layer import DecoderLayer, join_halves
from harness.policy.loading import prepare_layers
from harness.policy.normalization import fuse_normalization
from harness.policy.packing import Packing, drop_padding
from harness.policy.products import MULTIPLE
from harness.policy.projections import join_projections
from tests.policy.conftest import fresh, make_batch
from tests.policy.test_packing import assert_same, dense, passes


def prepared(model):
    """All but the halves, with biases and gains that change something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    fuse_normalization(model)
    drop_padding(model)
    join_projections(model)
    return model


def halved(model):
    return [module for module in model.modules() if isinstance(module, DecoderLayer)]


# Heads of sixteen and more; with biases, of the last product too; heads that are normalised; a wider layer.
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"head_dim": 16}),
        ("llama", {"head_dim": 16, "attention_bias": True}),
        ("qwen2", {"head_dim": 32}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 32, "intermediate_size": 272}),
        ("gemma", {"head_dim": 16}),
        ("qwen3_moe", None),
    ],
)
def test_nothing_changes(one_core, family, changes):
    model = prepared(fresh("tiny_moe") if changes is None else dense(family, **changes))
    batch, names = make_batch(group_size=3), [name for name, _ in model.named_parameters()]
    before = passes(model, batch)
    join_halves(model)
    if family == "gemma":  # which normalises by other means
        assert not halved(model)
        return
    assert len(halved(model)) == len(model.base_model.layers)
    assert [name for name, _ in model.named_parameters()] == names
    assert_same(passes(model, batch), before)


def test_with_more_threads_a_layer_is_what_it_was():
    threads = torch.get_num_threads()
    model = prepared(fresh("tiny_dense"))
    try:
        torch.set_num_threads(2)
        before = passes(model, make_batch())
        join_halves(model)
        assert halved(model)
        found = passes(model, make_batch())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], before[0])
    for ours, theirs in zip(found[1], before[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "olmo2", "cohere"])
def test_other_layers_stay(one_core, family):
    model = prepared(dense(family))
    modules = list(model.modules())
    join_halves(model)
    assert list(model.modules()) == modules


def test_layers_of_other_sizes_stay(one_core):
    model = prepared(dense("llama", head_dim=24))
    join_halves(model)
    assert not halved(model)


class Scaled(nn.Module):
    """A layer that adds less than the whole of what its parts give."""

    def __init__(self, layer):
        super().__init__()
        self.__dict__.update(layer.__dict__)

    def forward(self, hidden_states, position_embeddings, **settings):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, **settings)
        hidden_states = hidden_states + 0.5 * attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_layer_that_adds_its_parts_in_another_way_stays(one_core):
    model = prepared(fresh("tiny_dense"))
    layers = model.model.layers
    layers[1] = Scaled(layers[1])
    before = passes(model, make_batch())
    join_halves(model)
    assert not halved(model)
    assert_same(passes(model, make_batch()), before)


def test_a_layer_with_parameters_of_its_own_stays(one_core):
    model = prepared(fresh("tiny_dense"))
    model.model.layers[1].scale = nn.Parameter(torch.ones(1))  # which changes nothing at first
    join_halves(model)
    assert not halved(model)


def test_tokens_are_filled_up_where_libraries_multiply(one_core, monkeypatch):
    model, batch = fresh("tiny_dense"), make_batch()
    prepare_layers(model, "cpu")

    def count():
        return Packing(model.base_model, batch).inputs["input_ids"].shape[1]

    tokens = int((batch.first == torch.arange(len(batch.mask)).unsqueeze(1)).sum())
    assert count() == tokens + 1
    torch.set_num_threads(2)
    assert not count() % MULTIPLE
    torch.set_num_threads(1)
    wide = prepared(dense("qwen3", head_dim=16, intermediate_size=272))
    join_halves(wide)
    assert halved(wide) and not Packing(wide.base_model, batch).inputs["input_ids"].shape[1] % MULTIPLE


def test_gradients_that_are_not_contiguous(one_core):
    torch.manual_seed(0)
    weights = [torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)]
    tokens = torch.randn(5, 32, requires_grad=True)
    out = functions.Feeding.apply(tokens, torch.rand(32), 1e-6, *weights)
    gradient = torch.randn(32, 5).t()
    (found,) = torch.autograd.grad(out, tokens, gradient, retain_graph=True)
    (expected,) = torch.autograd.grad(out, tokens, gradient.contiguous())
    assert torch.equal(found, expected)
