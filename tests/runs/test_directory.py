"""What is on disk stays whole and readable, whatever kills its writer."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from harness.errors import ConfigError
from harness.runs.directory import RunDirectory, RunInUse, effective_status
from harness.runs.provenance import provenance

torch.set_num_threads(1)


def test_a_damaged_state_is_named_with_what_to_do(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.state_path.parent.mkdir()
    for content in (b"", b"no state", b"PK\x03\x04 and no more"):
        directory.state_path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{directory.state_path} is damaged: remove it"):
            directory.load_state()


def test_status_is_merged_not_replaced(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_status() == {}
    directory.update_status(status="running", seed=1)
    directory.update_status(status="done")
    assert directory.read_status() == {"status": "done", "seed": 1}


def test_numbers_that_are_not_finite_become_null(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append_metrics([{"step": 1, "loss": float("nan"), "ratio/max": float("inf"), "entropy": 0.5}])
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": None, "ratio/max": None, "entropy": 0.5}
    directory.update_status(budget={"spent": {"flops": float("inf")}})
    assert directory.read_status() == {"budget": {"spent": {"flops": None}}}


def test_state_comes_back_as_it_was_saved(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.load_state() is None
    directory.save_state(
        {"steps": 3, "weights": torch.arange(4.0), "random": torch.get_rng_state(), "nested": [(1, "a")]}
    )
    state = directory.load_state()
    assert state is not None and state["steps"] == 3 and state["nested"] == [(1, "a")]
    assert torch.equal(state["weights"], torch.arange(4.0))
    assert torch.equal(state["random"], torch.get_rng_state())


def test_truncating_forgets_what_came_after_the_state_and_a_torn_last_line(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append_metrics([{"step": 1}])
    directory.append_evaluations([{"step": 0, "task": "a"}, {"step": 0, "task": "b"}])
    counts = directory.line_counts()
    directory.append_metrics([{"step": 2}])
    directory.append_samples([{"step": 2}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    directory.truncate(counts)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "evaluations.jsonl").read_text().count("\n") == 2
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_truncating_leaves_a_file_alone_that_is_right_already(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append_metrics([{"step": 1}])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    directory.truncate(directory.line_counts())
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_two_processes_never_write_one_directory(tmp_path):
    writer, steps = _start_writer(tmp_path)
    steps.readline()
    with (
        pytest.raises(RunInUse, match=f"process {writer.pid} on {socket.gethostname()}"),
        RunDirectory(tmp_path).lock(),
    ):
        pass
    writer.kill()
    writer.join()
    with RunDirectory(tmp_path).lock():  # it ended with its process
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_a_directory_is_whole_after_kills_at_random_moments(tmp_path):
    generator = random.Random(0)
    reached = 0
    for _ in range(20):
        writer, steps = _start_writer(tmp_path)
        written = int(steps.readline())
        assert written == reached + 1  # continues from the state, not before or after it
        time.sleep(generator.uniform(0, 0.1))
        writer.kill()  # SIGKILL
        writer.join()
        written = max([written, *map(int, steps.read().split())])

        directory = RunDirectory(tmp_path)
        state, status = directory.load_state(), directory.read_status()
        assert state is not None
        reached = state["step"]
        assert reached in (written, written + 1)
        assert torch.equal(state["weights"], torch.full((5000,), reached))
        assert status["step"] in (reached, reached + 1) and len(status["padding"]) == 3000
        with directory.lock():
            directory.truncate(state["lines"])
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, reached + 1))


def test_a_full_disk_corrupts_nothing(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append_metrics([{"step": 1}])
    directory.update_status(status="running")
    directory.save_state({"step": 1})
    with _files_no_larger_than(2048):
        with pytest.raises(OSError):
            directory.append_metrics([{"step": 2, "padding": "x" * 4000}])
        with pytest.raises(OSError):
            directory.update_status(padding="x" * 4000)
        with pytest.raises((OSError, RuntimeError)):
            directory.save_state({"step": 2, "weights": torch.zeros(4000)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert directory.read_status() == {"status": "running"}
    assert directory.load_state() == {"step": 1}
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["state.pt"]


def test_a_run_that_cannot_fit_on_the_disk_stops_before_compute(tmp_path):
    RunDirectory(tmp_path).check_space(1)
    with pytest.raises(ConfigError, match=r"MB free and .* MB are needed.*results="):
        RunDirectory(tmp_path / "not" / "there" / "yet").check_space(10**18)


def test_a_run_whose_process_is_gone_counts_as_interrupted():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    assert effective_status({"status": "running", "pid": gone.pid, "host": here}) == "interrupted"
    assert effective_status({"status": "running", "pid": os.getpid(), "host": here}) == "running"
    assert effective_status({"status": "running", "pid": gone.pid, "host": "elsewhere"}) == "running"
    assert effective_status({"status": "failed", "pid": gone.pid, "host": here}) == "failed"


def test_a_killed_process_that_nobody_waited_for_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert effective_status({"status": "running", "pid": process.pid, "host": socket.gethostname()}) == "interrupted"
    process.wait()


def test_provenance_names_code_packages_and_machine():
    found = provenance("cpu")
    assert found["packages"]["torch"] == torch.__version__
    assert len(found["code"]) == 12 and int(found["code"], 16) >= 0
    assert found["device"] and found["python"] and found["platform"]


def test_provenance_does_not_claim_the_repository_that_an_installed_package_lies_in(tmp_path):
    package = tmp_path / "site-packages" / "harness"
    package.mkdir(parents=True)
    source = __import__("harness").__path__[0]
    for name in ("__init__.py", "errors.py", "machine.py"):
        (package / name).write_text(open(f"{source}/{name}").read())
    (package / "runs").mkdir()
    (package / "runs" / "provenance.py").write_text(open(f"{source}/runs/provenance.py").read())
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "theirs"], cwd=tmp_path, check=True)
    code = "from harness.runs.provenance import provenance; print(provenance('cpu')['git_commit'])"
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert shown.stdout == "None\n", shown.stderr


def _start_writer(path):
    """A process that writes as fast as it can, and a file that tells which steps it has finished."""
    reading, writing = os.pipe()
    # Forked: importing torch anew for each of them takes seconds.
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path, writing))
    process.start()
    os.close(writing)
    return process, open(reading, encoding="utf-8")


def _write_for_ever(path, report):
    directory = RunDirectory(path)
    with directory.lock():
        state = directory.load_state() or {"step": 0, "lines": {}}
        directory.truncate(state["lines"])
        for step in itertools.count(state["step"] + 1):
            directory.append_metrics([{"step": step, "padding": "x" * 3000}])
            directory.update_status(status="running", step=step, padding="x" * 3000)
            directory.save_state({"step": step, "lines": directory.line_counts(), "weights": torch.full((5000,), step)})
            os.write(report, f"{step}\n".encode())


@contextmanager
def _files_no_larger_than(size):
    """As a disk does that fills up: writes beyond `size` bytes of a file are cut short, then refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
