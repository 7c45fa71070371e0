"""`python -m harness.benchmark [TABLE ...]`: measures, prints the tables and writes them as JSON and Markdown."""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from harness.benchmark.model_shapes import REAL, SHAPES
from harness.benchmark.sizes import FULL, TINY
from harness.benchmark.table import Options, write
from harness.errors import ConfigError
from harness.machine import cores, device_name, git_state, memory_bytes, package_versions
from harness.torch_setup import set_up_environment

# Each is a module of this package.
TABLES = {
    "step": "whole steps against TRL's GRPOTrainer",
    "update": "the update phase against the core's matrix-product peak",
    "rollout": "sampling against transformers' generate",
    "logprobs": "memory and time of log-probabilities against holding the logits",
    "growth": "how an update's cost grows",
    "overhead": "what metering and logging cost",
    "report": "time and memory of a report on 200 runs",
    "profile": "where the time of rollouts and updates goes",
    "sweep": "the wall clock of a finished sweep (--sweep)",
    "shapes": "models of real shapes on the device",
}
_PACKAGES = ("torch", "transformers", "trl", "numpy", "pandas", "accelerate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, one table after the other.

    Returns:
        0, or 2 where a table could not be measured, which it says; the others are.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.table) - TABLES.keys():
        parser.error(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: must be at least 1")
    if options.device == "cpu":  # one thread in every process that measures, and memory as cells have it
        set_up_environment(threads=1)
    shapes = options.shapes or (["tiny"] if options.tiny else REAL)
    settings = Options(
        options.repetitions, TINY if options.tiny else FULL, options.device, tuple(shapes), options.sweep
    )
    out = options.out or Path("results", "benchmarks_tiny" if options.tiny else "benchmarks")
    failed = False
    for name in options.table or _default_tables(settings):
        try:
            tables = import_module(f"harness.benchmark.{name}").tables(settings)
        except ConfigError as error:
            print(f"levelfield: {error}", file=sys.stderr)
            failed = True
            continue
        print(write(out, name, tables, _machine(options.device), settings), flush=True)
    return 2 if failed else 0


def _parser() -> argparse.ArgumentParser:
    listing = "".join(f"  {name:10}{what}\n" for name, what in TABLES.items())
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description="Measure how fast the harness is, beside what others use for the same work.",
        epilog=f"tables:\n{listing}Without any: all that the device and the other options allow.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", nargs="*", metavar="TABLE", help="what to measure, see below")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of each measurement (default: 5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the table shapes (default: cpu)")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE",
        help=f"models of the table shapes: {', '.join(SHAPES)} (default: all but tiny; with --tiny that alone)",
    )  # fmt: skip
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="a finished sweep, for the table sweep")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where files go (default: results/benchmarks; with --tiny results/benchmarks_tiny)",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="sizes that only try everything out: no figures to quote")
    return parser


def _default_tables(settings: Options) -> list[str]:
    if settings.device == "cuda":
        return ["shapes"]
    left_out = {"shapes": "tiny" not in settings.shapes, "sweep": settings.sweep is None}
    return [name for name in TABLES if not left_out.get(name)]


def _machine(device: str) -> dict[str, str]:
    """What the figures were measured on: nothing that names one machine."""
    commit, dirty = git_state()
    described = {
        "processor": device_name("cpu"),
        "cores": str(len(cores())),
        "memory": f"{memory_bytes() / 2**30:.0f} GiB",
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions(_PACKAGES).items()),
        "Python": platform.python_version(),
        "commit": f"{commit or 'none'}{' with changes' if dirty else ''}",
    }
    return ({"GPU": device_name("cuda")} if device == "cuda" else {}) | described


if __name__ == "__main__":
    sys.exit(main())
