import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness import tasks
from harness.config import TaskConfig
from harness.entries import conf_dir
from harness.errors import ConfigError
from harness.tasks import PromptStream, check_task
from harness.tasks.sources import finite_problems
from harness.tasks.verifiers import EVALUATES_ANSWERS, gsm8k_reward

ROWS = [
    {"question": "Tom has 3 bags of 1,200 nuts. How many nuts?", "answer": "3*1200=<<3*1200=3600>>3600\n#### 3,600"},
    {"question": "Ann had $5 and spent $7. What has she now?", "answer": "5-7=<<5-7=-2>>-2\n#### -2"},
    {"question": "Half of 9?", "answer": "9/2=<<9/2=4.5>>4.5\n#### 4.5"},
]


def task_config(name: str, **changes) -> TaskConfig:
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "task" / f"{name}.yaml"))
    return replace(TaskConfig(**values), **changes)


def json_lines(tmp_path: Path, *lines: str) -> TaskConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return task_config("gsm8k", path=str(path))


@pytest.fixture
def gsm8k(tmp_path) -> TaskConfig:
    """Real GSM8K lines where LEVELFIELD_GSM8K names a file of them, else lines of the same form."""
    path = os.environ.get("LEVELFIELD_GSM8K")
    return task_config("gsm8k", path=path) if path else json_lines(tmp_path, *map(json.dumps, ROWS * 10))


def test_the_tasks_of_the_repository_pass(gsm8k):
    check_task(task_config("chain_sum"), "task")
    check_task(gsm8k, "task")


