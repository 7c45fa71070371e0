"""`python -m harness.export algorithm=gspo to=trl`: the configuration that optimizes the same in another trainer."""

import argparse
import sys
from collections.abc import Sequence

from harness.config import compose
from harness.errors import ConfigError
from harness.exporting import trl, verl

_TRAINERS = {"trl": trl.export, "verl": verl.export}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the configuration as YAML.

    Returns:
        0; 2 where the run's configuration is wrong or a part of it has no equal there, which it says.
    """
    options = _parser().parse_intermixed_args(arguments)
    chosen = [override.removeprefix("to=") for override in options.overrides if override.startswith("to=")]
    overrides = [override for override in options.overrides if not override.startswith("to=")]
    try:
        if len(chosen) != 1 or chosen[0] not in _TRAINERS:
            raise ConfigError(f"to={','.join(chosen)}: name one trainer, {' or '.join(f'to={to}' for to in _TRAINERS)}")
        print(_TRAINERS[chosen[0]](compose(overrides, options.config_dir)), end="")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.export", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="to=trl or to=verl, and overrides as in python -m harness.run"
    )
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of further YAML entries")
    return parser


if __name__ == "__main__":
    sys.exit(main())
