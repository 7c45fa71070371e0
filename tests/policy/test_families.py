"""Routing replay on a tiny model of each family: whatever a router's arithmetic is, its own routes change nothing,
other routes are taken as told, and its weights keep their gradient."""

import pytest
import torch
from transformers import AutoConfig

from harness.cell import prepare
from harness.config import compose
from harness.errors import ConfigError
from harness.policy.architecture import is_moe
from harness.policy.logprobs import completion_logprobs
from harness.policy.routing import Routing, check_routing, expert_layers, routers
from harness.policy.tokenizer import build_tokenizer
from harness.trainer import Trainer
from tests.policy.families import EXPERTS, FAMILIES, LATENT, build

# Of three layers these have a dense one among them.
_MIXED = ("qwen3_moe", "jamba", "ernie4_5_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "lfm2_moe")
# One for each way from scores to weights.
_ARITHMETICS = ["mixtral", "jamba", "deepseek_v2", "gpt_oss", "deepseek_v3", "minimax_m2"]
# Not every expert has weights.
_ZERO_EXPERTS = {"n_routed_experts": EXPERTS, "zero_expert_num": 2, "num_layers": 1, "head_dim": 8, **LATENT}
# Weights of all experts are rows of one matrix.
_FLAT_EXPERTS = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 1,
    "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": 2, "ffn_hidden_size": 16},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return build(family)


def run(model, batch, replay=None):
    """Log-probabilities, all gradients of their squares' sum, and the routing."""
    routing = Routing(model, replay)
    model.zero_grad()
    with routing.watch():
        logprobs, _ = completion_logprobs(model, batch, 1.0)
        logprobs.square().sum().backward()
    return logprobs.detach(), [parameter.grad for parameter in model.parameters()], routing


def stacked(indices, batch):
    return torch.stack([layer.reshape(*batch.input_ids.shape, -1) for layer in indices], 2)


def same(gradients, others):
    return all(
        one is other if one is None or other is None else torch.equal(one, other)
        for one, other in zip(gradients, others, strict=True)
    )


def opposite(routes):
    """Other experts, in other groups wherever the recorded ones leave a group out."""
    return EXPERTS - 1 - routes


def start(folder, algorithm, family, changes):
    """All of a run before its first step."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build(family, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    config = compose([f"algorithm={algorithm}", "model=huggingface", f"model.path={folder}", f"results={folder}"])
    Trainer(config, prepare(config))


def seen(batch):
    """[B, L] the positions that reach a completion token."""
    return torch.arange(batch.input_ids.shape[1]) < batch.lengths.unsqueeze(1)


def test_the_layers_with_experts_are_found_among_dense_ones(family, model):
    layers = expert_layers(model)
    assert len(layers) == len(routers(model)) == (2 if family in _MIXED else 3)
    check_routing(model)


def test_native_choices_are_recorded_and_are_what_the_experts_are_called_with(model, batch):
    called = []
    for layer in expert_layers(model):
        layer.experts.register_forward_pre_hook(lambda module, arguments: called.append(arguments[1]))
    _, _, routing = run(model, batch)
    routes = routing.choices().unflatten(0, batch.input_ids.shape)
    assert routes.shape[:2] == batch.input_ids.shape
    assert torch.equal(stacked(called, batch).to(routes.dtype), routes)
    assert torch.equal(stacked(routing.used, batch), stacked(routing.native, batch))
    assert (routes[..., 0] != routes[..., 1]).all()
    assert len(routes[seen(batch)].unique()) > EXPERTS // 2


def test_replaying_its_own_routes_changes_no_bit_of_logits_and_gradients(model, batch):
    logprobs, gradients, routing = run(model, batch)
    again, gradients_again, _ = run(model, batch, routing.choices().unflatten(0, batch.input_ids.shape))
    assert torch.equal(logprobs, again)
    assert same(gradients, gradients_again)


def test_replaying_other_routes_uses_exactly_those(model, batch):
    logprobs, _, routing = run(model, batch)
    routes = routing.choices().unflatten(0, batch.input_ids.shape)
    called, weights = [], []
    for layer in expert_layers(model):
        layer.experts.register_forward_pre_hook(lambda module, arguments: called.append(arguments[1]))
        layer.experts.register_forward_pre_hook(lambda module, arguments: weights.append(arguments[2]))
    other, _, routing = run(model, batch, opposite(routes))
    assert torch.equal(stacked(routing.used, batch), opposite(routes).long())
    assert torch.equal(stacked(called, batch), opposite(routes).long())
    assert all((weight > 0).all() for weight in weights)  # not gathered from scores zeroed outside of a native choice
    assert (other - logprobs).abs().max() > 1e-3
    # What lies before the first layer with experts is as it was, and so is what that layer would choose.
    assert torch.equal(stacked(routing.native, batch)[:, :, 0], routes[:, :, 0].long())


def test_a_single_group_of_experts_is_ranked_without_being_taken_for_a_choice(batch):
    """GLM-4.5's setting: the ranking inside of groups then has as many columns as there are experts."""
    model = build("glm4_moe", n_group=1, topk_group=1, num_experts_per_tok=3)
    logprobs, gradients, routing = run(model, batch)
    again, gradients_again, _ = run(model, batch, routing.choices().unflatten(0, batch.input_ids.shape))
    assert torch.equal(logprobs, again)
    assert same(gradients, gradients_again)


