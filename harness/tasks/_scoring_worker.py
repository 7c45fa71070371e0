"""The other side of :mod:`harness.tasks.bounded`: a program that scores one answer after another.

Requests are pickled tuples on standard input, scores are lines on standard output. An answer that takes more than its
share of processor time ends the program, by a signal that also reaches arithmetic inside the interpreter.
"""

import contextlib
import functools
import json
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

# Of processor time, not of the clock: what an answer scores must not depend on how busy the machine is.
CPU_SECONDS = 2.0
MEMORY_BYTES = 4 * 2**30


def math_scorer() -> Callable[[str, str], float]:
    """Equality of mathematical expressions, in LaTeX or plain, by math-verify."""
    from math_verify import parse, verify

    def score(completion: str, answer: str) -> float:
        marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        # The timeouts of math-verify count wall time and work in the main thread only; the processor time is bounded
        # here. Of plain text it hands nothing but digits, operators and brackets to SymPy's parser.
        gold, found = parse(marked, parsing_timeout=None), parse(completion, parsing_timeout=None)
        return float(verify(gold, found, timeout_seconds=None))

    return score


def reasoning_gym_scorer() -> Callable[[str, Mapping[str, Any], str, dict[str, Any]], float]:
    """The score that a reasoning-gym data set itself gives to an answer."""
    import reasoning_gym

    @functools.cache
    def dataset(name: str, parameters: str) -> Any:
        return reasoning_gym.create_dataset(name, **json.loads(parameters), seed=0, size=1)

    def score(name: str, parameters: Mapping[str, Any], answer: str, entry: dict[str, Any]) -> float:
        return float(dataset(name, json.dumps(parameters)).score_answer(answer, entry))

    return score


SCORERS: dict[str, Callable[[], Callable[..., float]]] = {"math": math_scorer, "reasoning_gym": reasoning_gym_scorer}


def main() -> None:
    """Answer requests until standard input ends."""
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):  # a system without this limit has the time limit alone
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # a library that prints must not be taken for a reply
    scorer = functools.cache(lambda name: SCORERS[name]())
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = pickle.load(sys.stdin.buffer)
            score = scorer(name)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                value = score(*arguments)
            except Exception:  # whatever a parser does with text that is not an answer
                value = 0.0
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(f"{value!r}\n")


if __name__ == "__main__":
    main()
