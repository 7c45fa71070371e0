from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from harness.config import TaskConfig
from harness.entries import conf_dir
from harness.errors import ConfigError
from harness.tasks import PromptStream
from harness.tasks.problem import SPLITS, content_bucket


def task_config(name: str, **changes) -> TaskConfig:
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "task" / f"{name}.yaml"))
    return replace(TaskConfig(**values), **changes)


@pytest.fixture
def chain_sum() -> TaskConfig:
    return task_config("chain_sum")


@pytest.fixture
def rows(tmp_path) -> TaskConfig:
    path = tmp_path / "rows.jsonl"
    lines = [f'{{"question": "What is {i} + 1?", "answer": "It is #### {i + 1}"}}' for i in range(300)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return task_config("gsm8k", path=str(path))


@pytest.mark.parametrize("kind", ["chain_sum", "rows"])
def test_the_stream_depends_only_on_task_seed_and_position(kind, request):
    task = request.getfixturevalue(kind)
    first = PromptStream(task, 3, "train").take(40)
    in_pieces = PromptStream(task, 3, "train")
    assert in_pieces.take(7) + in_pieces.take(33) == first
    assert in_pieces.position == 40
    renamed = replace(task, name="another_name", max_completion_tokens=7)
    assert PromptStream(renamed, 3, "train").take(40) == first
    assert PromptStream(task, 4, "train").take(40) != first


@pytest.mark.parametrize("kind", ["chain_sum", "rows"])
def test_seeking_continues_as_if_the_problems_before_had_been_taken(kind, request):
    task = request.getfixturevalue(kind)
    whole = PromptStream(task, 0, "train").take(700)
    resumed = PromptStream(task, 0, "train")
    resumed.seek(613)
    assert resumed.take(87) == whole[613:]
    resumed.seek(5)
    assert resumed.take(20) == whole[5:25]


def test_generated_splits_share_no_problem_whatever_the_seed(chain_sum):
    prompts = {
        split: {problem.prompt for seed in range(3) for problem in PromptStream(chain_sum, seed, split).take(1000)}
        for split in SPLITS
    }
    assert min(len(found) for found in prompts.values()) > 500
    assert not prompts["train"] & prompts["evaluation"]
    assert not prompts["train"] & prompts["cold_start"]
    assert not prompts["cold_start"] & prompts["evaluation"]


def test_splits_stay_apart_between_tasks_of_other_parameters_and_spacing(chain_sum):
    wide = replace(chain_sum, parameters={**chain_sum.parameters, "max_terms": 8}, prompt="{expression}=")
    training = {problem.prompt.replace(" ", "") for problem in PromptStream(wide, 0, "train").take(2000)}
    held_out = {problem.prompt.replace(" ", "") for problem in PromptStream(chain_sum, 0, "evaluation").take(400)}
    assert not training & held_out


def test_every_bucket_belongs_to_exactly_one_split():
    assert sorted(bucket for buckets in SPLITS.values() for bucket in buckets) == list(range(100))


def test_seeds_that_are_neighbours_draw_different_problems(chain_sum):
    draws = [[problem.prompt for problem in PromptStream(chain_sum, seed, "train").take(64)] for seed in (0, 1)]
    assert len(set(draws[0]) & set(draws[1])) < 8


def test_an_epoch_of_rows_holds_each_training_row_once_in_an_order_of_its_own(rows):
    stream = PromptStream(rows, 0, "train")
    evaluation = {problem.prompt for problem in PromptStream(rows, 0, "evaluation").take(500)}
    size = 300 - len(evaluation)
    first, second = stream.take(size), stream.take(size)
    assert len({problem.prompt for problem in first}) == size
    assert {problem.prompt for problem in first} == {problem.prompt for problem in second}
    assert first != second
    assert not evaluation & {problem.prompt for problem in first}
    assert all(content_bucket(prompt) in SPLITS["evaluation"] for prompt in evaluation)


def test_rows_of_a_file_refuse_a_cold_start(rows):
    with pytest.raises(ConfigError, match="cold start needs generated problems"):
        PromptStream(rows, 0, "cold_start")


def test_a_data_set_with_too_few_problems_for_a_split_says_so(chain_sum):
    constant = replace(chain_sum, prompt="always the same")
    taken_by = next(split for split in SPLITS if content_bucket("always the same") in SPLITS[split])
    other = next(split for split in SPLITS if split != taken_by)
    PromptStream(constant, 0, taken_by).take(1)
    with pytest.raises(ConfigError, match="too few different problems"):
        PromptStream(constant, 0, other).take(1)


def test_a_data_set_folder_is_read_through_datasets(tmp_path, rows):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    hub = task_config("huggingface", dataset=str(folder), answer_pattern=rows.answer_pattern)
    problem = PromptStream(hub, 0, "train").take(1)[0]
    number = int(problem.prompt.split()[2])
    assert problem.answer == str(number + 1)
