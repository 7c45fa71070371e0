"""Fingerprints of what a run reads beside the code."""

from dataclasses import replace

from harness.config import compose
from harness.evaluation.entries import LOCAL_TASKS
from harness.runs.inputs import changed_input, inputs_fingerprint


def test_every_file_that_a_run_reads_has_a_fingerprint_that_changes_with_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    of_model = ["model/config.json", "model/tokenizer.json", "model/model.safetensors"]
    files = ["alone_part.py", "packed_part/inner.py", "rows.jsonl", "tasks/mine.yaml", *of_model]
    for file in [*files, "packed_part/__init__.py"]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}')
    data, tasks = str(tmp_path / "rows.jsonl"), str(tmp_path / "tasks")
    given = ["plugins=[alone_part,packed_part]", "task=gsm8k", f"task.path={data}", f"evaluation.task_path={tasks}"]
    config = compose([*given, "task.max_prompt_tokens=200", "task.max_completion_tokens=200"])
    config = replace(config, model=replace(config.model, path=str(tmp_path / "model")))
    names = ["alone_part", "packed_part", data, tasks, *[config.model.path] * len(of_model)]
    for file, name in zip(files, names, strict=True):
        before = inputs_fingerprint(config)
        assert set(before) == {*names, "conf/task/chain_sum.yaml"}
        assert changed_input({"inputs": before}, before) is None
        with open(tmp_path / file, "a") as opened:
            opened.write("# changed\n")
        after = inputs_fingerprint(config)
        assert {key for key in after if after[key] != before[key]} == {name}
        assert changed_input({"inputs": before}, after) == f"{name} ({before[name]}, now {after[name]})"


def test_what_no_run_reads_of_a_models_folder_has_no_fingerprint(tmp_path):
    config = compose()
    config = replace(config, model=replace(config.model, path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    before = inputs_fingerprint(config)
    (tmp_path / "README.md").write_text("A model card.")
    assert inputs_fingerprint(config) == before


def test_what_lm_eval_does_not_read_of_a_folder_of_tasks_has_no_fingerprint(tmp_path):
    """The results may lie there, which change with every cell."""
    run, beside = tmp_path / "results" / "s" / "run", tmp_path / "my_results"
    for folder in (run, beside):
        folder.mkdir(parents=True)
    config = compose([f"results={tmp_path}/results", f"evaluation.task_path={tmp_path}"])
    before = inputs_fingerprint(config)
    for file in (run / "config.yaml", run / "metrics.jsonl", tmp_path / "notes.txt"):
        file.write_text("changing")
    assert inputs_fingerprint(config) == before
    for file in (tmp_path / "_template_yaml", tmp_path / "utils.py", beside / "more.yaml"):
        file.write_text("task: mine\n")
        after = inputs_fingerprint(config)
        assert after != before
        before = after


def test_what_own_evaluation_tasks_ask_has_fingerprints_with_all_that_it_is_made_of(tmp_path):
    data, tasks = tmp_path / "problems.jsonl", tmp_path / "tasks"
    tasks.mkdir()
    data.write_text("")
    (tasks / "noisy.yaml").write_text(
        f"include: {LOCAL_TASKS}/chain_sum_held_out.yaml\ntask: noisy\n"
        "dataset_kwargs: {task: chain_sum_noisy, parameters: {}}\n"
    )
    (tasks / "other.yaml").write_text(f"task: other\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n")
    config = compose(["evaluation.tasks=[noisy,other]", f"evaluation.task_path={tasks}"])
    entries = ["conf/task/chain_sum.yaml", "conf/task/chain_sum_noisy.yaml"]
    assert set(inputs_fingerprint(config)) == {*entries, str(data), str(tasks)}
