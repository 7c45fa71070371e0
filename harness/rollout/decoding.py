"""What decoding starts from, what it fills, and how a token is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from harness.policy.fusion import fused

_BLOCK = 512  # of the vocabulary


@dataclass
class Prompts:
    """P prompts that were read together, padded on the left to W tokens."""

    cache: Cache  # their keys and values
    present: Tensor  # [P, W] bool, where a token is
    lengths: Tensor  # [P] int
    logits: Tensor  # [P, V], of the first token that follows
    routes: Tensor | None  # [P, W + T - 1, layers, k] where asked for: experts of each token, and room for later ones


@dataclass
class Completions:
    """n completions of up to T tokens."""

    tokens: Tensor  # [n, T] int, padded
    logprobs: Tensor  # [n, T] float, 0 at padding
    mask: Tensor  # [n, T] float, 1 at sampled tokens

    @staticmethod
    def empty(count: int, length: int, pad: int, device: torch.device) -> "Completions":
        """None sampled yet."""
        logprobs = torch.zeros(count, length, device=device)
        return Completions(torch.full((count, length), pad, device=device), logprobs, torch.zeros_like(logprobs))

    def __getitem__(self, rows: slice) -> "Completions":
        """Views of some of them."""
        return Completions(*(getattr(self, field.name)[rows] for field in fields(self)))


def lives(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """Where a token is none of those that end a completion, of which there is one or more."""
    alive = tokens != ends[0]
    for token in ends[1:]:
        alive &= tokens != token
    return alive


def each_sees_one(present: Tensor) -> Tensor:
    """[P, 1, W, W] which tokens see which, causally, of prompts whose tokens ``present`` [P, W] marks.

    Padding sees itself: kernels differ in what they make of a token that sees none. As a whole mask, since transformers
    would wait for the device to say whether a mark for each token hides anything.
    """
    width, device = present.shape[1], present.device
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return (present[:, None, None] & causal) | torch.eye(width, dtype=torch.bool, device=device)


def sample(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens [n] by the inverse of the distribution function at ``noise`` [n], and their log-probabilities [n]."""
    if logits.is_cuda:
        return _sample_by_blocks(logits, noise, temperature)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = noise.unsqueeze(1) * cumulative[:, -1:]
    tokens = (cumulative <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def draw(logits: Tensor, rows: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As :func:`sample`, of n sequences of which each draws by one of the rows [n] of logits [R, V]."""
    return sample(logits[rows], noise, temperature)


def next_rows(row: Tensor, tokens: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """The m rows in which n sequences go on: one for all that were in the same row and have drawn the same token.

    Args:
        row: [n] of each sequence the row that it was in.
        tokens: [n] what it has drawn.
        vocabulary: how many tokens there are.

    Returns:
        [m] the row that each continues, in whose place as many are as can be, [m] the token that it goes on with, and
        [n] the row of each sequence.
    """
    drawn, index = (row * vocabulary + tokens).unique(return_inverse=True)
    source = drawn // vocabulary
    stays = source < len(source)
    stays[1:] &= source[1:] != source[:-1]
    free = torch.ones_like(stays).index_fill_(0, source[stays], False)
    place = source.clone()
    place[~stays] = free.nonzero().squeeze(1)
    order = place.argsort()
    return source[order], drawn[order] % vocabulary, place[index]


@fused(rows=2, tuned_for=67)
def _sample_by_blocks(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As above: first a block of the vocabulary, then a token in it. A GPU adds up few long rows slowly."""
    logits = logits.float() / temperature
    blocks = functional.pad(logits, (0, -logits.shape[1] % _BLOCK), value=-torch.inf).unflatten(1, (-1, _BLOCK))
    largest = blocks.amax((1, 2))
    cumulative = (blocks - largest[:, None, None]).double().exp().sum(2).cumsum(1)
    threshold = noise.unsqueeze(1) * cumulative[:, -1:]
    block = (cumulative <= threshold).sum(1, keepdim=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1) - largest.unsqueeze(1)
    place = ((inside.double().exp().cumsum(1) + before) <= threshold).sum(1, keepdim=True).clamp(max=_BLOCK - 1)
    tokens = (block * _BLOCK + place).clamp(max=logits.shape[1] - 1)
    chosen = logits.gather(1, tokens).squeeze(1) - largest
    return tokens.squeeze(1), chosen - cumulative[:, -1].log().float()
