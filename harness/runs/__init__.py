"""Run directories: written crash-safe by one process, read by anyone as tidy frames."""

from harness.runs.compact import compact
from harness.runs.directory import RunDirectory, RunInUse, effective_status
from harness.runs.reading import NoRuns, load_cells, load_evaluations, load_runs, load_samples

__all__ = [
    "NoRuns",
    "RunDirectory",
    "RunInUse",
    "compact",
    "effective_status",
    "load_cells",
    "load_evaluations",
    "load_runs",
    "load_samples",
]
