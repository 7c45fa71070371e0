"""What else enters the numbers: log-probabilities, entropy, divergence, the critic, shaping; and a whole update."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.algorithms.divergence import kl_divergence
from harness.algorithms.metrics import Metrics
from harness.algorithms.shaping import overlong
from harness.algorithms.value import explained_variance, value_loss
from harness.config import compose
from harness.policy.loading import build_model
from harness.policy.logprobs import token_logprobs
from harness.policy.tokenizer import build_tokenizer
from harness.rollout.batch import join
from harness.update import PolicyUpdater, Targets
from tests.parity.comparison import GRPO_CLIP, GSPO_CLIP, VANILLA, VERL_GSPO, harness_loss
from tests.parity.inputs import Inputs, batches, rollouts
from tests.parity.peers import trl, trl_loss, verl, verl_explained_variance, verl_loss, verl_overlong


def test_logprobs_and_entropy_at_a_temperature():
    generator = torch.Generator().manual_seed(0)
    states, tokens = torch.randn(50, 16, generator=generator), torch.randint(30, (50,), generator=generator)
    head = nn.Linear(16, 30, bias=False)
    logprobs, entropy = token_logprobs(states, head, tokens, temperature=0.7)
    logits = head(states) / 0.7
    trl(), verl()
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    from verl.utils import torch_functional

    for theirs in (selective_log_softmax(logits, tokens), torch_functional.logprobs_from_logits_naive(logits, tokens)):
        torch.testing.assert_close(logprobs, theirs, rtol=1e-5, atol=1e-6)
    for theirs in (entropy_from_logits(logits), torch_functional.entropy_from_logits(logits)):
        torch.testing.assert_close(entropy, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence(estimator):
    core = verl()
    for inputs in batches():
        ours, theirs = (
            (function(inputs.logprobs, inputs.ref_logprobs, estimator) * inputs.mask).sum()
            for function in (kl_divergence, core.kl_penalty)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)


def test_value_loss_and_its_clip_fraction():
    core = verl()
    for batch in rollouts(dense=True):
        generator = torch.Generator().manual_seed(len(batch.mask))
        values = (batch.values + 0.5 * torch.randn(batch.values.shape, generator=generator)).requires_grad_()
        returns = batch.values + torch.randn(batch.values.shape, generator=generator)
        total, clipped = value_loss(values, batch.values, returns, batch.mask, 0.2)
        theirs, fraction = core.compute_value_loss(values, returns, batch.values, batch.mask, 0.2)
        torch.testing.assert_close(total / batch.mask.sum(), theirs)
        assert clipped / batch.mask.sum() == pytest.approx(fraction.item(), rel=1e-5)
        (ours,) = torch.autograd.grad(total / batch.mask.sum(), values)
        torch.testing.assert_close(ours, torch.autograd.grad(theirs, values)[0])


METRICS = {
    "trl-token": ("grpo", trl_loss(loss_type="grpo", **GRPO_CLIP), {"clip_ratio/region_mean": "clip_fraction/token"}),
    "trl-sides": (
        "grpo",
        trl_loss(loss_type="grpo", **GRPO_CLIP),
        {"clip_ratio/low_mean": "clip_fraction/low", "clip_ratio/high_mean": "clip_fraction/high"},
    ),
    "trl-sequence": (
        "gspo",
        trl_loss(loss_type="grpo", importance_sampling_level="sequence", **GSPO_CLIP),
        {"clip_ratio/region_mean": "clip_fraction/sequence"},
    ),
    "trl-geometric_mean": ("gmpo", trl_loss("GMPO", epsilon=0.4), {"clip_ratio/region_mean": "clip_fraction/token"}),
    "trl-divergence": (
        "grpo_kl",
        trl_loss(loss_type="grpo", beta=0.04, use_bias_correction_kl=False, **GRPO_CLIP),
        {"kl": "kl/reference"},
    ),
    "verl-token": ("grpo", verl_loss("vanilla", **VANILLA), {"actor/pg_clipfrac": "clip_fraction/token"}),
    "verl-sequence": ("gspo", verl_loss("gspo", **VERL_GSPO), {"actor/pg_clipfrac": "clip_fraction/token"}),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name):
    entry, peer, names = METRICS[name]
    for inputs in batches(9.0, per_token=False):
        ours, theirs = harness_loss(entry)(inputs)[1], peer(inputs)[1]
        for their_name, our_name in names.items():
            assert ours[our_name] == pytest.approx(theirs[their_name], rel=1e-5)


def test_explained_variance():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        values, returns = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64) * 30
        mask = (torch.rand(6, 9, generator=generator) < 0.7).double()
        theirs = verl_explained_variance(values, returns, mask)
        assert explained_variance(values, returns, mask).item() == pytest.approx(theirs, rel=1e-5)


def test_overlong_shaping():
    lengths = torch.tensor([1, 11, 12, 13, 15, 16])
    ours = overlong(torch.ones(6), lengths, 16, buffer=4, penalty=0.8)
    torch.testing.assert_close(ours, verl_overlong(lengths, 16, 4, 0.8))


@pytest.fixture(scope="module")
def update():
    """A batch of a tiny model, its update's constants, and the gradient that the harness takes in micro-batches."""
    overrides = ["algorithm=grpo", "algorithm.entropy_coefficient=0.3", "algorithm.aggregation.name=token_mean"]
    config = compose([*overrides, "model=tiny_dense", "model.micro_batch_sequences=2"])
    network = build_model(config.model.architecture, build_tokenizer(), seed=0)
    with torch.no_grad():
        for parameter in network.parameters():  # fresh weights predict nearly the same everywhere
            parameter.mul_(1 if parameter.ndim == 1 else 4)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1], [7], [6]])).float()
    completions = torch.randint(3, 20, (5, 9), generator=generator)
    batch = join([[5, 6, 7]] * 5, completions, mask, torch.zeros(5, 9), torch.arange(5), 0)
    advantages = torch.randn(5, 1, generator=generator) * mask
    positions = batch.positions()

    def logits():
        return network(input_ids=batch.input_ids).logits[positions] / config.rollout.temperature

    with torch.no_grad():
        logprobs = logits().log_softmax(-1).gather(1, completions[mask.bool()].unsqueeze(1)).squeeze(1)
    old = torch.zeros_like(mask).masked_scatter(mask.bool(), logprobs) + 0.3 * torch.randn(5, 9, generator=generator)
    PolicyUpdater(network, config, nullcontext).backward(
        batch, Targets(old * mask, advantages), torch.arange(5), Metrics()
    )
    return SimpleNamespace(network=network, logits=logits, batch=batch, old=old * mask, advantages=advantages)


