"""A single run, in the process of the command."""

import sys

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.text import Text

from harness.cell import EXIT_CODES, prepare, run_cell
from harness.config import validate
from harness.entries import check_choices, check_sources
from harness.errors import ConfigError
from harness.runs.reading import SWEEP
from harness.status import make_console, read_cell, table
from harness.sweep.plan import check_cache, check_folder
from harness.sweep.progress import Progress


def run_single(job: DictConfig) -> None:
    """Check, run and report one configuration; a run that is done is left as it is.

    Raises:
        SystemExit: with status 2 for a configuration that cannot run, before anything is written; with 1 or 130 where
            the run failed or was interrupted.
    """
    try:
        _check_single(HydraConfig.get())
        config = validate(job)
        check_cache([config])
        folder = config.run_dir.parent
        # Loose runs may differ in anything; beside the cells of a sweep a run must be comparable with them.
        check_folder(folder if (folder / SWEEP).exists() else config.run_dir, [config])
        directory = prepare(config)
        console = make_console()
        with Progress([directory.path], console):
            status = run_cell(directory)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:
        print(f"results={job.results}: {error}: nothing can be kept there", file=sys.stderr)
        raise SystemExit(2) from error
    console.print(table([read_cell(directory.path, config.label)]))
    console.print(Text(str(directory.path)), soft_wrap=True)
    if EXIT_CODES[status]:
        raise SystemExit(EXIT_CODES[status])


def _check_single(hydra: HydraConf) -> None:
    check_sources(hydra)
    check_choices(hydra)
    if cells := hydra.sweeper.params:  # of which one run would be a cell that nobody chose
        named = " ".join(f"{key}={value}" for key, value in cells.items())
        raise ConfigError(f"this preset is of a sweep ({named}): add -m, and narrow it where you want fewer cells")
