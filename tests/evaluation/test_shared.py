import json
import math
import threading

import pytest

from harness.evaluation import shared_scores

ROWS = [{"task": "sums", "score": 1 / 3, "stderr": 0.1 + 0.2, "n": 7}]


class Asked:
    def __init__(self, rows=ROWS):
        self.rows, self.times = rows, 0

    def __call__(self):
        self.times += 1
        return self.rows


def test_scores_are_made_once_for_what_they_are_determined_by(tmp_path):
    folder = tmp_path / "scores"
    first, second, other = Asked(), Asked([]), Asked([])
    assert shared_scores(folder, {"seed": 0, "weights": "a"}, first) == ROWS
    assert shared_scores(folder, {"weights": "a", "seed": 0}, second) == ROWS
    assert shared_scores(folder, {"seed": 1, "weights": "a"}, other) == []
    assert (first.times, second.times, other.times) == (1, 0, 1)


def test_a_standard_error_that_there_is_none_of_is_kept(tmp_path):
    rows = [{"task": "sums", "score": 1.0, "stderr": math.nan, "n": 1}]
    for _ in range(2):
        (row,) = shared_scores(tmp_path, {}, Asked(rows))
        assert math.isnan(row["stderr"]) and row["score"] == 1.0


@pytest.mark.parametrize("left", ["", json.dumps(ROWS)[:-5]])
def test_what_a_killed_process_left_is_made_anew(tmp_path, left):
    shared_scores(tmp_path, {}, Asked([{"task": "others"}]))
    (file,) = tmp_path.iterdir()
    file.write_text(left)
    assert shared_scores(tmp_path, {}, Asked()) == ROWS
    assert json.loads(file.read_text()) == ROWS


def test_scores_that_fail_are_not_kept(tmp_path):
    with pytest.raises(ZeroDivisionError):
        shared_scores(tmp_path, {}, lambda: [{"score": 1 / 0}])
    assert shared_scores(tmp_path, {}, Asked()) == ROWS


def test_who_asks_meanwhile_waits(tmp_path):
    begun, go_on, second = threading.Event(), threading.Event(), Asked([])
    found = []

    def slow():
        begun.set()
        go_on.wait()
        return ROWS

    threads = [threading.Thread(target=lambda: found.append(shared_scores(tmp_path, {}, slow)))]
    threads[0].start()
    begun.wait()
    threads.append(threading.Thread(target=lambda: found.append(shared_scores(tmp_path, {}, second))))
    threads[1].start()
    threads[1].join(timeout=0.2)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [ROWS, ROWS] and second.times == 0
