"""Scores that many runs of a sweep have alike: those of the weights that they begin with."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def shared_scores(
    folder: Path, determined_by: Mapping[str, Any], score: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Scores that are made by the first who asks for them; whoever asks meanwhile waits.

    Args:
        folder: where a sweep keeps them.
        determined_by: everything that the scores depend on, as JSON can say it.
        score: makes them, as :func:`harness.evaluation.evaluate` does.
    """
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:16]
    with open(folder / f"{name}.json", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        try:
            return json.loads(file.read())
        except ValueError:  # it is new, or whoever made it was killed while writing
            file.truncate(0)
        scores = score()
        file.write(json.dumps(scores))
    return scores
