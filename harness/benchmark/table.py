"""A table of measurements, and the two files that it ends up in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.benchmark.measure import Spread
from harness.benchmark.sizes import Sizes

Cell = str | float | Spread | None


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    repetitions: int
    sizes: Sizes
    device: str  # cpu or cuda
    shapes: tuple[str, ...]  # models of the table on real shapes
    sweep: Path | None  # a finished sweep


@dataclass(frozen=True)
class Table:
    """Rows that share their columns; units stand in the columns' names."""

    title: str
    text: str  # what was compared, and how
    rows: Sequence[Mapping[str, Cell]]


def at_least(value: Spread, bound: float) -> dict[str, Cell]:
    """The columns that hold the median against a goal."""
    return {"goal": f"at least {_number(bound)}", "reached": _yes(value.median >= bound)}


def at_most(value: Spread, bound: float) -> dict[str, Cell]:
    """The columns that hold the median against a limit."""
    return {"goal": f"at most {_number(bound)}", "reached": _yes(value.median <= bound)}


def tokens_row(ours: Mapping[str, Spread], theirs: Mapping[str, Spread], name: str, goal: float) -> dict[str, Cell]:
    """The columns that hold completion tokens a second of two sides, and the ratio against its goal.

    Args:
        ours, theirs: of both `tokens/s` and `tokens a completion`, whose equality shows that the work was the same.
        name: of the other side.
    """
    ratio = ours["tokens/s"] / theirs["tokens/s"]
    return {
        "ours, tokens/s": ours["tokens/s"],
        f"{name}, tokens/s": theirs["tokens/s"],
        "ratio": ratio,
        **at_least(ratio, goal),
        "ours, tokens a completion": ours["tokens a completion"].median,
        f"{name}, tokens a completion": theirs["tokens a completion"].median,
    }


def write(folder: Path, name: str, tables: Sequence[Table], machine: Mapping[str, Any], options: Options) -> str:
    """Write NAME.json and NAME.md; returns the latter's text."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "machine": machine,
        "repetitions": options.repetitions,
        "tables": [
            {"title": table.title, "text": table.text, "rows": [_plain(row) for row in table.rows]} for table in tables
        ],
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    text = markdown(tables, machine, options.repetitions)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def markdown(tables: Sequence[Table], machine: Mapping[str, Any], repetitions: int) -> str:
    """The tables with the machine below them."""
    parts = [f"## {table.title}\n\n{table.text}\n\n{_grid(table.rows)}" for table in tables]
    described = "\n".join(f"- {key}: {value}" for key, value in machine.items())
    if any(isinstance(cell, Spread) for table in tables for row in table.rows for cell in row.values()):
        parts.append(f"Medians of {repetitions} repetitions, taken in turn; in brackets the smallest and the largest.")
    return "\n\n".join([*parts, described]) + "\n"


def _grid(rows: Sequence[Mapping[str, Cell]]) -> str:
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([_shown(row[key]) for key in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case str():
            return cell
        case Spread():
            return f"{_number(cell.median)} ({_number(cell.low)} to {_number(cell.high)})"
        case _:
            return _number(cell)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1g}"


def _plain(row: Mapping[str, Cell]) -> dict[str, Any]:
    return {key: _spread(cell) if isinstance(cell, Spread) else cell for key, cell in row.items()}


def _spread(spread: Spread) -> dict[str, Any]:
    return {"median": spread.median, "min": spread.low, "max": spread.high, "values": list(spread.values)}


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"
