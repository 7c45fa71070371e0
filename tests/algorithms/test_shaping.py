"""Shaping against values worked out by hand."""

import pytest
import torch

from harness.algorithms.shaping import none, overlong


def test_no_shaping_keeps_the_reward():
    rewards = torch.tensor([1.0, 0.0])
    assert torch.equal(none(rewards, torch.tensor([3, 40]), 40), rewards)


def test_the_overlong_penalty_grows_over_the_buffer():
    # Cut at 40 with a buffer of 8: nothing up to 32 tokens, a half at 36, all at the cut.
    lengths = torch.tensor([10, 32, 33, 36, 40])
    shaped = overlong(torch.ones(5), lengths, 40, buffer=8, penalty=2.0)
    assert shaped.tolist() == pytest.approx([1.0, 1.0, 0.75, 0.0, -1.0])
