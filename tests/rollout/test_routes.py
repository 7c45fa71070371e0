"""R3: the experts that the engine chose are recorded where their token stands, and used by whatever comes after."""

from dataclasses import replace

import pytest
import torch

from harness.algorithms.advantages import last_tokens
from harness.budget import Meter
from harness.config import compose
from harness.judging import Judge
from harness.policy.flops import policy_cost
from harness.policy.logprobs import completion_logprobs
from harness.policy.routing import Routing, routers
from harness.reward import Rewards
from harness.rollout.batch import Batch
from harness.rollout.embedded import EmbeddedEngine
from harness.runs.directory import METRICS
from tests.policy.conftest import fresh
from tests.policy.families import FAMILIES, build
from tests.tiny_run import lines, run

EOS, PAD, MOST = 1, 0, 16
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4, 4], [20, 3, 17, 9]]


@pytest.fixture
def moe():
    model = fresh("tiny_moe")
    with torch.no_grad():  # so that sequences end at different steps
        model.lm_head.weight[EOS] += 0.02
    return model


def generate(model, decode_sequences=64, record_routes=True, prompts=PROMPTS):
    config = replace(compose().rollout, decode_sequences=decode_sequences)
    engine = EmbeddedEngine(model, config, (EOS,), PAD, MOST, record_routes=record_routes)
    return engine.generate(prompts, 2, torch.Generator().manual_seed(0))


def seen(batch):
    """[B, L] where the network reads a token."""
    return torch.arange(batch.input_ids.shape[1]) < batch.lengths.unsqueeze(1)


@torch.no_grad()
def assert_routes_are_those_of_a_plain_forward_pass(model, batch):
    """Each recorded expert is among the best k, but for rounding; experts as good as each other may take turns."""
    logits = []
    handles = [router.register_forward_hook(lambda *call: logits.append(call[2][0])) for router in routers(model)]
    completion_logprobs(model, batch, 1.0)
    for handle in handles:
        handle.remove()
    assert batch.routes.shape[:3] == (*batch.input_ids.shape, len(logits))
    for layer, scores in enumerate(logits):
        recorded = batch.routes[:, :, layer][seen(batch)].long()
        scores = scores.reshape(*batch.input_ids.shape, -1)[seen(batch)]
        least = scores.topk(recorded.shape[-1]).values[:, -1:]
        assert (scores.gather(1, recorded) >= least - 1e-4).all()
        assert all(len(set(experts)) == len(experts) for experts in recorded.tolist())


@pytest.mark.parametrize("decode_sequences", [2, 4, 64])
def test_routes_are_those_that_the_trainer_would_record(moe, decode_sequences):
    batch = generate(moe, decode_sequences)
    assert len(set(batch.completion_lengths.tolist())) > 2 and len(set(batch.prompt_lengths.tolist())) == 4
    assert_routes_are_those_of_a_plain_forward_pass(moe, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_samples_and_routes_as_its_trainer_does(family):
    model = build(family)
    batch = generate(model)
    assert len(set(batch.completion_lengths.tolist())) > 1
    routing = Routing(model)
    with torch.no_grad(), routing.watch():
        logprobs, _ = completion_logprobs(model, batch, 1.0)
    torch.testing.assert_close(batch.rollout_logprobs, logprobs, rtol=1e-4, atol=1e-4)
    # Some routers differ in what their best scores are, but ties are rare among so few.
    assert torch.equal(batch.routes[seen(batch)], routing.choices().unflatten(0, batch.input_ids.shape)[seen(batch)])


def test_routes_of_padding_are_the_first_experts(moe):
    batch = generate(moe, prompts=[[5, 6, 7], [8] * 30])
    padding = batch.routes[~seen(batch)]
    assert len(padding) > 40
    assert (padding == torch.arange(4)).all()


def test_recording_is_asked_for_and_changes_no_bit_of_what_is_sampled(moe):
    plain, recorded = generate(moe, record_routes=False), generate(moe)
    assert plain.routes is None
    for name in ("input_ids", "completions", "mask", "rollout_logprobs"):
        assert torch.equal(getattr(plain, name), getattr(recorded, name))


def test_routes_stay_with_their_rows(moe):
    batch = generate(moe)
    chosen = torch.tensor([6, 1, 3])
    part = batch.select(chosen)
    assert part.routes.shape[1] == part.input_ids.shape[1] == max(batch.lengths[chosen])
    for row, origin in enumerate(chosen):
        length = batch.lengths[origin]
        assert torch.equal(part.routes[row, :length], batch.routes[origin, :length])
    assert_routes_are_those_of_a_plain_forward_pass(moe, part)
    assert_routes_are_those_of_a_plain_forward_pass(moe, Batch.concatenate([part, batch]))


def test_the_old_policys_pass_takes_the_routes_of_the_rollout(moe):
    config = compose(["algorithm=grpo_rollout_routing_replay", "model=tiny_moe", "model.micro_batch_sequences=3"])
    config.budget.axis = "flops"
    batch = generate(moe)
    batch.routes = 31 - batch.routes  # such that they are no router's own
    judge = Judge(config, Meter(config.budget, moe.device), moe, policy_cost(moe), None, None, None)
    none = torch.zeros(len(batch.mask))
    rewards = Rewards(torch.zeros_like(batch.mask), last_tokens(batch.mask), outcome=none, true=none, steps=none)
    targets = judge.judge(batch, rewards)
    with torch.no_grad(), Routing(moe, batch.routes).watch():
        expected, _ = completion_logprobs(moe, batch, config.rollout.temperature)
    torch.testing.assert_close(targets.old_logprobs, expected, rtol=1e-4, atol=1e-4)
    assert (targets.old_logprobs - batch.rollout_logprobs).abs().max() > 0.01
    assert torch.equal(targets.routes, batch.routes)


def test_what_rows_begin_with_has_the_same_routes_even_where_micro_batches_chose_differently(moe, monkeypatch):
    config = compose(["algorithm=grpo_routing_replay", "model=tiny_moe", "model.micro_batch_sequences=1"])
    config.budget.axis = "flops"
    batch = generate(moe, record_routes=False)
    own, calls = Routing.choices, iter(range(100))
    monkeypatch.setattr(Routing, "choices", lambda routing: (own(routing) + next(calls)) % 32)
    judge = Judge(config, Meter(config.budget, moe.device), moe, policy_cost(moe), None, None, None)
    none = torch.zeros(len(batch.mask))
    rewards = Rewards(torch.zeros_like(batch.mask), last_tokens(batch.mask), outcome=none, true=none, steps=none)
    routes = judge.judge(batch, rewards).routes
    for one, other in ((0, 1), (2, 3), (4, 5), (6, 7)):
        same = (batch.input_ids[one] == batch.input_ids[other]).cummin(0).values & seen(batch)[[one, other]].all(0)
        assert same.sum() >= batch.prompt_lengths[one]
        assert torch.equal(routes[one, same], routes[other, same])
        apart = ~same & seen(batch)[[one, other]].all(0)
        assert not apart.any() or not torch.equal(routes[one, apart], routes[other, apart])


def test_a_run_uses_the_experts_of_its_rollouts_alone(cold_starts, tmp_path):
    large = ["model=tiny_moe", "algorithm.optimizer.learning_rate=5e-3"]
    for algorithm in ("grpo_rollout_routing_replay", "gspo_rollout_routing_replay"):
        rows = lines(run(tmp_path, f"algorithm={algorithm}", *large), METRICS)
        assert [row["moe/used_expert_change_fraction"] for row in rows] == [0, 0]
        assert min(row["moe/expert_change_fraction"] for row in rows) > 0.01
