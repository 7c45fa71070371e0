"""Downstream evaluation of the policy in memory with lm-eval.

Importing this module imports nothing heavy; the first evaluation does.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import EvaluationConfig
from harness.errors import ConfigError
from harness.evaluation.entries import LOCAL_TASKS, local_tasks

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_evaluation(model: "PreTrainedModel", config: EvaluationConfig) -> None:
    """Load the tasks and their data before training, so that one without a score stops the run before any compute.

    Raises:
        ConfigError: for a task whose data cannot be read, or none of whose metrics is the better the higher it is.
    """
    from harness.evaluation.isolation import undisturbed

    with undisturbed(model), _quiet():
        load_tasks(tuple(config.tasks), config.task_path, config.limit)


def evaluate(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: EvaluationConfig, seed: int
) -> list[dict[str, Any]]:
    """Score the policy on each configured task.

    The global random states, the model's modes and its weights are the same afterwards; the scores depend on the
    weights, the configuration and the seed alone.

    Args:
        model: a causal language model, on the device where it is to be evaluated.
        tokenizer: with pad and end-of-sequence tokens.
        config: tasks, number of problems, batch size.
        seed: of the sampling.

    Returns:
        One row a task, in order: ``task``, ``score`` (the task's first metric that is the better the higher it is),
        ``stderr`` (of that mean; NaN where lm-eval has none) and ``n`` problems.
    """
    from harness.evaluation.isolation import seed_everything, undisturbed

    with undisturbed(model):
        # Not simple_evaluate: it describes the machine in every result, which takes longer than a small evaluation.
        from lm_eval import evaluator

        from harness.evaluation.policy_lm import PolicyLM

        with _quiet():
            tasks = load_tasks(tuple(config.tasks), config.task_path, config.limit)
            seed_everything(seed)
            policy = PolicyLM(model, tokenizer, config.batch_size)
            results = evaluator.evaluate(policy, tasks, limit=config.limit, log_samples=False)
    assert results is not None
    return [
        _row(task, results["results"][task], results["higher_is_better"][task], results["n-samples"][task]["effective"])
        for task in results["n-samples"]
    ]


def check_evaluation(config: EvaluationConfig) -> None:
    """Stop an evaluation that cannot run, before any compute.

    Raises:
        ConfigError: for a task that lm-eval does not know, a folder that is not there, or a file in it that cannot be
            read or has the name of another.
    """
    if config.task_path is not None and not Path(config.task_path).is_dir():
        raise ConfigError(f"evaluation.task_path={config.task_path}: no such folder; give one of lm-eval task YAMLs")
    if set(config.tasks) <= local_tasks(config).keys():
        return  # known without importing lm-eval, which takes seconds
    local = _task_manager(config.task_path, False, config.limit).all_tasks
    unknown = [task for task in config.tasks if task not in local]
    if unknown:
        bundled = _task_manager(config.task_path, True, config.limit).all_tasks
        unknown = [task for task in unknown if task not in bundled]
    if unknown:
        raise ConfigError(
            f"evaluation.tasks has {unknown[0]}: neither lm-eval nor the harness has such a task; "
            f"the harness's own are {', '.join(local)}"
        )


def _row(task: str, metrics: dict[str, Any], higher_is_better: dict[str, bool], n: int) -> dict[str, Any]:
    # Keys are "metric,filter" and "metric_stderr,filter", in the order of the task's metric_list. A report ranks by the
    # score, so that a perplexity, which some tasks have first, must not be taken for one.
    key = next(key for key in metrics if "," in key and higher_is_better.get(key.partition(",")[0]))
    metric, _, kind = key.partition(",")
    stderr = metrics.get(f"{metric}_stderr,{kind}", math.nan)
    # lm-eval says "N/A" where there is no standard error.
    stderr = math.nan if isinstance(stderr, str) else float(stderr)
    return {"task": task, "score": float(metrics[key]), "stderr": stderr, "n": int(n)}


@lru_cache(maxsize=4)
def load_tasks(names: tuple[str, ...], task_path: str | None, limit: int) -> Any:
    """lm-eval's task objects, made once: their problems stay the same through a run. Tasks that generate them make
    ``limit``. Raises as :func:`prepare_evaluation`."""
    local = _task_manager(task_path, False, limit)
    manager = local if set(names) <= set(local.all_tasks) else _task_manager(task_path, True, limit)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of whatever library reads a task's data
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"evaluation.tasks={list(names)} cannot be loaded; are their data within reach? ({reason})"
        ) from error
    for name, task in loaded["tasks"].items():
        if not any(task.higher_is_better().values()):
            metrics = ", ".join(task.higher_is_better())
            raise ConfigError(
                f"evaluation.tasks has {name}: no metric of it ({metrics}) is the better the higher it is, as a score "
                "must be; name another task, or give it such a metric, with higher_is_better: true"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


@lru_cache(maxsize=4)
def _task_manager(task_path: str | None, include_bundled: bool, limit: int) -> "TaskManager":
    """lm-eval's index of tasks. Its bundled thousands take over ten seconds, so only where one of them is asked for."""
    from lm_eval.tasks import TaskManager

    paths = [LOCAL_TASKS, *([Path(task_path)] if task_path else [])]
    return TaskManager(include_path=list(paths), include_defaults=include_bundled, metadata={"evaluation_limit": limit})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's progress bars and notes out of the run's log."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
