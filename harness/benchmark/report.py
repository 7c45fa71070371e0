"""Time and memory of a report on many runs."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.benchmark.measure import interleave
from harness.benchmark.memory import peak_memory
from harness.benchmark.synthetic import write_sweep
from harness.benchmark.table import Cell, Options, Table, at_most

TIME_GOAL, MEMORY_GOAL = 60.0, 2.0
_TEXT = (
    "`python -m harness.report` on a synthetic sweep of {runs} runs with {steps} steps each, from the start of the "
    "process to its end, and the most memory that it held."
)


def tables(options: Options) -> list[Table]:
    """Seconds and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = write_sweep(Path(folder) / "synthetic", options.sizes.seeds, options.sizes.steps)
        runs = sum(1 for _ in sweep.glob("*/run.json"))
        measured = interleave({"report": lambda: _report(sweep)}, options.repetitions)["report"]
    rows: list[dict[str, Cell]] = [
        {"": "time, s", "report": measured["seconds"], **at_most(measured["seconds"], TIME_GOAL)},
        {"": "memory, GiB", "report": measured["gigabytes"], **at_most(measured["gigabytes"], MEMORY_GOAL)},
    ]
    return [Table("Report", _TEXT.format(runs=runs, steps=options.sizes.steps), rows)]


def _report(sweep: Path) -> dict[str, float]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "harness.benchmark.report", str(sweep)]
    # As users run it, without what is set up for the processes that train.
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return {"seconds": time.perf_counter() - started, "gigabytes": int(process.stdout.split()[-1]) / 2**30}


if __name__ == "__main__":
    from harness.report import main

    main(sys.argv[1:])
    print(peak_memory())
