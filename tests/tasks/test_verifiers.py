import inspect
import re
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness.config import TaskConfig
from harness.entries import conf_dir
from harness.tasks import VERIFIERS, Problem, PromptStream
from harness.tasks.verifiers import EVALUATES_ANSWERS, gsm8k_reward, marked_answer_reward, math_reward

HOSTILE = [
    "",
    "#",
    "####",
    "#### ",
    "# nan",
    "#### inf",
    "#### 1e999999999",
    "#### 9**9**9**9",
    "#### ٣٦",
    "#### " + "9" * 1_000_000,
    "#" * 1_000_000,
    "#### " + "," * 1_000_000,
    "#### " + "1." * 500_000,
    "\x00\ud800 #### \U0001f600",
    "#### __import__('os').getpid()",
    "<answer>" * 100_000,
    "<answer>" + "(" * 100_000 + "</answer>",
]


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("48/2=24\n#### 72", "72", 1.0),
        ("#### 72", "Natalia sold 72 clips.\n#### 72", 1.0),
        ("#### 71\nno, rather\n#### 72", "72", 1.0),
        ("#### 72\nno, rather\n#### 71", "72", 0.0),
        ("####72", "72", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 1234", "1,234", 1.0),
        ("#### $18.00", "18", 1.0),
        ("#### -$5", "-5", 1.0),
        ("#### $-5", "-5", 1.0),
        ("#### 72.", "72", 1.0),
        ("#### 25%", "25", 1.0),
        ("#### 72 clips", "72", 1.0),
        ("#### 72\nQuestion: next", "72", 1.0),
        ("#### 0.50", ".5", 1.0),
        ("#### 007", "7", 1.0),
        ("#### 72/2", "72", 0.0),
        ("#### 72e0", "72", 0.0),
        ("#### 7", "72", 0.0),
        ("#### 5", "-5", 0.0),
        ("#### --5", "-5", 0.0),
        ("The answer is 72", "72", 0.0),
        ("## 72", "72", 0.0),
        ("#### ", "72", 0.0),
        ("#### 72", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_gsm8k_reward_by_hand(completion, answer, reward):
    assert gsm8k_reward(completion, answer) == reward


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("3-7=-4;-4+8=4#4", "4", 1.0),
        ("3-7=-4;-4+8=4# 4 ", "4", 1.0),
        ("#5#4", "4", 1.0),
        ("#4#5", "4", 0.0),
        ("#4.0", "4", 1.0),
        ("#+04", "4", 1.0),
        ("#-0", "0", 1.0),
        ("#-4", "4", 0.0),
        ("#4;", "4", 0.0),
        ("4", "4", 0.0),
        ("#blue", "blue", 1.0),
        ("#Blue", "blue", 0.0),
        ("#nan", "nan", 1.0),
        ("#1e1", "10", 0.0),
        ("#", "", 0.0),
    ],
)
def test_marked_answer_reward_by_hand(completion, answer, reward):
    assert marked_answer_reward(completion, answer) == reward


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        ("The answer is 1/2.", r"\frac{1}{2}", 1.0),
        ("$x^2 + 1$", "1 + x^2", 1.0),
        ("The answer is 72", "72", 1.0),
        ("The answer is 71", "72", 0.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
        ("72", "", 0.0),
    ],
)
def test_math_reward_by_hand(completion, answer, reward):
    assert math_reward(completion, answer) == reward


def test_math_reward_survives_expressions_without_end_and_works_again_after_them():
    assert math_reward("9**9**9**9", "3") == 0.0
    assert math_reward(r"$10^{10^{10^{10}}}$", "3") == 0.0
    assert math_reward("$3$", "3") == 1.0


def test_math_reward_works_outside_of_the_main_thread():
    rewards = []
    threads = [threading.Thread(target=lambda: rewards.append(math_reward("$3$", "3"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [1.0, 1.0, 1.0]


def test_math_reward_runs_no_code(tmp_path):
    target = tmp_path / "written"
    for code in (f"open({str(target)!r}, 'w')", f"__import__('pathlib').Path({str(target)!r}).touch()"):
        for text in (code, f"${code}$", f"\\boxed{{{code}}}", f"1 + {code}"):
            math_reward(text, "1")
    assert not target.exists()


def reasoning_gym_problem(**changes) -> Problem:
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "task" / "chain_sum.yaml"))
    return PromptStream(replace(TaskConfig(**values), **changes), 0, "train").take(1)[0]


def test_the_reasoning_gym_verifier_is_the_data_sets_own():
    problem, verify = reasoning_gym_problem(), VERIFIERS["reasoning_gym"]
    assert verify(f"#{problem.answer}", problem) == 1.0
    assert verify(f"#{int(problem.answer):+,}.00", problem) == 1.0  # chain_sum accepts signs and decimals
    assert verify(f"#0 <answer> {problem.answer} </answer>", problem) == 1.0
    assert verify(f"{problem.answer}", problem) == 0.0
    assert verify(f"#{int(problem.answer) + 1000}", problem) < 0.5
    words = reasoning_gym_problem(dataset="spell_backward", parameters={}, prompt="{question}")
    assert verify(f"<answer>{words.answer}</answer>", words) == 1.0
    assert verify("<answer>zzz</answer>", words) < 1.0


@pytest.mark.parametrize("verifier", ["gsm8k", "marked_answer", "math", "reasoning_gym"])
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_text_earns_nothing_and_raises_nothing(verifier, number):
    assert VERIFIERS[verifier](HOSTILE[number], replace(reasoning_gym_problem(), answer="36")) == 0.0


@settings(deadline=None, max_examples=200)
@given(completion=st.text(), answer=st.text())
def test_plain_rewards_are_0_or_1_for_any_text(completion, answer):
    for reward in (gsm8k_reward, marked_answer_reward):
        assert reward("####" + completion, answer) in (0.0, 1.0)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_equals_itself_however_it_is_written(value):
    assert gsm8k_reward(f"#### {value:,}", str(value)) == 1.0
    assert marked_answer_reward(f"#{value:.6f}", str(value)) == 1.0
    assert marked_answer_reward(f"#{value + 1}", str(value)) == 0.0


def test_all_reasoning_gym_scorers_that_evaluate_are_known():
    """A new version of reasoning-gym must not bring one in unseen: read the method and add it, or name it harmless."""
    from reasoning_gym.factory import DATASETS

    evaluates = re.compile(r"\b(eval|exec|parse_expr|sympify|literal_eval)\(|sympy\.parse|sp\.parse")
    # number_sorting evaluates its own reference answer, and only where that is not JSON.
    harmless = {"number_sorting"}
    found = {
        name
        for name, (dataset, _) in DATASETS.items()
        if evaluates.search(inspect.getsource(dataset.score_answer)) or name == "composite"
    }
    assert found - harmless == EVALUATES_ANSWERS
    # Helpers outside of score_answer: these modules evaluate what they generated themselves, or have a parser of
    # their own by such a name (propositional_logic).
    read = {"codeio", "bitwise_arithmetic", "basic_arithmetic", "propositional_logic", "gsm_symbolic"}
    sources = {name: inspect.getsource(sys.modules[dataset.__module__]) for name, (dataset, _) in DATASETS.items()}
    assert {name for name, source in sources.items() if evaluates.search(source)} - found <= read
