"""lm-eval's requests, answered by a policy whose next token depends on the last one alone."""

import pytest
import torch
from lm_eval.api.instance import Instance

from harness.evaluation.policy_lm import PolicyLM

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "until": [], "max_gen_toks": 12}
DIGITS = "0123456789"
SHORT = {"=": "#", "#": DIGITS, **{digit: ["<eos>"] for digit in DIGITS}}
LONG = {**SHORT, **{digit: ["+", "<eos>"] for digit in "01234"}, "+": ["+", "<eos>"]}  # some go on
PROMPTS = [f"{first} + {second} =" for first in range(2, 7) for second in range(1, 9)]


def answers(model, tokenizer, batch_size=8, prompts=PROMPTS, **settings):
    torch.manual_seed(0)
    requests = [
        Instance("generate_until", {}, (prompt, {**SAMPLED, **settings}), index) for index, prompt in enumerate(prompts)
    ]
    return PolicyLM(model, tokenizer, batch_size).generate_until(requests, disable_tqdm=True)


def test_two_policies_are_asked_under_the_same_random_numbers(markov_policy, tokenizer):
    """Where they agree they answer alike, however long the answers before took."""
    short, long = (answers(markov_policy(transitions), tokenizer) for transitions in (SHORT, LONG))
    assert {len(answer) for answer in short} == {2} and len({len(answer) for answer in long}) > 2
    assert [answer[:2] for answer in long] == short
    assert len(set(short)) > 5


def test_an_answer_is_decoded_from_what_was_sampled_alone(markov_policy, tokenizer):
    """Prompts of different length share a batch; padding and the end-of-sequence token are no text."""
    prompts = ["=", "1 + 2 + 3 + 4 =", "2 ="]
    assert answers(markov_policy({"=": "#", "#": "7", "7": ["<eos>"]}), tokenizer, prompts=prompts) == ["#7"] * 3


def test_answers_are_cut_at_their_length(markov_policy, tokenizer):
    endless = markov_policy({"=": "1", "1": "1"})
    assert answers(endless, tokenizer, prompts=["=", "3 ="], max_gen_toks=5) == ["11111"] * 2


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False, "temperature": 0.0}, {"top_k": 1}, {"top_p": 0.01}, {"temperature": 0.01}],
)
def test_other_ways_of_decoding_are_as_asked_for(markov_policy, tokenizer, settings):
    model = markov_policy({"=": "#", "#": DIGITS, **{digit: ["<eos>"] for digit in DIGITS}})
    with torch.no_grad():  # 4 is the likeliest by far less than what sampling would notice
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("4"), tokenizer.convert_tokens_to_ids("#")] += 0.1
    assert set(answers(model, tokenizer, **settings)) == {"#4"}
    assert len(set(answers(model, tokenizer))) > 5


@pytest.mark.parametrize("settings", [{}, {"do_sample": False, "temperature": 0.0}])
def test_an_answer_ends_where_the_models_generation_settings_end_it(markov_policy, tokenizer, settings):
    model = markov_policy({"=": "#", "#": "7", "7": "+", "+": "1", "1": "1"})
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("+")]
    assert answers(model, tokenizer, prompts=["="], **settings) == ["#7+"]


def test_other_ends_of_an_answer_are_as_asked_for(markov_policy, tokenizer):
    model = markov_policy({"=": "#", "#": "7", "7": "+", "+": "1", "1": "1"})
    assert answers(model, tokenizer, prompts=["="], until=["+"]) == ["#7"]