def test_gsm8k_reference_solutions_earn_the_full_reward(gsm8k):
    problems = PromptStream(gsm8k, 0, "train").take(20)
    assert [gsm8k_reward(problem.fields["answer"], problem.answer) for problem in problems] == [1.0] * 20
    assert [gsm8k_reward(problem.fields["answer"], problem.fields["answer"]) for problem in problems] == [1.0] * 20
    assert [gsm8k_reward("#### 123454321", problem.answer) for problem in problems] == [0.0] * 20


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "clay_tablets"}, r"task\.source=clay_tablets: choose one of reasoning_gym"),
        ({"dataset": "chain_sums"}, r"task\.dataset=chain_sums: reasoning-gym has .*chain_sum"),
        ({"dataset": None}, r"task\.dataset is null"),
        ({"path": "x.jsonl"}, r"task\.path=x\.jsonl: .* no use"),
        ({"parameters": {"min_term": 3}}, r"task\.parameters\.min_term: .* it takes min_terms, max_terms"),
        ({"parameters": {"min_terms": 6, "max_terms": 5}}, r"task\.parameters: 'chain_sum' refuses them"),
        ({"parameters": {"min_terms": "three"}}, r"task\.parameters: 'chain_sum' refuses them"),
        ({"prompt": "{expresion} ="}, r"task\.prompt: there is no field 'expresion'; the fields are .*expression"),
        ({"answer": "{result}"}, r"task\.answer: there is no field 'result'"),
        ({"prompt": "hello"}, r"task\.prompt='hello' asks the same of every problem: name a field.*expression"),
        ({"prompt": "{expression"}, r"task\.prompt=.* is not a template"),
        ({"prompt": "{}"}, r"task\.prompt"),
        ({"answer_pattern": "("}, r"task\.answer_pattern=.* must be a regular expression with one group"),
        ({"answer_pattern": "-?\\d+"}, r"task\.answer_pattern=.* must be a regular expression with one group"),
        ({"answer_pattern": "(x)"}, r"task\.answer_pattern=.* finds nothing"),
        ({"verifier": "guess"}, r"task\.verifier=guess: no such verifier; there are gsm8k, marked_answer"),
        ({"worked_solution": "sum"}, r"task\.worked_solution=sum: no such worked_solution; there are chain_sum"),
        ({"step_verifier": "sum"}, r"task\.step_verifier=sum: no such step_verifier; there are chain_sum"),
        (
            {"dataset": "spell_backward", "parameters": {}, "prompt": "{question}", "worked_solution": None}
            | {"step_verifier": "chain_sum"},
            r"task\.step_verifier=chain_sum does not fit these problems \(KeyError: 'expression'\); their fields are",
        ),
        ({"dataset": "spell_backward", "parameters": {}, "prompt": "{question}"}, r"task\.worked_solution=chain_sum"),
    ],
)
def test_a_bad_task_names_its_key_and_the_mend(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_task(task_config("chain_sum", **changes), "task")


def test_the_key_is_the_callers(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.cold_start\.task\.dataset=nonsense"):
        check_task(task_config("chain_sum", dataset="nonsense"), "model.cold_start.task")


@pytest.mark.parametrize(
    "bad_line, message",
    [
        ('{"question": "cut off', "line 3 is not JSON"),
        ("[" * 100_000, "line 3 is not JSON"),
        ('["a", "list"]', "line 3 is not a JSON object"),
        ('{"question": "no answer here"}', r"no field 'answer'.*line 3"),
        ('{"question": "no mark", "answer": "4"}', r"answer_pattern.*finds nothing.*line 3"),
        (
            '{"question": "3+4", "answer": "#### seven"}',
            r"task\.verifier=gsm8k compares with a number, and the answer 'seven' is none.*line 3",
        ),
        ('{"question": null, "answer": "#### 4"}', r"task\.prompt: the field 'question' is null.*line 3"),
        ('{"question": "2+2", "answer": null}', r"task\.answer: the field 'answer' is null.*line 3"),
        ('{"question": "2+2", "answer": NaN}', r"task\.answer: the field 'answer' is NaN.*line 3"),
        (r'{"question": "half a \ud83d", "answer": "#### 4"}', r"task\.prompt gives '\\ud83d', half of a .*line 3"),
        (r'{"question": "2+2", "answer": "#### \udc00"}', r"task\.answer gives '\\udc00', half of a .*line 3"),
        ('{"question": "2+2", "answer": %s}' % ("1" * 5001), "line 3 has an integer of more than 4300 digits"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, bad_line, message):
    task = json_lines(tmp_path, json.dumps(ROWS[0]), "", bad_line, json.dumps(ROWS[1]))
    with pytest.raises(ConfigError, match=message):
        check_task(task, "task")


@pytest.mark.parametrize(
    "question, answer, message",
    [
        (" \t", "4", r"task\.prompt gives an empty prompt.*line 2"),
        ("2+2", "\n", r"task\.answer gives an empty answer.*line 2"),
        ("2+2", None, r"task\.answer: the field 'solution\[answer\]' is null.*line 2"),
    ],
)
def test_a_problem_that_asks_or_expects_nothing_is_named_by_its_line(tmp_path, question, answer, message):
    """Without a pattern, whatever the answer is would be taken."""
    rows = [{"question": asked, "solution": {"answer": given}} for asked, given in (("1+1", "2"), (question, answer))]
    own = json_lines(tmp_path, *map(json.dumps, rows))
    with pytest.raises(ConfigError, match=message):
        check_task(replace(own, prompt="{question}", answer="{solution[answer]}", answer_pattern=None), "task")


@pytest.mark.parametrize("answer", [False, 0])
def test_a_value_that_python_takes_for_false_is_an_answer(tmp_path, answer):
    own = json_lines(tmp_path, json.dumps({"question": "0", "answer": answer, "note": None}))
    (problem,) = finite_problems(replace(own, answer_pattern=None, verifier="marked_answer"), "task")
    assert problem.answer == str(answer)


def test_a_pattern_whose_group_takes_no_part_finds_nothing(tmp_path):
    own = replace(json_lines(tmp_path, json.dumps(ROWS[0])), answer_pattern="nuts|(cake)|####")
    with pytest.raises(ConfigError, match=r"answer_pattern.*finds nothing.*line 1"):
        check_task(own, "task")


@pytest.mark.parametrize("dataset, answer", [("graph_color", "None"), ("ab", "")])
def test_a_generated_problem_may_have_no_answer(dataset, answer):
    """Its data set judges by what else it knows."""
    changes = {"dataset": dataset, "parameters": {}, "prompt": "{question}", "verifier": "reasoning_gym"}
    task = task_config("chain_sum", **changes, worked_solution=None)
    check_task(task, "task")
    assert answer in {problem.answer for problem in PromptStream(task, 0, "train").take(100)}


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    own = json_lines(tmp_path, "\ufeff" + json.dumps(ROWS[0]))
    assert [problem.answer for problem in finite_problems(own, "task")] == ["3,600"]


def test_a_verifier_may_need_no_answer(tmp_path):
    own = replace(json_lines(tmp_path, '{"question": "what?"}'), answer="", answer_pattern=None)
    check_task(replace(own, verifier="marked_answer"), "task")


def test_a_file_that_is_missing_empty_or_binary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.path=.*absent\.jsonl"):
        check_task(task_config("gsm8k", path=str(tmp_path / "absent.jsonl")), "task")
    with pytest.raises(ConfigError, match="holds no problem"):
        check_task(json_lines(tmp_path, "", ""), "task")
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        check_task(task_config("gsm8k", path=str(tmp_path / "rows.jsonl")), "task")


def test_a_hub_data_set_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.dataset="):
        check_task(task_config("huggingface", dataset=str(tmp_path / "nowhere")), "task")


def test_verifiers_that_would_evaluate_the_answer_as_code_are_refused():
    for dataset in EVALUATES_ANSWERS - {"composite"}:
        with pytest.raises(ConfigError, match="evaluates answers as code"):
            check_task(task_config("chain_sum", dataset=dataset, verifier="reasoning_gym"), "task")


def test_the_reasoning_gym_verifier_needs_reasoning_gym_problems(tmp_path):
    task = replace(json_lines(tmp_path, json.dumps(ROWS[0])), verifier="reasoning_gym")
    with pytest.raises(ConfigError, match=r"task\.source=json_lines"):
        check_task(task, "task")


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    """Every cell of a plan checks its task."""
    reads = []
    finite_problems = tasks.finite_problems
    monkeypatch.setattr(tasks, "finite_problems", lambda *given: reads.append(given) or finite_problems(*given))
    task = json_lines(tmp_path, json.dumps(ROWS[0]))
    for _ in range(2):
        check_task(task, "task")
    assert len(reads) == 1
    check_task(replace(task, prompt="{question}!"), "task")
    assert len(reads) == 2
    file = Path(task.path)
    file.write_text("no JSON")
    os.utime(file, ns=(0, 0))
    for _ in range(2):  # what is wrong is told to every cell
        with pytest.raises(ConfigError, match="line 1 is not JSON"):
            check_task(task, "task")
