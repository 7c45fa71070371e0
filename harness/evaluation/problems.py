"""What the local lm-eval tasks (tasks/*.yaml) are made of: held-out problems and their score."""

from dataclasses import replace
from typing import Any

import datasets

from harness.evaluation.entries import entry
from harness.tasks import PromptStream
from harness.tasks.verifiers import marked_answer_reward

# Fixed, so that every run, algorithm and seed is evaluated on the same problems.
_SEED = 0


def held_out(
    task: str, parameters: dict[str, Any], evaluation_limit: int = 512, **_: Any
) -> dict[str, datasets.Dataset]:
    """The evaluation split of a task, as lm-eval's `custom_dataset` wants it.

    Args:
        task: name of an entry in conf/task, whose prompt and answer are used.
        parameters: of the data set, over the entry's own.
        evaluation_limit: how many; fewer are the first of them. 512 where lm-eval's own command runs the task.
        _: lm-eval passes the rest of the task's metadata along.
    """
    config = entry(task)
    config = replace(config, parameters={**config.parameters, **parameters})
    taken = PromptStream(config, _SEED, "evaluation").take(evaluation_limit)
    rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in taken]
    return {"test": datasets.Dataset.from_list(rows)}


def marked_answer(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """lm-eval's `process_results`: the reward of the completion."""
    return {"acc": marked_answer_reward(results[0], doc["answer"])}
