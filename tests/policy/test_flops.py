"""FLOPs from the architecture against torch's own counter, which sees every matrix product."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma3Config

from harness.config import compose
from harness.policy.critic import Critic
from harness.policy.flops import BACKWARD, active_parameters, critic_cost, policy_cost
from harness.policy.logprobs import completion_logprobs
from harness.rollout.embedded import EmbeddedEngine
from tests.policy.conftest import make_batch
from tests.policy.families import HYBRID, LATENT, build
from tests.policy.test_packing import dense


@pytest.fixture
def countable(model):
    """The model with attention and experts as plain matrix products, all of which the counter knows."""
    model.set_attn_implementation("eager")
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return model


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_forward_and_backward_of_the_policy(countable):
    batch = make_batch(rows=8, width=24, equal=True)
    cost = policy_cost(countable).batch(batch)
    forward = counted(lambda: completion_logprobs(countable, batch, 1.0))
    assert cost == pytest.approx(forward, rel=0.02)
    both = counted(lambda: completion_logprobs(countable, batch, 1.0)[0].sum().backward())
    assert (1 + BACKWARD) * cost == pytest.approx(both, rel=0.02)


def test_forward_and_backward_of_the_critic(countable):
    batch = make_batch(rows=8, width=24, equal=True)
    critic = Critic(countable)
    torch.nn.init.ones_(critic.head.weight)  # a zero head would send zeros back, which cost the same
    cost = critic_cost(critic, countable.config).batch(batch)
    assert cost == pytest.approx(counted(lambda: critic(batch)), rel=0.02)
    assert (1 + BACKWARD) * cost == pytest.approx(counted(lambda: critic(batch).sum().backward()), rel=0.02)


@pytest.mark.parametrize("group_size", [1, 4])
def test_rollout(countable, group_size):
    engine = EmbeddedEngine(countable, compose().rollout, ends=[-1], pad=0, max_tokens=24)  # no sequence ends early
    prompts = [list(range(3, 10))] * 4
    results = []
    flops = counted(lambda: results.append(engine.generate(prompts, group_size, torch.Generator().manual_seed(0))))
    batch = results[0]
    expected = policy_cost(countable).sampling(batch.prompt_lengths, batch.completion_lengths, group_size)
    assert expected == pytest.approx(flops, rel=0.02)


def test_padding_costs_nothing(model):
    batch = make_batch()
    cost = policy_cost(model)
    alone = sum(cost.batch(batch.select(torch.tensor([row]))) for row in range(len(batch.mask)))
    assert cost.batch(batch) == pytest.approx(alone)


def test_active_parameters_count_experts_as_often_as_they_are_chosen(moe):
    experts = sum(p.numel() for name, p in moe.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in moe.parameters())
    assert experts > total / 2
    assert active_parameters(moe) == total - experts + experts * 4 // 32


@pytest.mark.parametrize(
    ("family", "operations"),
    [
        ("qwen3_moe", 4 * 3 * 4 * 8),  # scores and values: 2 + 2, layers, heads, head size
        ("deepseek_v3", 2 * 3 * 4 * (16 + 8)),  # latent attention: 16 of a query and key, 8 of a value
        ("qwen3_next", 4 * 1 * 4 * 8),  # one layer of three attends
        ("jamba", 4 * 2 * 4 * 8),  # two of three
    ],
)
def test_attention_counts_the_layers_that_attend_and_what_they_multiply(family, operations):
    assert policy_cost(build(family)).attention == operations


@pytest.mark.parametrize(
    ("model", "operations"),
    [
        (partial(build, "deepseek_v32", n_routed_experts=8, **LATENT), 2 * 3 * 4 * (16 + 8)),  # what an index chooses
        (partial(dense, "falcon_h1", **HYBRID["falcon_h1"]), 4 * 2 * 4 * 8),  # beside a state
        (partial(dense, "zamba2", **HYBRID["zamba2"]), 4 * 1 * 4 * 16),  # likewise, in the second of two
    ],
)
def test_attention_counts_where_it_has_another_name(model, operations):
    assert policy_cost(model()).attention == operations


def test_values_count_in_their_own_size():
    layers = {"layer_types": ["full_attention"] * 3, "moe_intermediate_size": 16}
    model = build("mimo_v2_flash", n_routed_experts=8, head_dim=8, v_head_dim=4, **layers)
    assert policy_cost(model).attention == 2 * 3 * 4 * (8 + 4)


def test_a_tower_for_images_costs_a_text_nothing():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**sizes, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    images = {**sizes, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=1)
    seeing, blind = (AutoModelForCausalLM.from_config(each) for each in (config, config.text_config))
    assert sum(p.numel() for p in seeing.parameters()) > sum(p.numel() for p in blind.parameters())
    assert policy_cost(seeing) == policy_cost(blind)
    assert critic_cost(Critic(seeing), seeing.config) == critic_cost(Critic(blind), blind.config)
    assert active_parameters(seeing) == active_parameters(blind)


def test_convolutions_are_no_experts_and_experts_go_by_any_of_their_names():
    dense = build("lfm2", layer_types=["conv", "full_attention", "conv"])
    convolutions = sum(p.numel() for p in dense.parameters() if p.ndim == 3)
    assert convolutions > 0 and active_parameters(dense) == sum(p.numel() for p in dense.parameters())
    mixture = build("gemma4_text")
    experts = sum(p.numel() for name, p in mixture.named_parameters() if ".experts." in name)
    assert active_parameters(mixture) == sum(p.numel() for p in mixture.parameters()) - experts + experts * 2 // 8
