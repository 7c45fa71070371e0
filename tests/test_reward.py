"""Rewards for steps on the tokens that earned them, and rewards with a reward model's errors."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from harness.cell import run_cell
from harness.config import RewardModelConfig, compose, load
from harness.errors import ConfigError, Declined
from harness.policy.tokenizer import build_tokenizer
from harness.reward import Grader, misjudged, tokens_at
from harness.rollout.batch import join
from harness.runs.directory import METRICS
from harness.tasks import STEP_VERIFIERS, VERIFIERS, Problem
from harness.tasks.steps import JudgedSteps
from harness.trainer import Trainer
from tests.tiny_run import COMPLETIONS, lines, numbers, planned, run

# Its results are -4 and 4.
PROBLEM = Problem("3 - 7 + 8 =", "4", {"expression": "3 - 7 + 8"})


@pytest.fixture(scope="module")
def results(tmp_path_factory, cold_starts):
    return tmp_path_factory.mktemp("results")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(completions, pad=0):
    """A rollout batch of these completions, all of one prompt."""
    width = max(map(len, completions))
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in completions])
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in completions])
    groups = torch.zeros(len(completions), dtype=torch.long)
    return join([[5, 6]] * len(completions), padded, mask, torch.zeros_like(mask), groups, pad)


def graded(tokenizer, completions, *overrides):
    """The rewards of completions, given as token ids, with PROBLEM."""
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    grader = Grader(compose(["algorithm=grpo", "task=chain_sum_steps", *overrides]), tokenizer)
    return grader.grade(texts, [PROBLEM] * len(texts), made(completions), generator())


def placed(row):
    """Positions and values of what is not 0."""
    return {index: value for index, value in enumerate(row.tolist()) if value}


# --- steps on tokens -------------------------------------------------------------------------------------------------


def test_each_step_is_rewarded_on_its_last_token_and_the_answer_on_the_last_of_all():
    tokenizer = build_tokenizer()
    eos = tokenizer.eos_token_id
    written = ["3-7=-4;-4+8=4#4", "3-7=-4;-4+8=3#3", "3-7=-5;-5+8=4#4", "3-7=-4#4", "#4", "-"]
    rewards = graded(tokenizer, [[*tokenizer(text)["input_ids"], eos] for text in written])
    assert [placed(row) for row in rewards.tokens] == [
        {6: 1.0, 13: 1.0, 15: 1.0}, {6: 1.0}, {13: 1.0, 15: 1.0}, {6: 1.0, 8: 1.0}, {2: 1.0}, {},
    ]  # fmt: skip
    assert [list(placed(row)) for row in rewards.ends] == [[6, 13, 15]] * 3 + [[6, 8], [2], [1]]
    assert rewards.outcome.tolist() == rewards.true.tolist() == [1, 0, 1, 1, 1, 0]
    assert rewards.steps.tolist() == [1, 0.5, 0.5, 0.5, 0, 0]  # of two steps, whether they were written or not


def test_a_step_that_ends_with_the_completion_and_its_outcome_are_one_step():
    tokenizer = build_tokenizer()
    completions = [tokenizer(text)["input_ids"] for text in ("3-7=-4;", "3-7=-4;-4+8=4#4")]
    rewards = graded(tokenizer, completions)  # neither has ended; the first is cut off behind its step
    assert [placed(row) for row in rewards.tokens] == [{6: 1.0}, {6: 1.0, 13: 1.0, 14: 1.0}]
    assert [list(placed(row)) for row in rewards.ends] == [[6], [6, 13, 14]]


def test_without_a_step_verifier_there_is_the_outcome_alone():
    tokenizer = build_tokenizer()
    rewards = graded(tokenizer, [tokenizer("3-7=-4;-4+8=4#4")["input_ids"]], "task=chain_sum")
    assert placed(rewards.tokens[0]) == placed(rewards.ends[0]) == {14: 1.0}
    assert rewards.steps.isnan().all()


@pytest.mark.parametrize("reward", [float("nan"), 2.0, -0.5, None, "1"])
def test_what_is_no_reward_from_0_to_1_is_refused_naming_the_verifier(monkeypatch, reward):
    tokenizer = build_tokenizer()
    completions = [tokenizer("3-7=-4;")["input_ids"]]
    monkeypatch.setitem(VERIFIERS, "own", lambda completion, problem: reward)
    monkeypatch.setitem(STEP_VERIFIERS, "own", lambda completion, problem: JudgedSteps([(7, reward)], 1))
    for key in ("verifier", "step_verifier"):
        with pytest.raises(ConfigError, match=rf"^task\.{key}=own gave {reward!r} .* a number from 0 to 1$"):
            graded(tokenizer, completions, f"task.{key}=own")


@pytest.mark.parametrize("reward", [True, 1, np.True_, np.float32(1.0)])
def test_a_verifier_may_give_any_kind_of_number(monkeypatch, reward):
    tokenizer = build_tokenizer()
    monkeypatch.setitem(VERIFIERS, "own", lambda completion, problem: reward)
    assert graded(tokenizer, [tokenizer("#4")["input_ids"]], "task.verifier=own").true.tolist() == [1.0]


def word_tokenizer(*words):
    """Each word is a token, from id 3 on, after padding, end and a mark that is special too."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<think>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "additional_special_tokens": ["<think>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_steps_are_found_in_tokens_of_several_characters_between_special_ones():
    tokenizer = word_tokenizer("3-7", "=-", "4;-4", "+8=", "4#", "4", "4#4", "3-7=-4;-4+8=4#4")
    rewards = graded(tokenizer, [
        [2, 3, 4, 2, 5, 6, 7, 2, 8, 1],  # <think> 3-7 =- <think> 4;-4 +8= 4# <think> 4 <eos>
        [3, 4, 5, 6, 9],  # the second step ends in the last token, which answers too
        [10, 1],  # both steps within one token
        [2, 10],  # everything within the last one
    ])  # fmt: skip
    assert [placed(row) for row in rewards.tokens] == [{4: 1, 6: 1, 9: 1}, {2: 1, 4: 2}, {0: 2, 1: 1}, {1: 3}]
    assert [list(placed(row)) for row in rewards.ends] == [[4, 6, 9], [2, 4], [0, 1], [1]]
    assert rewards.steps.tolist() == [1, 1, 1, 1]


