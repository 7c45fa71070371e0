"""`python -m harness.run algorithm=gspo model=tiny_moe seed=0`: one run; with -m a sweep."""

import os
import signal
import sys

import hydra

from harness.entries import conf_dir
from harness.refusals import REFUSED, refusal
from harness.sweep import session
from harness.sweep.launch import run_or_launch


def main() -> int:
    """The command line; returns its exit status: 2 for a configuration that cannot run, 1 where a run failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # for Hydra to raise what it would print at length
    sys.argv[1:] = multirun_first(sys.argv[1:])
    code = 0
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(run_or_launch)()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except REFUSED as error:
        print(refusal(error), file=sys.stderr)
        code = 2
    return session.finish(code)


def multirun_first(arguments: list[str]) -> list[str]:
    """The command's arguments with -m before the overrides, which Hydra's parser wants in one piece."""
    return sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))


if __name__ == "__main__":
    sys.exit(main())