def test_every_replayed_expert_gives_its_router_a_gradient(model, batch):
    """A weight gathered from scores that were zeroed outside of the native choice has none."""
    _, _, routing = run(model, batch)
    replay = opposite(routing.choices().unflatten(0, batch.input_ids.shape))
    _, _, routing = run(model, batch, replay)
    for layer, router in enumerate(routers(model)):
        weight = next(p for p in router.parameters() if p.ndim == 2 and len(p) == EXPERTS)
        reached = weight.grad.abs().sum(1) > 0
        assert weight.grad.isfinite().all()
        assert reached[replay[batch.positions()][:, layer].unique().long()].all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # its new name is younger than our oldest
def test_recomputed_activations_take_the_same_routes(model, batch):
    _, _, routing = run(model, batch)
    replay = opposite(routing.choices().unflatten(0, batch.input_ids.shape))
    model.train()
    logprobs, gradients, _ = run(model, batch, replay)
    passes = []
    routers(model)[0].register_forward_pre_hook(lambda *_: passes.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, gradients_again, routing = run(model, batch, replay)
    assert len(passes) == 2  # the forward pass, and once more for the backward pass
    assert torch.equal(logprobs, again)
    assert same(gradients, gradients_again)
    assert torch.equal(stacked(routing.used, batch), replay.long())


def test_routes_of_padding_reach_no_completion(model, batch):
    _, _, routing = run(model, batch)
    replay = opposite(routing.choices().unflatten(0, batch.input_ids.shape))
    logprobs, gradients, _ = run(model, batch, replay)
    elsewhere = torch.where(seen(batch)[:, :, None, None], replay, opposite(replay))
    assert not torch.equal(elsewhere, replay)
    again, gradients_again, _ = run(model, batch, elsewhere)
    torch.testing.assert_close(again, logprobs, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, gradients_again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", _ARITHMETICS)
def test_router_gradients_under_replay_equal_finite_differences(family, batch):
    model = build(family)
    _, _, routing = run(model, batch)
    replay = opposite(routing.choices().unflatten(0, batch.input_ids.shape))
    model.double().set_experts_implementation("eager")  # the grouped kernel knows no float64

    def loss():
        with Routing(model, replay).watch():
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[batch.positions()]
        return logits.log_softmax(-1)[:, 5].sum()

    for router in routers(model):
        weight = next(p for p in router.parameters() if p.ndim == 2 and len(p) == EXPERTS)
        (gradient,) = torch.autograd.grad(loss(), weight)
        step = 1e-3  # some routers compute in float32 whatever the model is in
        direction = gradient / gradient.norm()
        with torch.no_grad():
            weight.add_(step * direction)
            above = loss()
            weight.sub_(2 * step * direction)
            below = loss()
            weight.add_(step * direction)
        assert gradient.norm() > 1e-3
        torch.testing.assert_close((above - below) / (2 * step), gradient.norm(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *((family, True) for family in FAMILIES),
        ("qwen3_5_moe", True),  # the fields are those of its text part
        ("dbrx", True),
        ("qwen3_5", False),
        ("qwen3", False),
    ],
)
def test_a_mixture_is_told_by_its_configuration(tmp_path, config, expected):
    (build(config).config if config in FAMILIES else AutoConfig.for_model(config)).save_pretrained(tmp_path)
    assert is_moe(compose(["model=huggingface", f"model.path={tmp_path}"]).model) is expected


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        # masks its scores and takes the maximum, twice
        ("phimoe", {"num_local_experts": EXPERTS}, "PhimoeSparseMoeBlock"),
        # has a table of which token goes where in its first layers
        ("deepseek_v4", {"n_routed_experts": EXPERTS, "head_dim": 8}, "DeepseekV4SparseMoeBlock"),
    ],
)
def test_a_layer_whose_choices_cannot_be_seen_is_named(family, changes, named):
    with pytest.raises(ConfigError, match=named):
        check_routing(build(family, **changes))


@pytest.mark.parametrize(("family", "changes"), [("longcat_flash", _ZERO_EXPERTS), ("dbrx", _FLAT_EXPERTS)])
def test_a_mixture_whose_experts_are_not_found_is_not_taken_for_a_dense_model(family, changes):
    model = build(family, **changes)
    with pytest.raises(ConfigError, match=f"model: the experts of {type(model).__name__} are not, or not all,"):
        check_routing(model)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("phimoe", {"num_local_experts": EXPERTS}, "PhimoeSparseMoeBlock"),
        ("longcat_flash", _ZERO_EXPERTS, "LongcatFlashForCausalLM"),
    ],
)
def test_a_run_that_could_not_replay_stops_before_it_starts(tmp_path, family, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        start(tmp_path, "gspo_routing_replay", family, changes)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mamba", {"state_size": 8}, "AttributeError: 'MambaConfig' object has no attribute 'num_attention_heads'"),
        ("llama4_text", {"num_local_experts": EXPERTS, "intermediate_size_mlp": 48}, "AttributeError: "),  # no decoder
        ("minimax", {"num_local_experts": EXPERTS, "head_dim": 8}, "ValueError: MiniMax uses cache of its own"),
    ],
)
def test_a_model_that_is_not_supported_is_named_before_a_run_starts(tmp_path, family, changes, reason):
    with pytest.raises(ConfigError, match=rf"^model: \w+ForCausalLM is not supported \({reason}.*; choose a model of"):
        start(tmp_path, "grpo", family, changes)
