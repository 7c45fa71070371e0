"""Passes without padding equal padded ones, with the models that can do without, and leave the others alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from harness.policy.attention import PADDING_FREE, causal_attention, decoding_mask, padding_free_attention
from harness.policy.critic import Critic
from harness.policy.logprobs import completion_logprobs
from harness.policy.packing import Packing, drop_padding
from harness.policy.products import MULTIPLE
from harness.policy.routing import Routing, expert_layers
from harness.rollout.batch import join
from tests.policy.conftest import fresh, make_batch
from tests.policy.families import FAMILIES, LATENT, build
from tests.policy.test_families import opposite, seen

# Recurrent layers carry what came before through the row; sinks and caps are not in torch's attention.
_PADDED = {"qwen3_next", "qwen3_5_moe_text", "jamba", "gpt_oss", "lfm2_moe"}
# Rows that are read for one prompt, which are apart from each other, and how many tokens are the same at the beginning
# of all prompts and of all completions.
_BATCHES = ((1, 0), (3, 0), (1, 3), (3, 5))
_DENSE = ("llama", "qwen2", "gemma", "phi3", "gpt2")


@pytest.fixture(params=_BATCHES, ids="{0[0]} a prompt, {0[1]} alike".format)
def batch(request):
    group_size, alike = request.param
    return make_batch(group_size=group_size, alike=alike)


def dense(family, **changes):
    """A tiny random dense model."""
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **{**sizes, **more, "bos_token_id": None, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def passes(model, batch, replay=None):
    """Log-probabilities, all gradients of their squares' sum, and the routes [B, L, layers, k]."""
    packing = Packing(model.base_model, batch)
    routing = Routing(model, None if replay is None else packing.of_tokens(replay))
    model.zero_grad()
    with routing.watch():
        logprobs, _ = completion_logprobs(model, batch, 1.0)
        logprobs.square().sum().backward()
    routes = packing.of_positions(routing.choices()) if expert_layers(model) else None
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return logprobs.detach(), gradients, routes


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert len(one[1]) == len(other[1]) > 0
    for gradient, own in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-3, atol=1e-5 * float(own.abs().max()) + 1e-7)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - _PADDED))
def test_each_family_of_experts_gives_what_it_gave_with_padding(family, batch):
    model = build(family)
    padded = passes(model, batch)
    drop_padding(model)
    assert model.config._attn_implementation == PADDING_FREE
    packed = passes(model, batch)
    assert_same(packed, padded)
    assert torch.equal(packed[2][seen(batch)], padded[2][seen(batch)])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - _PADDED))
def test_replay_without_padding_equals_replay_with_it(family, batch):
    model = build(family)
    replay = opposite(passes(model, batch)[2])
    padded = passes(model, batch, replay)
    drop_padding(model)
    assert_same(passes(model, batch, replay), padded)


@pytest.mark.parametrize("family", sorted(_PADDED))
def test_models_that_need_their_rows_keep_them(family, batch):
    model = build(family)
    before, attention = passes(model, batch), model.config._attn_implementation
    drop_padding(model)
    assert model.config._attn_implementation == attention
    after = passes(model, batch)
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("family", _DENSE)
def test_dense_families_give_what_they_gave_with_padding(family, batch):
    model = dense(family)
    padded = passes(model, batch)
    drop_padding(model)
    assert model.config._attn_implementation == PADDING_FREE
    assert_same(passes(model, batch), padded)


def test_a_sliding_window_keeps_its_rows():
    model = dense("mistral", sliding_window=4)
    drop_padding(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_keeps_settings_from_its_attention_keeps_its_rows(monkeypatch):
    model = fresh("tiny_dense")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda *args, packing=None, forward=forward, **rest: forward(*args, **rest)
        )
    drop_padding(model)
    assert model.config._attn_implementation == "sdpa"


