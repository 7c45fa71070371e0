"""A finished sweep's wall clock against what its cells were charged for."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from harness.benchmark.measure import Spread
from harness.benchmark.table import Cell, Options, Table, at_most
from harness.errors import ConfigError

GOAL = 1.25
_TEXT = (
    "From the plan of the sweep to the end of its last cell, against the seconds that all cells were charged for, "
    "divided by how many ran at once. Start-up, evaluation and scheduling make the difference. One sweep, measured "
    "once."
)


def tables(options: Options) -> list[Table]:
    """Of the sweep that was given.

    Raises:
        ConfigError: where none was, or where a cell of it has not ended.
    """
    if options.sweep is None:
        raise ConfigError("the table sweep reads a finished sweep: give its folder, --sweep results/embedded")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in options.sweep.glob("*/run.json")]
    ran = [record for record in records if record["status"] != "skipped"]
    if not ran or any(not record.get("finished") for record in ran):
        raise ConfigError(f"--sweep {options.sweep}: it holds no runs, or some that have not ended")
    charged = sum(record["budget"].get("spent", {}).get("device_seconds", 0.0) for record in ran)
    seconds, cells = wall_clock(ran, planned(options.sweep)), at_once(ran)
    ratio = Spread((seconds / (charged / cells),))
    row: dict[str, Cell] = {
        "a run's budget": ", ".join(sorted({budget_of(record) for record in ran})),
        "cells": len(ran),
        "at once": cells,
        "wall clock, s": seconds,
        "charged / at once, s": charged / cells,
        "ratio": ratio.median,
        **at_most(ratio, GOAL),
    }
    return [Table("A sweep's wall clock", _TEXT, [row])]


def budget_of(record: Mapping[str, Any]) -> str:
    """What ends the run, in words; on it rests how much what is not charged weighs."""
    return f"{record['budget']['limit']:.3g} {record['budget']['axis']}"


def planned(sweep: Path) -> datetime:
    """When the plan was written."""
    return datetime.fromtimestamp((sweep / "sweep.json").stat().st_mtime, UTC)


def wall_clock(records: list[Mapping[str, Any]], plan: datetime) -> float:
    """Seconds from the plan, or the first cell's start where the plan is a later copy, to the last cell's end."""
    starts, ends = ([datetime.fromisoformat(record[key]) for record in records] for key in ("started", "finished"))
    return (max(ends) - min(plan, *starts)).total_seconds()


def at_once(records: list[Mapping[str, Any]]) -> int:
    """The most cells that ran at the same time; one that ends in the second in which another starts was before it."""
    ends = [(record["finished"], -1) for record in records]
    changes = sorted([*((record["started"], 1) for record in records), *ends])
    return max(accumulate(change for _, change in changes))
