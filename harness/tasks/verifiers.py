"""Verifiers: a completion and a reference answer -> a reward in [0, 1].

Completions are untrusted text. Plain answers are compared here, in time linear in the completion; libraries that parse
more than a number run bounded, in another process; what would evaluate an answer as code is refused.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal

from harness.config import TaskConfig
from harness.errors import ConfigError
from harness.tasks.bounded import BOUNDED
from harness.tasks.problem import Problem

# No exponents, NaN or infinity, ASCII digits, and no longer than a sane answer: the comparison stays exact and cheap.
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,64}(?:\.[0-9]{0,64})?|\.[0-9]{1,64})")
# GSM8K's own form: a number, perhaps followed by words but not by more of an expression.
_GSM8K = re.compile(r"([+-]?)\$?([+-]?[0-9.,]{1,64})%?(?!\S)")
_LONGEST_ANSWER = 10_000

# reasoning-gym data sets whose score_answer runs the model's answer through eval or SymPy's parser (which evaluates),
# or hands it to one that may ("composite").
EVALUATES_ANSWERS = frozenset(
    {
        "binary_matrix",
        "composite",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)


def gsm8k_reward(completion: str, answer: str) -> float:
    """1.0 if the number after the last `####` equals the reference.

    Args:
        completion: what the model wrote.
        answer: the number, or a whole reference solution that ends in `#### number`.
    """
    expected, found = _gsm8k_number(answer), None
    if "####" in completion:
        found = _gsm8k_number(completion)
    return float(expected is not None and expected == found)


def _gsm8k_number(text: str) -> Decimal | None:
    """The number after the last `####`, or at the beginning of a text without one."""
    match = _GSM8K.match(text.rpartition("####")[2][:_LONGEST_ANSWER].lstrip())
    return _number("".join(match.groups()).removesuffix(".")) if match else None


def marked_answer_reward(completion: str, answer: str) -> float:
    """1.0 if the text after the last `#` equals the reference, as a number if both are numbers."""
    _, mark, found = completion.rpartition("#")
    if not mark:
        return 0.0
    expected_number, found_number = _number(answer), _number(found)
    if expected_number is not None and found_number is not None:
        return float(expected_number == found_number)
    return float(bool(answer.strip()) and found.strip() == answer.strip())


def math_reward(completion: str, answer: str) -> float:
    """1.0 if math-verify finds in the completion's end an expression equal to the reference (LaTeX or plain)."""
    return BOUNDED.score("math", completion[-_LONGEST_ANSWER:], answer)


def reasoning_gym_reward(completion: str, problem: Problem) -> float:
    """What the problem's own data set gives to the answer in `<answer>` tags, or else after the last `#`."""
    answer = _tagged(completion)
    if answer is None or len(answer) > _LONGEST_ANSWER:
        return 0.0
    fields = problem.fields
    entry = {key: fields[key] for key in ("question", "answer", "metadata")}
    score = BOUNDED.score("reasoning_gym", fields["source_dataset"], fields["source_parameters"], answer, entry)
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


def _tagged(completion: str) -> str | None:
    before, tag, rest = completion.rpartition("<answer>")
    if tag and "</answer>" in rest:
        return rest.partition("</answer>")[0].strip()
    _, mark, found = completion.rpartition("#")
    return found.strip() if mark else None


def _number(text: str) -> Decimal | None:
    """The exact value of a plain decimal number, with `$` and commas allowed, or None."""
    if len(text) > _LONGEST_ANSWER:
        return None
    plain = text.strip().replace(",", "").replace("$", "")
    return Decimal(plain) if _NUMBER.fullmatch(plain) else None


VERIFIERS: dict[str, Callable[[str, Problem], float]] = {
    "gsm8k": lambda completion, problem: gsm8k_reward(completion, problem.answer),
    "marked_answer": lambda completion, problem: marked_answer_reward(completion, problem.answer),
    "math": lambda completion, problem: math_reward(completion, problem.answer),
    "reasoning_gym": reasoning_gym_reward,
}

# What a reference answer must be for a completion to be right, and whether one is; of other verifiers, any text.
_REFERENCES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "gsm8k": ("a number", lambda answer: _gsm8k_number(answer) is not None),
}


def check_answer(problem: Problem, task: TaskConfig, key: str) -> None:
    """Stop a problem to which no completion could be right, whose rewards would all be 0.

    Raises:
        ConfigError: where its answer is not what the verifier compares.
    """
    if task.verifier not in _REFERENCES:
        return
    what, fits = _REFERENCES[task.verifier]
    if not fits(problem.answer):
        raise ConfigError(
            f"{key}.verifier={task.verifier} compares with {what}, and the answer {problem.answer[-80:]!r} is none: "
            "mend it, leave the problem out, or choose another verifier, such as marked_answer"
        )


def check_verifier(task: TaskConfig, key: str) -> None:
    """Hold the verifier's name against the registry and the task's source.

    Raises:
        ConfigError: for an unknown verifier, or one that cannot judge this task safely.
    """
    if task.verifier not in VERIFIERS:
        raise ConfigError(f"{key}.verifier={task.verifier}: no such verifier; there are {', '.join(VERIFIERS)}")
    if task.verifier != "reasoning_gym":
        return
    if task.source != "reasoning_gym":
        raise ConfigError(f"{key}.verifier=reasoning_gym judges reasoning-gym problems; {key}.source={task.source}")
    if task.dataset in EVALUATES_ANSWERS:
        raise ConfigError(
            f"{key}.verifier=reasoning_gym: '{task.dataset}' evaluates answers as code, which model output must never "
            f"be; choose another verifier, such as marked_answer"
        )
