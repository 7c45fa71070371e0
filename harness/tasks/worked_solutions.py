"""Worked solutions for the cold start, with errors in them, so that reinforcement learning has something to mend."""

import random
from collections.abc import Callable, Mapping
from typing import Any

_SLIPS = (-10, -2, -1, 1, 2, 10)


def chain_sum(fields: Mapping[str, Any], rng: random.Random, noise: float) -> str:
    """A sum worked from left to right and its marked answer: `3 - 7 + 8` gives `3-7=-4;-4+8=4#4`.

    Args:
        fields: of a reasoning-gym chain sum; `expression` holds numbers and the operators + and - between spaces.
        rng: where the errors come from.
        noise: probability that a step's result is wrong. The steps after it carry the error on to the answer.
    """
    first, *rest = fields["expression"].split()
    total, steps = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        if rng.random() < noise:
            result += rng.choice(_SLIPS)
        steps.append(f"{total}{operator}{term}={result}")
        total = result
    return ";".join(steps) + f"#{total}"


WORKED_SOLUTIONS: dict[str, Callable[[Mapping[str, Any], random.Random, float], str]] = {"chain_sum": chain_sum}
