"""Dynamic sampling, overlong shaping and the source of the old log-probabilities, in real runs."""

import pytest
import torch

from harness.algorithms.advantages import last_tokens
from harness.config import compose
from harness.errors import ConfigError
from harness.reward import Rewards
from harness.rollout.batch import Batch, join
from harness.runs.directory import METRICS
from harness.trainer import Trainer
from tests.tiny_run import COMPLETIONS, TINY, lines, planned, run


@pytest.fixture(scope="module")
def results(tmp_path_factory, cold_starts):
    return tmp_path_factory.mktemp("results")


def made(prompts, lengths):
    """A batch of completions of the given lengths, two a prompt."""
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).float()
    completions = torch.arange(1, len(lengths) * width + 1).reshape(len(lengths), width)
    groups = torch.arange(len(prompts)).repeat_interleave(2)
    return join([prompt for prompt in prompts for _ in range(2)], completions, mask, -mask, groups, 0)


def test_batches_join_with_their_groups_apart():
    first, second = made([[7], [8, 9]], [1, 2, 3, 1]), made([[5, 5, 5]], [5, 4])
    both = Batch.concatenate([first, second])
    assert both.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert both.completion_lengths.tolist() == [1, 2, 3, 1, 5, 4]
    again = both.select(torch.tensor([4, 5]))
    assert torch.equal(again.input_ids, second.input_ids)
    assert torch.equal(again.completions, second.completions)
    assert torch.equal(both.select(torch.arange(4)).rollout_logprobs, first.rollout_logprobs)


def test_a_group_is_informative_where_outcomes_differ():
    outcome = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    rewards = Rewards(outcome.unsqueeze(1), torch.ones(6, 1).bool(), outcome, outcome, torch.full((6,), torch.nan))
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    assert rewards.informative(groups).tolist() == [False, False, True, True, False, False]


def test_a_group_is_informative_where_rewards_of_steps_differ():
    """Also where each completion has as many right ones as the others of its group."""
    tokens = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0, 1, 0], [0, 1, 0]])
    ends = torch.ones(6, 3).bool()
    ends[4:, 0] = ends[4:, 2] = False  # the outcome is all that was judged
    ends[4:, 1] = True
    outcome, steps = tokens[:, 2], torch.tensor([0.5, 0.5, 1.0, 1.0, torch.nan, torch.nan])
    rewards = Rewards(tokens, ends, outcome, outcome, steps)
    assert rewards.informative(torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == [True, True, False, False, False, False]


_PAIRS = ["algorithm.completions_per_prompt=2"]


class _Coin:
    """Rewards that make the groups of chosen rollout batches informative, and count what was sampled."""

    def __init__(self, trainer, informative_groups):
        self.trainer, self.schedule, self.sampled = trainer, list(informative_groups), []
        trainer.grader = self

    def grade(self, texts, problems, batch, generator):
        outcome = torch.zeros(len(texts))
        outcome[: 2 * self.schedule[len(self.sampled)] : 2] = 1.0
        self.sampled.append(batch)
        return Rewards(batch.mask * outcome.unsqueeze(1), last_tokens(batch.mask), outcome, outcome, outcome)


def _trainer(results, *overrides):
    directory = planned(results, *overrides)
    return Trainer(compose([*TINY, *overrides, f"results={results}"]), directory)


def test_dynamic_sampling_goes_on_until_all_groups_are_informative(results):
    trainer = _trainer(results, *_PAIRS, "+algorithm.dynamic_sampling.max_batches=5", "seed=1")
    coin = _Coin(trainer, [3, 2, 4, 8, 8])  # 3 + 2 + 4 of the 8 groups that are wanted
    batch, rewards = trainer._sample()
    assert len(coin.sampled) == 3
    assert len(batch.mask) == 3 * COMPLETIONS
    chosen, kept = trainer._chosen(batch, rewards)
    assert len(chosen.mask) == COMPLETIONS
    assert kept.informative(chosen.group_ids).all()
    expected = torch.cat(
        [sampled.completion_lengths[: 2 * n] for sampled, n in zip(coin.sampled, (3, 2, 3), strict=True)]
    )
    assert torch.equal(chosen.completion_lengths, expected)
    # All that was sampled is charged, and every prompt is a new one.
    assert trainer.meter.spent["tokens"] == sum(float(sampled.mask.sum()) for sampled in coin.sampled)
    assert trainer.meter.spent["queries"] == trainer.prompts.position == 3 * COMPLETIONS // 2
    assert not torch.equal(coin.sampled[0].completions, coin.sampled[1].completions)


def test_dynamic_sampling_gives_up_after_its_last_batch_and_fills_up(results):
    trainer = _trainer(results, *_PAIRS, "+algorithm.dynamic_sampling.max_batches=2", "seed=2")
    _Coin(trainer, [1, 2])
    chosen, kept = trainer._chosen(*trainer._sample())
    assert len(chosen.mask) == COMPLETIONS
    assert kept.informative(chosen.group_ids).sum() == 2 * 3


def test_without_dynamic_sampling_everything_sampled_is_learned_from(results):
    trainer = _trainer(results, *_PAIRS, "seed=3")
    coin = _Coin(trainer, [0])
    batch, rewards = trainer._sample()
    assert trainer._chosen(batch, rewards) == (batch, rewards)
    assert len(coin.sampled) == 1


def test_rollout_logprobs_may_be_the_old_ones_and_save_a_pass(results):
    usual = run(results, "seed=4")
    saved = run(results, "seed=4", "algorithm.old_logprobs=rollout")
    phases = saved.read_status()["budget"]["phases"]
    assert phases["old_logprobs"]["flops"] == 0 < usual.read_status()["budget"]["phases"]["old_logprobs"]["flops"]
    for row, other in zip(lines(saved, METRICS), lines(usual, METRICS), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert 0 <= row["mismatch/kl"] < 1e-6  # of the first minibatch, whose update has it for nothing


_CAPPED = ["algorithm.correction.name=truncate", "+algorithm.correction.level=token", "+algorithm.correction.cap=2.0"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.old_logprobs=engine"], "algorithm.old_logprobs=engine: choose trainer or rollout"),
        (["algorithm.old_logprobs=rollout", "algorithm.routing_replay=R2", "model=tiny_moe"], "use R3"),
        (
            ["algorithm.old_logprobs=rollout", *_CAPPED],
            "leaves out",
        ),
        (["+algorithm.dynamic_sampling.max_batches=1"], "at least 2"),
        (
            ["algorithm=ppo", "+algorithm.dynamic_sampling.max_batches=2"],
            "a group of one",
        ),
    ],
)
def test_combinations_that_cannot_run_say_why(overrides, said):
    with pytest.raises(ConfigError, match=said):
        compose([*TINY, *overrides])