def peer_gradient(update, loss_of, logprobs_of, entropy_of):
    """The same network's gradient by a peer's functions."""
    ours = [parameter.grad for parameter in update.network.parameters()]
    mask = update.batch.mask
    logits = update.logits()
    valid, zeros = mask.bool(), torch.zeros_like(mask)
    logprobs = zeros.masked_scatter(valid, logprobs_of(logits, update.batch.completions[valid]))
    entropies = zeros.masked_scatter(valid, entropy_of(logits))
    loss = loss_of(Inputs(logprobs, update.old, update.advantages, mask, update.old, update.old), entropies)
    theirs = torch.autograd.grad(loss, list(update.network.parameters()))
    return ours, theirs


def assert_same_gradient(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_an_update_with_an_entropy_bonus_is_that_of_trl(update):
    trl()
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def loss(inputs, entropies):
        options = {"loss_type": "bnpo", "epsilon": 0.2, "epsilon_high": 0.27, "entropy_coef": 0.3}
        return trl_loss(entropies=entropies, **options)(inputs)[0]

    assert_same_gradient(*peer_gradient(update, loss, selective_log_softmax, entropy_from_logits))


def test_an_update_with_an_entropy_bonus_is_that_of_verl(update):
    core = verl()
    from verl.utils import torch_functional

    def loss(inputs, entropies):
        value = verl_loss("vanilla", "token-mean", clip_ratio_low=0.2, clip_ratio_high=0.27, clip_ratio_c=1e9)(inputs)[
            0
        ]
        return value - 0.3 * core.agg_loss(entropies, inputs.mask.bool(), "token-mean")

    functions = torch_functional.logprobs_from_logits_naive, torch_functional.entropy_from_logits
    assert_same_gradient(*peer_gradient(update, loss, *functions))
