import random
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from harness.config import TaskConfig
from harness.entries import conf_dir
from harness.evaluation.downstream import load_tasks
from harness.evaluation.problems import marked_answer
from harness.tasks import PromptStream
from harness.tasks.worked_solutions import chain_sum

NAMES = ("chain_sum_held_out", "chain_sum_longer", "chain_sum_signed")


@pytest.fixture(scope="module")
def tasks() -> dict:
    return load_tasks(NAMES, None, 512)["tasks"]


@pytest.fixture
def training() -> TaskConfig:
    return TaskConfig(**OmegaConf.to_container(OmegaConf.load(conf_dir() / "task" / "chain_sum.yaml")))


@pytest.mark.parametrize("name", NAMES)
def test_no_evaluation_problem_is_met_in_training_or_cold_start(name, tasks, training):
    held_out = {doc["prompt"] for doc in tasks[name].test_docs()}
    everything = {"min_terms": 3, "max_terms": 8, "allow_negation": name == "chain_sum_signed"}
    for task in (training, replace(training, parameters={**training.parameters, **everything})):
        for split in ("train", "cold_start"):
            met = {problem.prompt for seed in range(2) for problem in PromptStream(task, seed, split).take(2000)}
            assert not met & held_out


@pytest.mark.parametrize("name, terms", list(zip(NAMES, [{3, 4}, {5, 6}, {3, 4}], strict=True)))
def test_each_task_has_as_many_problems_of_its_kind_as_are_asked_for(name, terms, tasks):
    docs = list(tasks[name].test_docs())
    assert len(docs) == 512
    assert {len(doc["prompt"].split()) // 2 for doc in docs} == terms
    negative = any(term.startswith("-") and len(term) > 1 for doc in docs for term in doc["prompt"].split())
    assert negative == (name == "chain_sum_signed")


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_training_prompt_and_a_right_solution_fits_and_scores(name, tasks, tokenizer):
    task = tasks[name]
    for doc in task.test_docs():
        expression = doc["prompt"].removesuffix(" =")
        assert task.fewshot_context(doc, num_fewshot=0) == f"{expression} ="
        solution = chain_sum({"expression": expression}, random.Random(0), 0.0)
        assert len(tokenizer(solution).input_ids) + 1 <= task.config.generation_kwargs["max_gen_toks"]
        assert marked_answer(doc, [solution]) == {"acc": 1.0}
        assert marked_answer(doc, [solution + "0"]) == {"acc": float(doc["answer"] == "0")}


def test_fewer_problems_are_the_first_of_more(tasks):
    few = load_tasks(NAMES, None, 20)["tasks"]
    for name in NAMES:
        assert list(few[name].test_docs()) == list(tasks[name].test_docs())[:20]


def test_the_problems_are_the_same_in_every_process(tasks):
    assert tasks["chain_sum_held_out"].test_docs()[0]["prompt"] == "8 + 7 + 7 ="
