"""Which entry's problems a local lm-eval task asks."""

from dataclasses import replace

import pytest

from harness.errors import ConfigError
from harness.evaluation.entries import LOCAL_TASKS, entry, held_out_entries


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


def test_an_entry_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"dataset_kwargs\.task=chain_summ .* there is no .*chain_summ\.yaml"):
        entry("chain_summ")
