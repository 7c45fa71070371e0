"""The engine against plain sampling without a cache."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.config import compose
from harness.policy.loading import prepare_layers
from harness.policy.logprobs import completion_logprobs
from harness.rollout import one_core as one_core_rollout
from harness.rollout.batch import send
from harness.rollout.cache import SlotCache
from harness.rollout.decoding import draw, each_sees_one, next_rows, sample
from harness.rollout.embedded import EmbeddedEngine
from tests.policy.conftest import fresh
from tests.policy.families import HYBRID
from tests.policy.test_packing import dense

EOS, PAD = 1, 0
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4, 4], [20, 3, 17, 9]]
ROLLOUT = compose().rollout


@pytest.fixture(params=["tiny_dense", "tiny_moe", "tiny_dense as it runs", "tiny_moe as it runs"])
def model(request):
    name, *prepared = request.param.split(maxsplit=1)
    network = fresh(name)
    with torch.no_grad():  # so that sequences end at different steps
        network.lm_head.weight[EOS] += 0.02
    if prepared:
        prepare_layers(network, "cpu")
    return network


def generate(model, prompts=PROMPTS, group_size=2, seed=0, max_tokens=16, ends=(EOS,), **changes):
    engine = EmbeddedEngine(model, replace(ROLLOUT, **changes), ends, PAD, max_tokens)
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
            expected, logprob = sample(logits, noise[row, step : step + 1], 1.0)
            assert token == expected.item()
            assert batch.rollout_logprobs[row, step].item() == pytest.approx(logprob.item(), abs=1e-4)
            ids.append(token)
        assert completion[-1] == EOS or len(completion) == 16
        assert EOS not in completion[:-1]
    assert len({len(completion) for completion in rows(batch)}) > 2


def test_any_of_several_tokens_ends_a_completion(model):
    one, three = (generate(model, ends=ends) for ends in ((EOS,), (EOS, 7, 9)))
    for before, after in zip(rows(one), rows(three), strict=True):
        end = next((place for place, token in enumerate(before) if token in (EOS, 7, 9)), len(before))
        assert after == before[: end + 1]
    assert three.mask.sum() < one.mask.sum()


@torch.no_grad()
def test_log_probabilities_at_sampling_are_the_trainers(model):
    batch = generate(model)
    logprobs, _ = completion_logprobs(model, batch, 1.0)
    torch.testing.assert_close(batch.rollout_logprobs, logprobs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", HYBRID)
def test_layers_that_attend_and_keep_a_state_beside_it_give_up_rows_of_both(family):
    model = dense(family, **HYBRID[family])
    batch = generate(model)
    logprobs, _ = completion_logprobs(model, batch, 1.0)
    torch.testing.assert_close(batch.rollout_logprobs, logprobs, rtol=1e-4, atol=1e-4)
    assert len(set(batch.completion_lengths.tolist())) > 1


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


def test_prompts_of_one_token(model):
    batch = generate(model, prompts=[[5], [6]], group_size=3)
    logprobs, _ = completion_logprobs(model, batch, 1.0)
    torch.testing.assert_close(batch.rollout_logprobs, logprobs.detach(), rtol=1e-4, atol=1e-4)


def test_global_random_state_is_left_alone(model):
    before = torch.random.get_rng_state()
    generate(model)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def decoded(monkeypatch):
    """How many rows each forward pass of an engine has."""
    sizes = []
    forward = EmbeddedEngine._forward

    def counting(self, input_ids, *rest):
        sizes.append(len(input_ids))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(EmbeddedEngine, "_forward", counting)
    return sizes


def distinct(batch, step):
    """How many beginnings of this many tokens living sequences of the same prompt have."""
    living = [(i // 2, *row[:step]) for i, row in enumerate(rows(batch)) if len(row) > step]
    return len(set(living))


def test_a_step_decodes_what_lives_and_differs(model, decoded):
    batch = generate(model)
    steps = range(1, int(batch.completion_lengths.max()))
    assert decoded[1:] == [distinct(batch, step) for step in steps]
    assert decoded[-1] < len(batch.mask)


def test_sequences_that_are_alike_are_decoded_once(model, decoded):
    with torch.no_grad():  # nearly sure of each token, so that groups part late or never
        model.lm_head.weight.mul_(3)
    batch = generate(model, temperature=0.7)
    steps = range(1, int(batch.completion_lengths.max()))
    assert decoded[1:] == [distinct(batch, step) for step in steps]
    assert decoded[1] < len(batch.mask)
    alone = [row for i in range(len(PROMPTS)) for row in rows(generate(model, [PROMPTS[i]], temperature=0.7))]
    assert rows(batch)[:2] == alone[:2]
    logprobs, _ = completion_logprobs(model, batch, 0.7)
    torch.testing.assert_close(batch.rollout_logprobs, logprobs.detach(), rtol=1e-4, atol=1e-4)


def test_rows_hold_prompt_and_completion_without_its_last_token(model):
    batch = generate(model)
    for row, completion in enumerate(rows(batch)):
        expected = PROMPTS[row // 2] + completion[:-1]
        assert batch.input_ids[row, : batch.lengths[row]].tolist() == expected
        assert (batch.input_ids[row, batch.lengths[row] :] == PAD).all()


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.0, 0.1, 0.6, 0.0, 0.3]])).expand(20_000, 5)
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logprobs = sample(logits, noise, 1.0)
    shares = torch.bincount(tokens, minlength=5) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3]), atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, logits.gather(1, tokens.unsqueeze(1)).squeeze(1))
    edges, _ = sample(logits[:2], torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64), 1.0)
    assert edges.tolist() == [1, 4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [5, 16, 41])
def test_draws_by_a_kernel_are_those_of_torch(one_core, vocabulary, temperature):
    generator = torch.Generator().manual_seed(0)
    logits, rows = torch.randn(7, vocabulary, generator=generator) * 4, torch.arange(2000) % 7
    logits[:, 1] = -torch.inf  # never drawn
    before = logits.clone()
    noise = torch.rand(2000, generator=generator, dtype=torch.float64)
    noise[:2] = torch.tensor([0.0, 1.0])
    assert one_core_rollout.draws(logits)
    tokens, logprobs = one_core_rollout.draw(logits, rows, noise, temperature)
    expected, likely = draw(logits, rows, noise, temperature)
    assert torch.equal(tokens, expected) and (tokens != 1).all() and torch.equal(logits, before)
    torch.testing.assert_close(logprobs, likely)


def test_what_is_no_number_is_not_drawn_quietly(one_core):
    logits = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 1.0, 2.0]])
    _, logprobs = one_core_rollout.draw(logits, torch.tensor([0, 1]), torch.rand(2, dtype=torch.float64), 1.0)
    assert logprobs.isnan().tolist() == [True, False]


def test_large_vocabularies_and_more_threads_draw_by_torch(one_core):
    assert not one_core_rollout.draws(torch.zeros(1, 513)) and one_core_rollout.draws(torch.zeros(1, 512))
    torch.set_num_threads(2)
    assert not one_core_rollout.draws(torch.zeros(1, 512))


def test_prompts_see_what_came_before_and_padding_sees_itself():
    present = torch.tensor([[True, True, True], [False, False, True], [False, True, True]])
    seen = each_sees_one(present)
    assert seen.shape == (3, 1, 3, 3) and seen.any(-1).all()
    assert seen[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert seen[2, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert each_sees_one(present.to("meta")).is_meta  # where the prompts are: it may be large


def test_what_is_sent_to_a_gpu_is_one_block_of_pinned_memory(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: sent.append(self.is_contiguous()) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    numbers = torch.arange(12).view(3, 4)
    assert torch.equal(send(numbers[:, :2], torch.device("cuda")), numbers[:, :2])
    assert sent == [True]


@pytest.mark.parametrize(
    ("row", "tokens", "expected"),
    [
        ([0, 1, 2], [4, 4, 5], ([0, 1, 2], [4, 4, 5], [0, 1, 2])),  # as they were
        ([0, 0, 0, 1], [4, 4, 4, 6], ([0, 1], [4, 6], [0, 0, 0, 1])),  # still the same
        ([0, 0, 1], [5, 4, 6], ([0, 1, 0], [4, 6, 5], [2, 0, 1])),  # part; the second one behind the others
        ([1, 2, 3], [4, 4, 5], ([3, 1, 2], [5, 4, 4], [1, 2, 0])),  # the first has ended; the last takes its place
        ([3], [7], ([3], [7], [0])),
        ([0, 2, 2], [9, 9, 8], ([0, 2, 2], [9, 9, 8], [0, 1, 2])),  # into the gap
    ],
)
@pytest.mark.parametrize("rows_by", [next_rows, one_core_rollout.next_rows])
def test_rows_of_the_next_step_by_hand(rows_by, row, tokens, expected):
    given = rows_by(torch.tensor(row), torch.tensor(tokens), 10)
    assert tuple(each.tolist() for each in given) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=12))
def test_each_sequence_goes_on_behind_its_own(drawn):
    row, tokens = torch.tensor(drawn).unbind(1)
    source, latest, place = next_rows(row, tokens, 4)
    for found, expected in zip(one_core_rollout.next_rows(row, tokens, 4), (source, latest, place), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(source[place], row) and torch.equal(latest[place], tokens)
    assert len(source) == len(set(drawn)) and set(place.tolist()) == set(range(len(source)))
    stay = {int(each) for each in source if each < len(source)}
    assert {int(each) for index, each in enumerate(source) if each == index} == stay


@pytest.mark.parametrize("threads", [1, 2])  # by a kernel, and by torch
def test_rows_of_a_cache_are_copied_and_given_up(one_core, threads):
    torch.set_num_threads(threads)
    cache = SlotCache(fresh("tiny_dense").config, rows=4, columns=3)
    states = torch.arange(4.0).view(2, 1, 2, 1)
    cache.update(states, -states, 0)
    cache.layers = cache.layers[:1]  # the others hold nothing
    cache.batch_select_indices(torch.tensor([1, 0, 0]))
    keys, values = cache.update(torch.full((3, 1, 1, 1), 9.0), torch.full((3, 1, 1, 1), 8.0), 0)
    assert keys.squeeze().tolist() == [[2, 3, 9], [0, 1, 9], [0, 1, 9]]
    assert values.squeeze().tolist() == [[-2, -3, 8], [0, -1, 8], [0, -1, 8]]