def test_no_padding_reaches_the_layers(model, batch):
    drop_padding(model)
    tokens = []
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[:-1]))
    completion_logprobs(model, batch, 1.0)
    beginnings = [row[:end] for row, length in each_row(batch) for end in range(1, length + 1)]
    real = len(set(beginnings))
    assert real < len(beginnings) < batch.input_ids.numel()
    assert tokens == [(1, (real // MULTIPLE + 1) * MULTIPLE)]


def each_row(batch):
    return zip(map(tuple, batch.input_ids.tolist()), batch.lengths.tolist(), strict=True)


@given(st.lists(st.tuples(st.integers(1, 2), st.lists(st.integers(0, 2), min_size=1, max_size=5)), min_size=1))
def test_rows_that_begin_alike_have_one_first_row_for_it(drawn):
    prompts = [[7] * length for length, _ in drawn]
    width = max(len(completion) for _, completion in drawn)
    mask = torch.tensor([[1.0] * len(completion) + [0.0] * (width - len(completion)) for _, completion in drawn])
    completions = torch.tensor([[*completion, *[0] * (width - len(completion))] for _, completion in drawn])
    # Padded with what is a token elsewhere.
    batch = join(prompts, completions, mask, torch.zeros_like(mask), torch.arange(len(drawn)), 0)
    first, owners = batch.first, {}
    for index, (row, length) in enumerate(each_row(batch)):
        for column in range(length):
            owner = int(first[index, column])
            assert owners.setdefault(row[: column + 1], owner) == owner
            assert tuple(batch.input_ids[owner, : column + 1].tolist()) == row[: column + 1]
            assert column < batch.lengths[owner] and first[owner, column] == owner
        assert (first[index, length:] == -1).all()


def test_rows_that_are_all_others_are_not_attended_to(monkeypatch):
    model = fresh("tiny_dense")
    drop_padding(model)
    shapes = []
    monkeypatch.setattr(
        "harness.policy.attention.causal_attention",
        lambda query, *rest: shapes.append(query.shape) or causal_attention(query, *rest),
    )
    completions, mask = torch.tensor([[8, 9, 10], [8, 9, 4], [8, 9, 10], [8, 6, 5]]), torch.ones(4, 3)
    mask[1, 2] = 0
    batch = join([[5, 6]] * 4, completions, mask, torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), 0)
    logprobs, _ = completion_logprobs(model, batch, 1.0)
    assert {shape[0] for shape in shapes} == {2}  # the first and the last
    torch.testing.assert_close(logprobs[0], logprobs[2])
    torch.testing.assert_close(logprobs[0, :1], logprobs[3, :1])
    assert logprobs[1, 2] == 0 != logprobs[0, 2]


def test_a_critic_made_from_it_does_without_padding_too(model, batch):
    critic = Critic(copy.deepcopy(model))
    torch.nn.init.ones_(critic.head.weight)
    padded = critic(batch)
    drop_padding(model)
    packed = Critic(model)
    torch.nn.init.ones_(packed.head.weight)
    torch.testing.assert_close(packed(batch), padded, rtol=1e-4, atol=1e-4)
    assert packed.network.config._attn_implementation == PADDING_FREE


def test_packing_and_back_by_hand():
    model = fresh("tiny_dense")
    drop_padding(model)
    # Two completions of the prompt 5 6 that begin with 8, and between them one of the prompt 7; the last is the first's
    # beginning.
    completions = torch.tensor([[8, 9, 10], [11, 12, 0], [8, 13, 14], [8, 9, 0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    batch = join([[5, 6], [7], [5, 6], [5, 6]], completions, mask, torch.zeros(4, 3), torch.tensor([0, 1, 0, 0]), 0)
    assert batch.input_ids.tolist() == [[5, 6, 8, 9], [7, 11, 0, 0], [5, 6, 8, 13], [5, 6, 8, 0]]
    packing = Packing(model.base_model, batch)
    ids, positions = (packing.inputs[name][0].tolist() for name in ("input_ids", "position_ids"))
    assert ids == [5, 6, 8, 9, 7, 11, 13, *[5] * (MULTIPLE - 7)]
    assert positions == [0, 1, 2, 3, 0, 1, 3, *[0] * (MULTIPLE - 7)]
    assert packing.completion.tolist() == [1, 2, 3, 4, 5, 1, 2, 6, 1, 2]
    tokens = torch.arange(1.0, MULTIPLE + 1)
    every = packing.of_positions(tokens)
    assert every.tolist() == [[1, 2, 3, 4], [5, 6, 8, 8], [1, 2, 3, 7], [1, 2, 3, 8]]
    assert torch.equal(packing.of_tokens(every)[:7], tokens[:7])
    rows = packing.in_rows(tokens)
    assert torch.equal(rows, every[:3])  # the last one is all the first's
    assert torch.equal(packing.in_one(rows)[:7], tokens[:7])


def test_gradients_of_packing_and_back_by_hand():
    model = fresh("tiny_dense")
    drop_padding(model)
    # One completion of the prompt 6, then three of the prompt 5, the last of which is cut short.
    completions, groups = torch.tensor([[8, 9], [10, 11], [12, 13], [14, 15]]), torch.tensor([7, 3, 3, 3])
    mask = torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 0]])
    batch = join([[6], [5], [5], [5]], completions, mask, torch.zeros(4, 2), groups, 0)
    packing = Packing(model.base_model, batch)
    assert packing.inputs["input_ids"][0, :6].tolist() == [6, 8, 5, 10, 12, 6]
    tokens = torch.zeros(MULTIPLE, 3, requires_grad=True)
    weights = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])  # of the last row all is the others'
    # What stands where no token is gets no gradient, though a gradient is handed in.
    (packing.in_rows(tokens) * weights.unsqueeze(-1)).sum().backward()
    assert tokens.grad[:, 1].tolist() == [1, 10, 2 + 3, 20, 30] + [0] * (MULTIPLE - 5)
    rows = torch.zeros(3, 2, requires_grad=True)
    handed = torch.zeros(MULTIPLE)
    handed[:5] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (packing.in_one(rows) * handed).sum().backward()
    assert rows.grad.tolist() == [[1, 2], [3, 4], [0, 5]]


