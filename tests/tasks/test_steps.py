import random

import pytest
from omegaconf import OmegaConf

from harness.config import TaskConfig
from harness.entries import conf_dir
from harness.tasks import STEP_VERIFIERS, Problem, PromptStream
from harness.tasks.worked_solutions import chain_sum

# Its results are -4 and 4.
PROBLEM = Problem("3 - 7 + 8 =", "4", {"expression": "3 - 7 + 8"})


def judged(completion: str, problem: Problem = PROBLEM) -> list[tuple[str, float]]:
    """The text of each rewarded step and its reward."""
    rewards, _ = STEP_VERIFIERS["chain_sum"](completion, problem)
    starts = [0, *(end for end, _ in rewards)]
    return [(completion[start:end], reward) for start, (end, reward) in zip(starts, rewards, strict=False)]


@pytest.mark.parametrize(
    ("completion", "steps"),
    [
        # right and wrong
        ("3-7=-4;-4+8=4#4", [("3-7=-4;", 1.0), ("-4+8=4#", 1.0)]),
        ("3-7=-4;-4+8=5#5", [("3-7=-4;", 1.0), ("-4+8=5#", 0.0)]),
        ("3-7=-5;-5+8=3#3", [("3-7=-5;", 0.0), ("-5+8=3#", 0.0)]),  # an error carried on is wrong again
        ("3-7=-5;-5+8=4#4", [("3-7=-5;", 0.0), ("-5+8=4#", 1.0)]),  # and mended it is right
        ("3-7=-4;-4+8=4#9", [("3-7=-4;", 1.0), ("-4+8=4#", 1.0)]),  # the answer is not judged here
        # spaces and signs of other tokenizers
        (" 3 - 7 = -4 ;\n-4 + 8 = +04 # 4", [(" 3 - 7 = -4 ;", 1.0), ("\n-4 + 8 = +04 #", 1.0)]),
        # fewer steps
        ("3-7=-4#-4", [("3-7=-4#", 1.0)]),
        ("#4", []),
        ("", []),
        # a step that nothing ends may not be whole
        ("3-7=-4", []),
        ("3-7=-4;-4+8=4", [("3-7=-4;", 1.0)]),
        # what is no step ends the judging
        ("3-7;-4+8=4#4", []),
        ("3-7=-4;-4+8==4#4", [("3-7=-4;", 1.0)]),
        ("3-7=-4;;-4+8=4#4", [("3-7=-4;", 1.0)]),
        ("so 3-7=-4;-4+8=4#4", []),
        ("3-7=-4.0;-4+8=4#4", []),
        ("3-7=٤;-4+8=4#4", []),
        ("3-7=" + "4" * 65 + ";", []),
        ("3-7=-4#-4+8=4;#4", [("3-7=-4#", 1.0)]),  # so does the answer
        # no more steps than the problem has
        ("3-7=-4;-4+8=4;4+0=4;4+0=4#4", [("3-7=-4;", 1.0), ("-4+8=4;", 1.0)]),
    ],
)
def test_steps_by_hand(completion, steps):
    assert judged(completion) == steps


def test_the_steps_expected_are_the_problems_whatever_was_written():
    for completion in ("", "3-7=-4;-4+8=4;4+0=4;4+0=4#4"):
        assert STEP_VERIFIERS["chain_sum"](completion, PROBLEM).expected == 2
    assert STEP_VERIFIERS["chain_sum"]("#5", Problem("5 =", "5", {"expression": "5"})) == ([], 0)


@pytest.mark.parametrize("allow_negation", [False, True])
def test_every_step_of_a_right_solution_is_right(allow_negation):
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "task" / "chain_sum.yaml"))
    task = TaskConfig(**{**values, "parameters": {**values["parameters"], "allow_negation": allow_negation}})
    for problem in PromptStream(task, 0, "train").take(100):
        solution = chain_sum(problem.fields, random.Random(0), 0.0)
        rewards, expected = STEP_VERIFIERS["chain_sum"](solution, problem)
        assert [reward for _, reward in rewards] == [1.0] * expected
        assert solution[: rewards[-1][0]] + problem.answer == solution


@pytest.mark.parametrize(
    "text",
    [
        "\x00\ud800;\U0001f600#",
        "3-7=" + "9" * 1_000_000,
        "3" + " " * 1_000_000 + "x",
        "3" + " " * 500_000 + "-" + " " * 500_000 + "x",
        "3-7=-4" + " " * 1_000_000,
        ";" * 1_000_000,
        "3-7=-4;" * 200_000,
        "-" * 1_000_000,
        "__import__('os').getpid();" * 1000,
    ],
)
def test_hostile_text_is_judged_in_linear_time_and_earns_no_more_than_the_problems_steps(text):
    # Quadratic time in a million characters would be hours.
    assert len(STEP_VERIFIERS["chain_sum"](text, PROBLEM).rewards) <= 2
