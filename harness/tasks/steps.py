"""Step verifiers: a worked answer and its problem -> a reward in [0, 1] for each of its intermediate steps.

The final answer is not among them: it is the last step, and the task's ordinary verifier judges it. Completions are
untrusted text, read once from left to right.
"""

import re
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from harness.tasks.problem import Problem


class JudgedSteps(NamedTuple):
    """What the steps of one completion earned."""

    rewards: list[tuple[int, float]]  # (offset behind the step in the completion, reward), from left to right
    expected: int  # steps that a worked answer to the problem has; no more than these are rewarded


_NUMBER = "[+-]?[0-9]{1,64}"
# A step ends with the sign behind it: only that says that its result has no further digit.
_SUM_STEP = re.compile(rf"\s*{_NUMBER}\s*[+-]\s*{_NUMBER}\s*=\s*({_NUMBER})\s*([;#])")


def chain_sum(completion: str, problem: Problem) -> JudgedSteps:
    """Results of a sum worked from left to right: of `3-7=-4;-4+8=3#3` the first is right and the second is wrong.

    A result is right if it is what the problem's expression has come to by then, so that an error carried on is wrong
    again. Judging ends at the mark of the final answer and at whatever is no step.

    Args:
        completion: what the model wrote.
        problem: of a reasoning-gym chain sum; its field `expression` holds numbers and the operators + and - between
            spaces.
    """
    first, *rest = problem.fields["expression"].split()
    sign = {"+": 1, "-": -1}
    terms = [sign[operator] * int(term) for operator, term in zip(rest[::2], rest[1::2], strict=True)]
    _, *totals = accumulate([int(first), *terms])
    rewards: list[tuple[int, float]] = []
    position = 0
    for total in totals:
        step = _SUM_STEP.match(completion, position)
        if step is None:
            break
        position = step.end()
        rewards.append((position, float(int(step[1]) == total)))
        if step[2] == "#":
            break
    return JudgedSteps(rewards, len(totals))


STEP_VERIFIERS: dict[str, Callable[[str, Problem], JudgedSteps]] = {"chain_sum": chain_sum}
