"""A decoded token's way through the layers gives what the model's own gives, or is not taken."""

import gc
import weakref

import pytest
import torch

from harness.config import compose
from harness.policy import normalization, projections
from harness.policy.loading import prepare_layers
from harness.policy.normalization import fuse_normalization
from harness.policy.packing import drop_padding
from harness.policy.projections import join_projections
from harness.rollout import one_core as one_core_decoding
from harness.rollout import trial
from harness.rollout.cache import SlotCache
from harness.rollout.embedded import EmbeddedEngine
from harness.rollout.one_core import OneCoreDecoder
from harness.rollout.single_token import SingleTokenDecoder
from harness.rollout.weights import SamplingWeights
from tests.policy.conftest import fresh
from tests.policy.families import FAMILIES, build
from tests.policy.test_packing import dense

EOS, PAD = 1, 0
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4, 4], [20, 3, 17, 9]]
# Projections with biases; heads that are normalised; embeddings that are scaled; or none of it.
DENSE = {
    "gemma": {},
    "llama": {},
    "llama with biases": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
# Projections that are one, positions that are added.
OTHERS = ("phi3", "gpt2")
SUITED = {"mixtral", "qwen2_moe", "qwen3_moe"}


def prepared(model):
    prepare_layers(model, "cpu")
    return model


def assert_equal_to_the_models_own(model, kind=SingleTokenDecoder):
    engine = EmbeddedEngine(model, compose().rollout, (EOS,), PAD, 12)
    assert kind.suits(model)
    engine.policy = kind(model)
    given = engine.generate(PROMPTS, 3, torch.Generator().manual_seed(0))
    engine.policy = SamplingWeights(model)
    expected = engine.generate(PROMPTS, 3, torch.Generator().manual_seed(0))
    assert torch.equal(given.completions, expected.completions)
    assert len({tuple(row) for row in given.completions.tolist()}) > 6
    torch.testing.assert_close(given.rollout_logprobs, expected.rollout_logprobs, rtol=1e-4, atol=1e-4)


def moved(model):
    """So that biases and gains are not those that change nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    return model


@pytest.mark.parametrize("family", DENSE)
def test_dense_families(family):
    assert_equal_to_the_models_own(moved(prepared(dense(family.split()[0], **DENSE[family]))))


@pytest.mark.parametrize("family", sorted(set(DENSE) - {"gemma"}))
@pytest.mark.parametrize("sizes", [{"head_dim": 16}, {"head_dim": 32, "num_key_value_heads": 4}])
def test_dense_families_on_one_core(one_core, family, sizes):
    model = moved(prepared(dense(family.split()[0], **{**DENSE[family], **sizes})))
    assert_equal_to_the_models_own(model, OneCoreDecoder)
    assert isinstance(EmbeddedEngine(model, compose().rollout, (EOS,), PAD, 12).policy, OneCoreDecoder)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_embedded_models_on_one_core(one_core, name):
    assert_equal_to_the_models_own(moved(prepared(fresh(name))), OneCoreDecoder)


def test_what_is_not_for_kernels_takes_another_way(one_core, monkeypatch):
    assert not OneCoreDecoder.suits(prepared(dense("llama", head_dim=8)))
    assert not OneCoreDecoder.suits(prepared(dense("gemma", head_dim=16)))  # scales its embeddings
    model = prepared(dense("llama", head_dim=16))
    assert OneCoreDecoder.suits(model)
    monkeypatch.setattr(one_core_decoding, "WIDEST", 31)
    assert not OneCoreDecoder.suits(model)
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert not OneCoreDecoder.suits(model) and SingleTokenDecoder.suits(model)


@pytest.mark.parametrize("family", sorted(SUITED))
def test_families_of_experts(family):
    assert_equal_to_the_models_own(prepared(build(family)))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SUITED))
def test_other_families_of_experts_are_left_to_transformers(family):
    assert not SingleTokenDecoder.suits(prepared(build(family)))


@pytest.mark.parametrize("family", OTHERS)
def test_other_dense_families_are_left_to_transformers(family):
    assert not SingleTokenDecoder.suits(prepared(dense(family)))


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_weights_that_have_changed_are_the_ones_that_sample(one_core, name):
    model = prepared(fresh(name))
    engine = EmbeddedEngine(model, compose().rollout, (EOS,), PAD, 12)
    before = engine.generate(PROMPTS, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                projection.weight.mul_(-1.5)
            for weight in layer.mlp.parameters():
                weight.mul_(-1.5)
    after = engine.generate(PROMPTS, 3, torch.Generator().manual_seed(0))
    engine.policy = SamplingWeights(model)
    expected = engine.generate(PROMPTS, 3, torch.Generator().manual_seed(0))
    assert not torch.equal(before.completions, after.completions)
    assert torch.equal(after.completions, expected.completions)


def test_whether_a_model_suits_is_tried_once_and_forgotten_with_it(monkeypatch):
    tried = []
    probe = trial._probe
    monkeypatch.setattr(trial, "_probe", lambda policy: tried.append(policy) or probe(policy))
    model = prepared(fresh("tiny_dense"))
    assert SingleTokenDecoder.suits(model) and len(tried) == 2
    assert SingleTokenDecoder.suits(model) and len(tried) == 2
    assert SingleTokenDecoder.suits(prepared(fresh("tiny_dense"))) and len(tried) == 4
    kept = weakref.ref(model)
    tried.clear()
    del model
    gc.collect()
    assert kept() is None


def test_copies_in_another_precision_follow_the_weights(monkeypatch):
    """As on a GPU: those that are multiplied at once are parts of one tensor, which stays where it is."""
    model = dense("qwen3", head_dim=16)
    fuse_normalization(model)
    drop_padding(model)
    join_projections(model)
    for module in (normalization, projections):
        monkeypatch.setattr(module, "autocast_dtype", lambda states: torch.bfloat16)
    tokens, mask, positions = torch.tensor([[5, 6, 7]]), None, torch.arange(3).unsqueeze(0)
    given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "use_cache": True}
    policy, plain, found = SingleTokenDecoder(model), SamplingWeights(model), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            for side in (policy, plain):
                side.refresh()
                found.append(side(**given, past_key_values=SlotCache(model.config, 1, 3), logits_to_keep=1))
            torch.testing.assert_close(found[-2], found[-1], rtol=3e-2, atol=3e-2)
            layer = model.model.layers[1]
            for module, whole in zip((layer.self_attn, layer.mlp), policy._joint[1], strict=True):
                whole = whole if isinstance(whole, torch.Tensor) else whole.weight
                together = torch.cat([projection.weight for projection in module.projections()])
                assert whole.dtype == torch.bfloat16 and torch.equal(whole, together.bfloat16())
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert not torch.allclose(found[0], found[2], rtol=3e-2, atol=3e-2)
    kept = policy._joint[1].attention
    with torch.no_grad():
        policy.refresh()
    assert policy._joint[1].attention is kept
    first = policy.copies["model.layers.1.self_attn.q_proj.weight"]
    assert kept.weight.data_ptr() == first.data_ptr()  # not copied again
    assert torch.equal(kept.gain[0], model.model.layers[1].self_attn.q_norm.weight)


def test_layers_that_do_not_suit_find_their_copies_together(monkeypatch):
    model = dense("olmo2", head_dim=8)
    drop_padding(model)
    join_projections(model)
    gated = [module for module in model.modules() if isinstance(module, projections.GatedFeedForward)]
    assert len(gated) == 2 and not SingleTokenDecoder.suits(model)
    monkeypatch.setattr(projections, "autocast_dtype", lambda states: torch.bfloat16)
    policy, together = SamplingWeights(model), []
    stacked = projections.stacked
    monkeypatch.setattr(
        projections, "stacked", lambda weights: together.append((weights, stacked(weights))) or together[-1][1]
    )
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy.refresh()
        torch.testing.assert_close(policy(**inputs), model(**inputs).logits[:, -1], rtol=3e-2, atol=3e-2)
    (weights, whole), (_, anew) = together[0], together[-1]
    assert whole.data_ptr() == weights[0].data_ptr() and torch.equal(whole, torch.cat(weights))
    assert anew.dtype == torch.bfloat16 and len(together) == 4


def test_weights_that_gradients_are_asked_for_are_never_taken_as_one():
    whole = torch.randn(5, 3)
    assert projections.stacked(list(whole.split([3, 2]))).data_ptr() == whole.data_ptr()
    for parts in (whole.split([3, 2])[::-1], whole.clone().requires_grad_().split([3, 2]), (whole[:2], whole[3:])):
        given = projections.stacked(list(parts))
        assert given.data_ptr() != whole.data_ptr() and torch.equal(given, torch.cat(list(parts)))