@pytest.mark.parametrize("length", [1, 24])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_attention_shares_key_heads_as_if_they_were_repeated(heads, groups, length):
    generator = torch.Generator().manual_seed(0)

    def states(count, width):
        return torch.randn(3, count, length, width, dtype=torch.float64, generator=generator).requires_grad_()

    query, key, value = states(heads, 8), states(groups, 8), states(groups, 6)  # values narrower than keys
    expanded = [each.repeat_interleave(heads // groups, 1) for each in (key, value)]
    expected = F.scaled_dot_product_attention(query, *expanded, is_causal=True, scale=0.3)
    ours = causal_attention(query, key, value, 0.3)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad((ours * weight).sum(), (query, key, value))
    for own, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("length", [1, 3, 15, 16, 17])
def test_a_decoded_token_sees_what_its_mask_says(length, kind):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 4, 1, 8, generator=generator)
    key, value = (torch.randn(5, 2, length, 8, generator=generator) for _ in range(2))
    present = torch.rand(5, length, generator=generator) > 0.5
    present[:, -1] = True
    masks = {"none": None, "bool": present[:, None, None], "added": decoding_mask(present)}
    with torch.no_grad():
        ours, _ = padding_free_attention(torch.nn.Module(), query, key, value, masks[kind], 0.3)
    expected = F.scaled_dot_product_attention(
        query, key, value, None if kind == "none" else present[:, None, None], scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, expected.transpose(1, 2))


def test_a_latent_attention_whose_values_are_narrower(batch):
    model = build("deepseek_v3", **{**LATENT, "v_head_dim": 4})
    padded = passes(model, batch)
    drop_padding(model)
    assert model.config._attn_implementation == PADDING_FREE
    assert_same(passes(model, batch), padded)
