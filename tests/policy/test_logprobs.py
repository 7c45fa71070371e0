"""Log-probabilities against a plain forward pass of each sequence alone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.policy import logprobs as module
from harness.policy.critic import Critic
from harness.policy.kernels import takes_vocabulary
from harness.policy.logprobs import completion_logprobs, token_logprobs
from tests.policy.test_packing import dense


def plain(model, batch, row, temperature):
    """Log-probabilities and entropies of one completion, from all logits of its sequence alone."""
    prompt, length = int(batch.prompt_lengths[row]), int(batch.completion_lengths[row])
    tokens = batch.completions[row, :length]
    ids = torch.cat([batch.input_ids[row, :prompt], tokens]).unsqueeze(0)
    scores = (model(input_ids=ids).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1)
    return scores.gather(1, tokens.unsqueeze(1)).squeeze(1), -(scores.exp() * scores).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_a_plain_forward_pass(model, batch, temperature):
    logprobs, entropy = completion_logprobs(model, batch, temperature)
    for row in range(len(batch.mask)):
        length = int(batch.completion_lengths[row])
        expected, expected_entropy = plain(model, batch, row, temperature)
        torch.testing.assert_close(logprobs[row, :length], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy[row, :length], expected_entropy, rtol=1e-4, atol=1e-5)
    assert (logprobs * (1 - batch.mask) == 0).all()


@torch.no_grad()
def test_selected_rows_give_the_same_numbers(model, batch):
    whole, _ = completion_logprobs(model, batch, 1.0)
    rows = torch.tensor([4, 1])
    part, _ = completion_logprobs(model, batch.select(rows), 1.0)
    torch.testing.assert_close(part, whole[rows, : part.shape[1]], rtol=1e-4, atol=1e-5)


TOKENS, VOCABULARY, HIDDEN = 13, 50, 8


@pytest.fixture(params=["held", "one block", "blocks of 17", "blocks of 1"])
def blocks(request, monkeypatch):
    """Logits that are held, or computed again in blocks of the vocabulary, the last of which may be smaller."""
    held = TOKENS * VOCABULARY if request.param == "held" else 0
    columns = {"one block": VOCABULARY, "blocks of 17": 17}.get(request.param, 1)
    set_blocks(monkeypatch, held, TOKENS * columns)


def set_blocks(monkeypatch, held, block):
    monkeypatch.setattr(module, "HELD_ELEMENTS", held)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", {"cpu": block})


def random_inputs(bias=False):
    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    torch.nn.init.normal_(head.weight)
    return torch.randn(TOKENS, HIDDEN, requires_grad=True), head, torch.randint(0, VOCABULARY, (TOKENS,))


def exact(states, head, tokens, temperature):
    """The definition in float64, as torch differentiates it."""
    logits = torch.nn.functional.linear(
        states.double(), head.weight.double(), None if head.bias is None else head.bias.double()
    )
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def loss(logprobs, entropy, entropy_gradient):
    """Each token with a weight of its own, of both signs."""
    weights = torch.linspace(-1, 2, TOKENS, dtype=logprobs.dtype)
    return (weights * logprobs).sum() + (weights.flip(0) * entropy).sum() * entropy_gradient


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_are_those_of_float64(blocks, entropy_gradient, bias):
    states, head, tokens = random_inputs(bias)
    results = token_logprobs(states, head, tokens, 0.7, entropy_gradient)
    expected = exact(states, head, tokens, 0.7)
    inputs = [states, *head.parameters()]
    gradients = torch.autograd.grad(loss(*results, entropy_gradient), inputs)
    expected_gradients = torch.autograd.grad(loss(*expected, entropy_gradient), inputs)
    for found, right in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_head_that_is_the_embedding_too_add_up(blocks):
    _, head, tokens = random_inputs()
    states = head.weight[tokens.flip(0)].tanh()
    (found,) = torch.autograd.grad(token_logprobs(states, head, tokens, 1.0)[0].sum(), [head.weight], retain_graph=True)
    (right,) = torch.autograd.grad(exact(states, head, tokens, 1.0)[0].sum(), [head.weight])
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_what_is_frozen_gets_no_gradient_and_changes_none(blocks):
    states, head, tokens = random_inputs(bias=True)
    inputs = [states, head.weight, head.bias]
    expected = torch.autograd.grad(token_logprobs(states, head, tokens, 1.0)[0].sum(), inputs)
    for frozen in inputs:
        for tensor in inputs:
            tensor.requires_grad_(tensor is not frozen)
            tensor.grad = None
        token_logprobs(states, head, tokens, 1.0)[0].sum().backward()
        for tensor, gradient in zip(inputs, expected, strict=True):
            if tensor is frozen:
                assert tensor.grad is None
            else:
                torch.testing.assert_close(tensor.grad, gradient)


def test_without_gradients_the_numbers_are_the_same(blocks):
    inputs = random_inputs()
    with torch.no_grad():
        found = token_logprobs(*inputs, 0.9)
    for one, other in zip(found, token_logprobs(*inputs, 0.9), strict=True):
        assert not one.requires_grad
        assert torch.equal(one, other)


def test_entropy_of_tokens_carries_a_gradient_only_when_asked(blocks):
    assert not token_logprobs(*random_inputs(), 1.0)[1].requires_grad
    assert token_logprobs(*random_inputs(), 1.0, entropy_gradient=True)[1].requires_grad


def test_large_logits_overflow_nowhere(blocks):
    head = torch.nn.Linear(1, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight[:, 0] = torch.arange(VOCABULARY)
    # Logits 0, 1000, ...: the last token is certain, and each one before it is 1000 nats less likely.
    logprobs, entropy = token_logprobs(torch.full((3, 1), 1000.0), head, torch.tensor([49, 48, 0]), 1.0, True)
    assert logprobs.tolist() == [0, -1000, -49000]
    assert entropy.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), [head.weight])
    assert gradient[[0, 1, 48, 49], 0].tolist() == [1000, 0, 1000, -2000]


def test_bfloat16_products_give_float32_numbers_and_gradients(monkeypatch, blocks):
    monkeypatch.setattr(module, "autocast", lambda device: torch.autocast(device.type, dtype=torch.bfloat16))
    states, head, tokens = random_inputs(bias=True)
    half = states.bfloat16()
    results = token_logprobs(half, head, tokens, 0.9, True)
    expected = exact(states, head, tokens, 0.9)
    inputs = [states, *head.parameters()]
    gradients = torch.autograd.grad(loss(*results, True), inputs)
    expected_gradients = torch.autograd.grad(loss(*expected, True), inputs)
    for found, right in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - right).norm() / right.norm() < 0.02  # bfloat16 keeps 8 bits


class Made(TorchDispatchMode):
    """Keeps all tensors that operations return, so that no two of them share memory by turns."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.tensors += [tensor for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        return made

    def bytes_beside(self, *others):
        """Size of each piece of memory but those of the given tensors, the largest first."""
        sizes = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, self.tensors)}
        return sorted((sizes[place] for place in sizes.keys() - {tensor.data_ptr() for tensor in others}), reverse=True)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_logits_of_all_tokens_never_exist_and_the_head_has_one_gradient(monkeypatch, entropy_gradient):
    block = 10 * TOKENS
    set_blocks(monkeypatch, 0, block)
    states, head, tokens = random_inputs()
    with Made() as made:
        results = token_logprobs(states, head, tokens, 1.0, entropy_gradient)
        torch.autograd.grad(loss(*results, entropy_gradient), [states, head.weight])
    largest, second, *_ = made.bytes_beside(states, head.weight)
    assert largest == 4 * VOCABULARY * HIDDEN
    assert second == 4 * block


