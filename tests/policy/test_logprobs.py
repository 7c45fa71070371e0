"""Log-probabilities against a plain forward pass of each sequence alone."""

import pytest
import torch

from harness.policy import logprobs as module
from harness.policy.critic import Critic
from harness.policy.logprobs import completion_logprobs, token_logprobs


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


def test_chunks_change_neither_values_nor_gradients(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    states, tokens = torch.randn(13, 8, requires_grad=True), torch.randint(0, 50, (13,))
    results = []
    for elements in (50 * 100, 50 * 4):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        logprobs, entropy = token_logprobs(states, head, tokens, 0.9, entropy_gradient=True)
        gradients = torch.autograd.grad((logprobs * torch.arange(13)).sum() + entropy.sum(), [states, head.weight])
        results.append((logprobs, entropy, *gradients))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked)


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


def test_training_the_critic_leaves_the_policy_alone(model, batch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    critic = Critic(model)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.1)
    ((critic(batch) - 1) ** 2).mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
