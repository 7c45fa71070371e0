"""The engine against plain sampling without a cache."""

from dataclasses import replace

import pytest
import torch

from harness.config import compose
from harness.policy.logprobs import completion_logprobs
from harness.rollout.decoding import sample
from harness.rollout.embedded import EmbeddedEngine, _closing_gaps, _each_sees_one
from tests.policy.conftest import fresh

EOS, PAD = 1, 0
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4, 4], [20, 3, 17, 9]]
ROLLOUT = compose().rollout


@pytest.fixture(params=["tiny_dense", "tiny_moe"])
def model(request):
    network = fresh(request.param)
    with torch.no_grad():  # so that sequences end at different steps
        network.lm_head.weight[EOS] += 0.02
    return network


def generate(model, prompts=PROMPTS, group_size=2, seed=0, max_tokens=16, **changes):
    engine = EmbeddedEngine(model, replace(ROLLOUT, **changes), EOS, PAD, max_tokens)
    return engine.generate(prompts, group_size, torch.Generator().manual_seed(seed))


def rows(batch):
    return [batch.completions[i, : batch.completion_lengths[i]].tolist() for i in range(len(batch.mask))]


@torch.no_grad()
def test_equals_sampling_one_by_one_without_a_cache(model):
    batch = generate(model, temperature=0.8)
    noise = torch.rand(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, completion in enumerate(rows(batch)):
        ids = list(PROMPTS[row // 2])
        for step, token in enumerate(completion):
            logits = model(input_ids=torch.tensor([ids])).logits[:, -1].float() / 0.8
            expected, logprob = sample(logits, noise[row, step : step + 1])
            assert token == expected.item()
            assert batch.rollout_logprobs[row, step].item() == pytest.approx(logprob.item(), abs=1e-4)
            ids.append(token)
        assert completion[-1] == EOS or len(completion) == 16
        assert EOS not in completion[:-1]
    assert len({len(completion) for completion in rows(batch)}) > 2


@torch.no_grad()
def test_log_probabilities_at_sampling_are_the_trainers(model):
    batch = generate(model)
    logprobs, _ = completion_logprobs(model, batch, 1.0)
    torch.testing.assert_close(batch.rollout_logprobs, logprobs, rtol=1e-4, atol=1e-4)


def test_completions_do_not_depend_on_how_many_are_decoded_at_once(model):
    assert (
        rows(generate(model)) == rows(generate(model, decode_sequences=2)) == rows(generate(model, decode_sequences=3))
    )


def test_same_seed_same_completions_and_another_seed_others(model):
    assert rows(generate(model, seed=3)) == rows(generate(model, seed=3))
    assert rows(generate(model, seed=3)) != rows(generate(model, seed=4))


def test_the_random_numbers_of_a_place_are_the_same_for_every_group_size(model):
    grouped = generate(model, prompts=[PROMPTS[0]], group_size=4)
    single = generate(model, prompts=[PROMPTS[0]] * 4, group_size=1)
    assert rows(grouped) == rows(single)
    assert grouped.group_ids.tolist() == [0, 0, 0, 0]
    assert single.group_ids.tolist() == [0, 1, 2, 3]


def test_global_random_state_is_left_alone(model):
    before = torch.random.get_rng_state()
    generate(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_finished_sequences_are_not_decoded_any_more(model, monkeypatch):
    sizes = []
    forward = EmbeddedEngine._forward

    def counting(self, input_ids, *rest):
        sizes.append(len(input_ids))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(EmbeddedEngine, "_forward", counting)
    batch = generate(model)
    lengths = batch.completion_lengths
    assert sizes[1:] == [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]


def test_rows_hold_prompt_and_completion_without_its_last_token(model):
    batch = generate(model)
    for row, completion in enumerate(rows(batch)):
        expected = PROMPTS[row // 2] + completion[:-1]
        assert batch.input_ids[row, : batch.lengths[row]].tolist() == expected
        assert (batch.input_ids[row, batch.lengths[row] :] == PAD).all()


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.0, 0.1, 0.6, 0.0, 0.3]])).expand(20_000, 5)
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logprobs = sample(logits, noise)
    shares = torch.bincount(tokens, minlength=5) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3]), atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, logits.gather(1, tokens.unsqueeze(1)).squeeze(1))
    edges, _ = sample(logits[:2], torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64))
    assert edges.tolist() == [1, 4]


def test_prompts_see_what_came_before_and_padding_sees_itself():
    present = torch.tensor([[True, True, True], [False, False, True], [False, True, True]])
    seen = _each_sees_one(present)
    assert seen.shape == (3, 1, 3, 3) and seen.any(-1).all()
    assert seen[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert seen[2, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("alive", "expected"),
    [("1111", [0, 1, 2, 3]), ("0111", [3, 1, 2]), ("1010", [0, 2]), ("0001", [3]), ("1100", [0, 1])],
)
def test_gaps_are_closed_by_moving_the_last_rows(alive, expected):
    assert _closing_gaps(torch.tensor([flag == "1" for flag in alive])).tolist() == expected
