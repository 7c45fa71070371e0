"""Which entry's problems a local lm-eval task asks."""

from dataclasses import replace

import pytest

from harness.config import compose
from harness.errors import ConfigError
from harness.evaluation.entries import (
    LOCAL_TASKS,
    check_task_folder,
    data_files,
    entry,
    entry_paths,
    held_out_entries,
)


def test_of_the_tasks_that_are_asked_for_each_has_its_entry_through_what_it_includes_too(evaluation):
    assert held_out_entries(evaluation) == {task: "chain_sum" for task in evaluation.tasks}
    assert held_out_entries(replace(evaluation, tasks=["chain_sum_longer"])) == {"chain_sum_longer": "chain_sum"}


def test_a_task_of_the_users_own_has_its_entry_and_one_with_other_problems_none(evaluation, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.yaml").write_text(
        f"include: {LOCAL_TASKS}/chain_sum_longer.yaml\ntask: mine\ndataset_kwargs: {{task: chain_sum_noisy}}\n"
    )
    (tmp_path / "other.yaml").write_text("task: other\ndataset_path: json\n")
    (tmp_path / "broken.yaml").write_text("task: {\n")
    own = replace(evaluation, tasks=["mine", "other", "gsm8k"], task_path=str(tmp_path))
    assert held_out_entries(own) == {"mine": "chain_sum_noisy"}


def test_an_entry_is_what_hydra_makes_of_it_with_those_that_it_builds_on():
    for name in ("chain_sum", "chain_sum_noisy", "chain_sum_steps", "chain_sum_length_bias"):
        assert entry(name) == compose([f"task={name}", "algorithm=reinforce"]).task
    assert [path.name for path in entry_paths("chain_sum_noisy")] == ["chain_sum.yaml", "chain_sum_noisy.yaml"]


def test_data_files_are_those_of_the_tasks_that_are_asked_for_which_lie_here(evaluation, tmp_path):
    for name in ("train", "test", "other"):
        (tmp_path / f"{name}.jsonl").touch()
    files = f"{{train: [{tmp_path}/train.jsonl, {tmp_path}/gone.jsonl], test: {tmp_path}/test.jsonl}}"
    (tmp_path / "mine.yaml").write_text(f"task: mine\ndataset_kwargs: {{data_files: {files}}}\n")
    (tmp_path / "other.yaml").write_text(f"task: other\ndataset_kwargs: {{data_files: {tmp_path}/other.jsonl}}\n")
    own = replace(evaluation, tasks=["mine", "chain_sum_longer"], task_path=str(tmp_path))
    assert data_files(own) == [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: {", r"mine\.yaml cannot be read: while parsing a flow"),
        (b"task: caf\xe9", r"mine\.yaml cannot be read: 'utf-8' codec"),
        (b"task: chain_sum_longer", r"mine\.yaml has the name of a task of ours, chain_sum_longer"),
    ],
)
def test_a_task_of_the_users_own_that_lm_eval_would_pass_over_or_take_for_ours_is_refused(
    evaluation, tmp_path, content, message
):
    own = replace(evaluation, task_path=str(tmp_path))
    (tmp_path / "mine.yaml").write_bytes(b"task: mine")
    check_task_folder(own)
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        check_task_folder(own)
    check_task_folder(replace(own, task_path=str(LOCAL_TASKS)))


def test_an_entry_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"dataset_kwargs\.task=chain_summ .* there is no .*chain_summ\.yaml"):
        entry("chain_summ")