def test_offsets_are_found_where_one_character_takes_several_tokens():
    vocabulary = {"<pad>": 0, "Ã": 1, "©": 2, "é;": 3, ";": 4, "Ċ": 5}  # bytes as byte-level tokenizers write them
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    tokens = [1, 2, 4, 1, 2, 5, 4]
    assert tokenizer.decode(tokens) == "é;é\n;"
    assert tokens_at([1, 2, 3, 4, 5], tokens, tokenizer) == [1, 2, 4, 5, 6]
    assert tokens_at([99], tokens, tokenizer) == [6]  # further than the text: the last token
    assert tokens_at([2], [1, 1, 4], tokenizer) == [2]  # bytes that are no character


def test_steps_enter_the_algorithms_reward_and_shaping_the_outcome_alone():
    tokenizer = build_tokenizer()
    overlong = ["algorithm.shaping.name=overlong", "+algorithm.shaping.buffer=30", "+algorithm.shaping.penalty=1.0"]
    completion = tokenizer("3-7=-4;-4+8=4#4")["input_ids"]  # 15 tokens, 5 within the buffer before 40
    rewards = graded(tokenizer, [completion], *overlong)
    assert placed(rewards.tokens[0]) == {6: 1.0, 13: 1.0, 14: pytest.approx(1 - 5 / 30)}
    assert rewards.outcome.tolist() == [1.0]


def test_chosen_completions_are_cut_to_the_longest_of_them():
    tokenizer = build_tokenizer()
    rewards = graded(tokenizer, [tokenizer(text)["input_ids"] for text in ("3-7=-4;-4+8=4#4", "3-7=-4#4", "#4")])
    kept = rewards.select(torch.tensor([2, 1]))
    assert kept.tokens.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]
    assert kept.ends.shape == (2, 8) and kept.steps.tolist() == [0, 0.5]


# --- runs with steps -------------------------------------------------------------------------------------------------


@pytest.fixture
def characters(monkeypatch):
    """A model that has hardly been started writes no sums: every character is a step, and digits are right."""

    def judge(text, problem):
        return JudgedSteps([(i + 1, float(character.isdigit())) for i, character in enumerate(text)], 12)

    monkeypatch.setitem(STEP_VERIFIERS, "characters", judge)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "gspo_token"])
def test_token_level_algorithms_train_on_steps(results, characters, algorithm):
    outcome = lines(run(results, f"algorithm={algorithm}"), METRICS)
    steps = lines(run(results, f"algorithm={algorithm}", "task.step_verifier=characters"), METRICS)
    # The first batch is the same; a twelfth of a completion's digits is its outcome and the mean of its steps.
    assert steps[0]["reward/mean"] == outcome[0]["reward/mean"]
    assert [row["reward/step_mean"] for row in steps] == pytest.approx([row["reward/mean"] for row in steps])
    assert steps[0]["reward/mean"] > 0
    assert steps[0]["grad_norm"] != outcome[0]["grad_norm"]
    assert not [key for row in outcome for key in row if key == "reward/step_mean"]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("gspo", r"algorithm\.ratio\.name=sequence has one importance ratio .*=sequence_token, or task\.step_verifier"),
        ("gmpo", r"algorithm\.surrogate\.name=geometric_mean has one loss .*'chain_sum_steps'"),
        ("rloo", r"algorithm\.advantage\.name=leave_one_out has one advantage .* use .*=group"),
        ("vespo", r"algorithm\.surrogate\.name=vespo has one weight .* use .*=clip"),
        ("topr", r"algorithm\.surrogate\.name=taper has one weight .* use .*=clip"),
    ],
)
def test_algorithms_that_take_a_sequence_as_one_decline_steps(algorithm, message):
    with pytest.raises(Declined, match=message):
        compose([f"algorithm={algorithm}", "task=chain_sum_steps"])
    compose([f"algorithm={algorithm}", "task=chain_sum"])