def test_entropy_carries_a_gradient_only_when_asked(model, batch):
    assert not completion_logprobs(model, batch, 1.0)[1].requires_grad
    assert completion_logprobs(model, batch, 1.0, entropy_gradient=True)[1].requires_grad


def test_critic_is_as_large_as_the_policy_and_starts_at_zero(model, batch):
    critic = Critic(model)
    values = critic(batch)
    assert values.shape == batch.mask.shape
    assert (values == 0).all()
    size = sum(parameter.numel() for parameter in critic.parameters())
    hidden = model.config.hidden_size
    assert size - hidden - 1 == sum(parameter.numel() for parameter in model.parameters())


def test_a_critic_takes_states_of_another_width_than_its_layers(batch):
    """OPT-350m projects its last states back to the width of its embeddings."""
    model = dense("opt", ffn_dim=64, word_embed_proj_dim=16)
    assert (Critic(model)(batch) == 0).all()


def test_training_the_critic_leaves_the_policy_alone(model, batch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    critic = Critic(model)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.1)
    ((critic(batch) - 1) ** 2).mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 50), (65, 16), (130, 50), (0, 50)])
def test_a_small_vocabulary_by_kernels(one_core, rows, vocabulary, bias, entropy_gradient):
    torch.manual_seed(0)
    head = nn.Linear(16, vocabulary, bias=bias)
    states, tokens = torch.randn(rows, 16, requires_grad=True), torch.randint(vocabulary, (rows,))
    assert takes_vocabulary(states, head.weight)
    weights = torch.randn(2, rows)
    found = token_logprobs(states, head, tokens, 0.7, entropy_gradient)
    (found[0] * weights[0] + found[1] * weights[1]).sum().backward()
    exact, given = copy.deepcopy(head).double(), states.detach().double().requires_grad_()
    every = (exact(given) / 0.7).log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    chosen = every.gather(1, tokens.unsqueeze(1)).squeeze(1)
    exact.zero_grad()
    (chosen * weights[0] + (entropy if entropy_gradient else entropy.detach()) * weights[1]).sum().backward()
    torch.testing.assert_close(found[0].double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states.grad.double(), given.grad, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(head.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_small_vocabulary_at_low_temperatures_and_with_tokens_that_it_has_not(one_core):
    head, states = nn.Linear(16, 50), torch.randn(2, 16)
    logprobs, entropy = token_logprobs(states, head, torch.tensor([0, 49]), 1e-9)
    assert logprobs.isfinite().all() and torch.equal(entropy, torch.zeros(2))
    for token in (50, -1):
        with pytest.raises(IndexError, match="of a vocabulary of 50"):
            token_logprobs(states, head, torch.tensor([0, token]), 1.0)


def test_logits_that_are_computed_again_are_so_with_kernels_too(one_core, monkeypatch):
    head, states = nn.Linear(16, 50), torch.randn(4, 16, requires_grad=True)
    assert token_logprobs(states, head, torch.arange(4), 1.0)[0].grad_fn.name() == "ScoresBackward"
    monkeypatch.setattr(module, "HELD_ELEMENTS", 199)
    assert token_logprobs(states, head, torch.arange(4), 1.0)[0].grad_fn.name() == "_RecomputedBackward"
