"""One problem: its prompt, its reference answer, and which split its content belongs to."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from harness.config import TaskConfig
from harness.errors import ConfigError

# Each problem falls into one of 100 buckets by its prompt, and each split owns some of them. So no two splits ever
# share a problem, whatever their seeds and parameters: longer sums held out for evaluation, say, are never met when a
# run trains on longer sums. That takes one template for all splits, since the same problem in other words falls
# elsewhere: `harness.validation` refuses an evaluation that asks the problems of a run by another one.
BUCKETS = 100
SPLITS: dict[str, range] = {
    "evaluation": range(0, 10),
    "cold_start": range(10, 40),
    "train": range(40, BUCKETS),
}


@dataclass(frozen=True)
class Problem:
    """A prompt, the answer expected, and the fields of the source that both were filled from."""

    prompt: str
    answer: str
    fields: dict[str, Any]


class Given(Formatter):
    """Fills a template with what is given alone: a null or NaN would read as that word."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, name = super().get_field(field_name, args, kwargs)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            called = "null" if value is None else "NaN"
            raise ConfigError(f"the field '{field_name}' is {called}: give it a value, or leave the problem out")
        return value, name


def content_bucket(prompt: str) -> int:
    """The bucket of a prompt, in 0 to 99. White space does not count, since a tokenizer may drop it."""
    return int(hashlib.sha256("".join(prompt.split()).encode()).hexdigest(), 16) % BUCKETS


def derived_seed(*parts: Any) -> int:
    """64 bits that depend on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:8])


def make_problem(task: TaskConfig, fields: Mapping[str, Any], key: str, formatter: Formatter) -> Problem:
    """Fill the task's templates from a problem's fields.

    Args:
        task: has the templates.
        fields: of the problem.
        key: where the task stands in the run's configuration.
        formatter: what fills a template; it may refuse a value with a ConfigError.

    Raises:
        ConfigError: for a field that is not there, a malformed template, or a pattern that finds no answer.
    """
    answer = _fill(task.answer, fields, f"{key}.answer", formatter)
    if task.answer_pattern is not None:
        answer = _extract(task.answer_pattern, answer, f"{key}.answer_pattern")
    return Problem(_fill(task.prompt, fields, f"{key}.prompt", formatter), answer.strip(), dict(fields))


def check_text(problem: Problem, task: TaskConfig, key: str) -> None:
    """Stop a problem that asks or expects nothing, though its template does, or what no tokenizer can read.

    Raises:
        ConfigError: for a prompt or answer that is empty or cannot be encoded.
    """
    for name in ("prompt", "answer"):
        text, template = getattr(problem, name), getattr(task, name)
        if template and not text.strip():  # a verifier may need no answer
            raise ConfigError(f"{key}.{name} gives an empty {name}: give its fields a text, or leave the problem out")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{key}.{name} gives {ascii(text[error.start])}, half of a surrogate pair, which is no character: "
                "write the character whole"
            ) from error


def _fill(template: str, fields: Mapping[str, Any], key: str, formatter: Formatter) -> str:
    try:
        return formatter.vformat(template, (), fields)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{key}: there is no field {error}; the fields are {', '.join(fields)}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ConfigError(f"{key}={template!r} is not a template such as '{{question}}': {error}") from error


def _extract(pattern: str, answer: str, key: str) -> str:
    try:
        found = re.search(pattern, answer)
        if found is None or found.group(1) is None:
            raise ConfigError(f"{key}={pattern!r} finds nothing in the answer {answer[-80:]!r}")
        return found.group(1)
    except (re.error, IndexError) as error:
        raise ConfigError(f"{key}={pattern!r} must be a regular expression with one group: {error}") from error
