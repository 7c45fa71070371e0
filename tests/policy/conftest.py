import pytest
import torch

from harness.config import compose
from harness.policy.loading import build_model
from harness.policy.tokenizer import build_tokenizer
from harness.rollout.batch import join


@pytest.fixture(params=["tiny_dense", "tiny_moe"])
def model(request):
    """Each tiny model with fresh weights."""
    return fresh(request.param)


@pytest.fixture
def moe():
    return fresh("tiny_moe")


def fresh(name):
    architecture = compose([f"model={name}"]).model.architecture
    network = build_model(architecture, build_tokenizer(), seed=0).eval()
    # Fresh weights give nearly equal logits everywhere; larger ones make mistakes visible.
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return network


@pytest.fixture
def batch():
    return make_batch()


def make_batch(rows=6, width=9, seed=0, equal=False, group_size=1, alike=0):
    """Random prompts and completions of different lengths, or all of one length; rows of a group apart.

    The first ``alike`` tokens of all prompts and of all completions are the same.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((rows,), width) if equal else torch.randint(1, width + 1, (rows,), generator=generator)
    prompts = [
        torch.randint(3, 20, (7 if equal else int(torch.randint(2, 8, (), generator=generator)),), generator=generator)
        for _ in range(rows // group_size)
    ]
    mask = (torch.arange(width) < lengths.unsqueeze(1)).float()
    completions = torch.randint(3, 20, (rows, width), generator=generator)
    for tokens in (*prompts, *completions):
        tokens[:alike] = torch.arange(3, 3 + alike)[: len(tokens)]
    groups = torch.arange(rows) % len(prompts)
    asked = [prompts[group].tolist() for group in groups]
    return join(asked, completions, mask, torch.zeros(rows, width), groups, 0)