# --- a reward model's errors -----------------------------------------------------------------------------------------


def noise(rate):
    return RewardModelConfig(label_noise=rate, length_bias=0.0)


def test_labels_are_flipped_at_the_rate_and_in_both_directions():
    for true in (torch.zeros(20_000), torch.ones(20_000)):
        flipped = (misjudged(true, torch.ones(20_000), 1, noise(0.1), generator()) - true).abs()
        assert set(flipped.tolist()) == {0.0, 1.0}
        assert flipped.mean() == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 20_000) ** 0.5)


def test_flips_depend_on_the_generator_and_the_row_alone():
    lengths = torch.arange(1000)
    zeros, graded_reward = torch.zeros(1000), torch.linspace(0, 1, 1000)
    flips = misjudged(zeros, lengths, 1000, noise(0.3), generator()).bool()
    again = misjudged(graded_reward, lengths.flip(0), 7, noise(0.3), generator())
    assert torch.equal(again, torch.where(flips, 1 - graded_reward, graded_reward))
    assert not torch.equal(flips, misjudged(zeros, lengths, 1000, noise(0.3), generator(1)).bool())


def test_the_length_bias_by_hand():
    bias = RewardModelConfig(label_noise=0.0, length_bias=0.3)
    found = misjudged(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([10, 40, 0]), 40, bias, generator())
    assert found.tolist() == pytest.approx([0.075, 1.3, 1.0])


def test_without_errors_a_reward_keeps_its_every_bit():
    rewards = torch.rand(1000, generator=generator())
    assert torch.equal(misjudged(rewards, torch.arange(1000), 7, noise(0.0), generator()), rewards)


@pytest.fixture
def always_right(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "always_right", lambda completion, problem: 1.0)
    return "task.verifier=always_right"


def test_every_algorithm_meets_the_same_errors_and_the_true_reward_has_none(results, always_right):
    """Of completions that are all right the mean tells how many were flipped."""
    means = {}
    for name in ("ppo", "grpo", "gspo"):
        noisy = [always_right, "task.reward_model.label_noise=0.4", "budget.limits.updates=20"]
        rows = lines(run(results, f"algorithm={name}", *noisy), METRICS)
        means[name] = [row["reward/mean"] for row in rows]
        assert [row["reward/true_mean"] for row in rows] == [1.0] * 5
    assert means["ppo"] == means["grpo"] == means["gspo"]
    assert len(set(means["ppo"])) > 1 and {mean * COMPLETIONS % 1 for mean in means["ppo"]} == {0}


def test_batches_that_one_step_samples_do_not_share_their_errors(results, always_right):
    noisy = [always_right, "task.reward_model.label_noise=0.4", "sweep=attempts"]
    directory = planned(results, *noisy)
    trainer = Trainer(load(directory.path / "config.yaml"), directory)
    first, second, again = (trainer._sample_batch(attempt)[1].outcome for attempt in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_what_favours_length_does_so_by_the_tokens_that_were_written(results):
    (row, *_) = lines(run(results, "algorithm=grpo", "task.reward_model.length_bias=0.5"), METRICS)
    bias = 0.5 * row["completion/length_mean"] / 12
    assert row["reward/mean"] == pytest.approx(row["reward/true_mean"] + bias)


def test_a_run_with_errors_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(results, characters):
    overrides = ["algorithm=grpo", "task.reward_model.label_noise=0.3", "task.reward_model.length_bias=0.2"]
    overrides += ["budget.limits.updates=12"]
    whole = run(results, *overrides, "sweep=whole")
    directory = planned(results, *overrides, "sweep=stopped")
    trainer = Trainer(load(directory.path / "config.yaml"), directory)
    trainer.resume()
    trainer.step()
    assert len(lines(directory, METRICS)) == 1 and directory.state_path.exists()
    assert run_cell(directory) == "done"
    assert numbers(directory) == numbers(whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.reward_model.label_noise=0.5"], r"task\.reward_model\.label_noise=0\.5: .*below 0\.5.*0 is off"),
        (["task.reward_model.label_noise=-0.1"], r"task\.reward_model\.label_noise=-0\.1: .*at least 0"),
        (["task.reward_model.label_noise=nan"], r"task\.reward_model\.label_noise=nan"),
        (["task.reward_model.length_bias=inf"], r"task\.reward_model\.length_bias=inf: must be a finite number"),
        (
            ["task=chain_sum_steps", "task.reward_model.label_noise=0.1"],
            r"task\.step_verifier=chain_sum judges steps.*0",
        ),
        (["task=chain_sum_length_bias", "task.step_verifier=chain_sum"], r"set step_verifier to null, or label_noise"),
        (["task.reward_model.noise=0.1"], r"reward_model"),
    ],
)
def test_errors_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(["algorithm=grpo", *overrides])
