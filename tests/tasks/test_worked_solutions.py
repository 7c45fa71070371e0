import random
import re
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from harness.config import TaskConfig
from harness.entries import conf_dir
from harness.tasks import PromptStream
from harness.tasks.verifiers import marked_answer_reward
from harness.tasks.worked_solutions import chain_sum

STEP = re.compile(r"(-?\d+)([+-])(-?\d+)=(-?\d+)")


def problems(n: int, **parameters) -> list:
    task = TaskConfig(**OmegaConf.to_container(OmegaConf.load(conf_dir() / "task" / "chain_sum.yaml")))
    return PromptStream(replace(task, parameters={**task.parameters, **parameters}), 0, "cold_start").take(n)


def errors(solution: str) -> list[int]:
    """What each step is off by."""
    steps = [STEP.fullmatch(step).groups() for step in solution.partition("#")[0].split(";")]
    return [int(r) - (int(a) + int(b) if op == "+" else int(a) - int(b)) for a, op, b, r in steps]


def test_the_example_of_the_documentation():
    assert chain_sum({"expression": "3 - 7 + 8"}, random.Random(0), 0.0) == "3-7=-4;-4+8=4#4"
    assert chain_sum({"expression": "-3 + -5 - 2"}, random.Random(0), 0.0) == "-3+-5=-8;-8-2=-10#-10"
    assert chain_sum({"expression": "5"}, random.Random(0), 0.0) == "#5"


@pytest.mark.parametrize("allow_negation", [False, True])
def test_without_noise_every_step_and_answer_is_right(allow_negation):
    for problem in problems(100, allow_negation=allow_negation):
        solution = chain_sum(problem.fields, random.Random(0), 0.0)
        assert set(errors(solution)) == {0}
        assert solution.endswith(f"#{problem.answer}")
        assert marked_answer_reward(solution, problem.answer) == 1.0


def test_noise_is_the_rate_of_wrong_steps_and_their_errors_are_carried_on():
    rng = random.Random(0)
    off = []
    for problem in problems(1500, min_terms=5, max_terms=5):
        solution = chain_sum(problem.fields, rng, 0.1)
        slips = errors(solution)
        off += slips
        assert int(solution.rpartition("#")[2]) == int(problem.answer) + sum(slips)
    wrong = [slip for slip in off if slip]
    assert len(off) == 6000
    assert len(wrong) / len(off) == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 6000) ** 0.5)
    assert set(wrong) == {-10, -2, -1, 1, 2, 10}


def test_the_noise_is_the_generators_alone():
    fields = {"expression": "1 + 2 + 3 + 4 + 5 + 6"}
    assert chain_sum(fields, random.Random(1), 0.5) == chain_sum(fields, random.Random(1), 0.5)
    assert len({chain_sum(fields, random.Random(seed), 0.5) for seed in range(20)}) > 5
