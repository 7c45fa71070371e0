"""What local lm-eval tasks ask: whose problems, from which files."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harness.config import compose
from harness.entries import conf_dir
from harness.errors import ConfigError
from harness.evaluation import check_evaluation
from harness.evaluation.entries import LOCAL_TASKS, data_files, entry, held_out_entries, local_tasks, task_files


def test_of_the_tasks_that_are_asked_for_each_has_its_entry_through_what_it_includes_too(evaluation):
    assert held_out_entries(evaluation) == {task: "chain_sum" for task in evaluation.tasks}
    assert held_out_entries(replace(evaluation, tasks=["chain_sum_longer"])) == {"chain_sum_longer": "chain_sum"}


def test_a_task_of_the_users_own_has_its_entry_and_one_with_other_problems_none(evaluation, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.yaml").write_text(
        f"include: {LOCAL_TASKS}/chain_sum_longer.yaml\ntask: mine\ndataset_kwargs: {{task: chain_sum_noisy}}\n"
    )
    (tmp_path / "other.yaml").write_text("task: other\ndataset_path: json\n")
    (tmp_path / "values.yaml").write_text("[1, 2]\n")
    own = replace(evaluation, tasks=["mine", "other", "gsm8k"], task_path=str(tmp_path))
    assert held_out_entries(own) == {"mine": "chain_sum_noisy"}


@pytest.mark.parametrize("asked", ["grouped", "nested", "tagged", "inline"])
def test_a_task_is_found_through_the_groups_and_tags_that_it_is_in(evaluation, tmp_path, asked):
    held = f"include: {LOCAL_TASKS}/chain_sum_held_out.yaml\ntask: mine\ntag: [tagged]\n"
    (tmp_path / "mine.yaml").write_text(f"{held}dataset_kwargs: {{task: chain_sum_noisy}}\n")
    (tmp_path / "grouped.yaml").write_text("group: grouped\ntask: [mine]\n")
    (tmp_path / "nested.yaml").write_text("group: nested\ntask: [grouped, nested]\n")
    (tmp_path / "inline.yaml").write_text("group: inline\ntask: [{task: mine, num_fewshot: 0}]\n")
    own = replace(evaluation, tasks=[asked], task_path=str(tmp_path))
    assert held_out_entries(own) == {"mine": "chain_sum_noisy"}


def test_an_entry_without_self_in_its_defaults_goes_over_them(tmp_path, monkeypatch):
    (tmp_path / "task").mkdir()
    shutil.copy(conf_dir() / "task" / "chain_sum.yaml", tmp_path / "task")
    (tmp_path / "task" / "mine.yaml").write_text("defaults: [chain_sum]\nprompt: '{expression}?'\n")
    monkeypatch.setattr("harness.entries.conf_dir", lambda: tmp_path)
    assert (entry("mine").prompt, entry("mine").dataset) == ("{expression}?", "chain_sum")


def test_an_entry_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"task=chain_summ .*--config-dir cannot.*name one of chain_sum, chain_sum_l"):
        entry("chain_summ")


@pytest.mark.parametrize("name", sorted(file.stem for file in (conf_dir() / "task").glob("chain_sum*.yaml")))
def test_an_entry_has_the_values_of_those_that_it_builds_on(name):
    assert asdict(entry(name)) == asdict(compose(["algorithm=ppo", f"task={name}"]).task)
    own = [f"{name}.yaml"]
    assert [file.name for file in task_files(name)] == (own if name == "chain_sum" else ["chain_sum.yaml", *own])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"task: {\n", r"line 2"),
        (b"task: m\xfcne\n", r"UTF-8"),
        (b"task: mine\nversion: 2024-13-45\n", r"month must be in 1..12"),
        (b"task: mine\ninclude: absent.yaml\n", r"No such file or directory: .*absent\.yaml"),
        (b"task: mine\ninclude: mine.yaml\n", r"includes itself"),
    ],
)
def test_a_file_that_is_no_yaml_is_named_with_the_reason(evaluation, tmp_path, content, reason):
    """It may be the task that is asked for, which lm-eval would say not to know."""
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"evaluation\.task_path: {tmp_path}/mine\.yaml .*{reason}"):
        check_evaluation(replace(evaluation, tasks=["mine"], task_path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["task", "group"])
def test_a_name_has_one_file_where_it_is_one_of_ours_or_asked_for(evaluation, tmp_path, kind):
    ours = LOCAL_TASKS / "chain_sum_held_out.yaml"
    (tmp_path / "a.yaml").write_text(f"include: {ours}\n{kind}: chain_sum_held_out\n")
    own = replace(evaluation, task_path=str(tmp_path))
    for tasks in (["chain_sum_held_out"], ["chain_sum_longer"]):
        with pytest.raises(ConfigError, match=rf"{tmp_path}/a\.yaml has the name of {ours}, chain_sum_held_out"):
            check_evaluation(replace(own, tasks=tasks))
    for file in ("a.yaml", "b.yaml"):
        (tmp_path / file).write_text(f"include: {ours}\n{kind}: mine\n")
    assert set(local_tasks(own)) == {*evaluation.tasks, "mine"}
    with pytest.raises(ConfigError, match=rf"{tmp_path}/b\.yaml has the name of {tmp_path}/a\.yaml, mine"):
        check_evaluation(replace(own, tasks=["mine"]))
    assert set(local_tasks(replace(own, task_path=str(LOCAL_TASKS)))) == set(evaluation.tasks)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("{data_files: data/a.jsonl}", ["data/a.jsonl"]),
        ("{data_files: [data/b.jsonl, https://a.place/c.jsonl, absent.jsonl]}", ["data/b.jsonl"]),
        ("{data_files: {test: data/a.jsonl, train: [data/b.jsonl]}}", ["data/a.jsonl", "data/b.jsonl"]),
        ("{data_dir: data, data_files: '*.jsonl'}", ["data/a.jsonl", "data/b.jsonl"]),
        ("null", []),
    ],
)
def test_the_data_files_of_the_tasks_asked_for_are_found(evaluation, tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    for file in ("data/a.jsonl", "data/b.jsonl", "data/other.csv", "tasks/mine.yaml"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(f"task: mine\ndataset_path: json\ndataset_kwargs: {given}\n")
    own = replace(evaluation, tasks=["mine"], task_path="tasks")
    assert data_files(own) == list(map(Path, expected))
    assert data_files(replace(own, tasks=["chain_sum_held_out"])) == []
