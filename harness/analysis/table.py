"""A table of the report: numbers as CSV, words as Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pandas as pd

_ABSENT = "–"
_HARMLESS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "\\|`*~$"}})
_OUTER = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # underscores that emphasise; those inside of a word do not


@dataclass(frozen=True)
class Table:
    """A frame of numbers with what a reader must know about it.

    Attributes:
        frame: what the CSV keeps, with every digit.
        formats: of columns, for display; :func:`short` where there is none.
        part: what is displayed, where that is not the whole frame.
        remarks: what is said below the lines, each by itself.
    """

    name: str
    title: str
    note: str
    frame: pd.DataFrame
    formats: dict[str, str] = field(default_factory=dict)
    part: pd.DataFrame | None = None
    remarks: Sequence[str] = ()

    @property
    def shown(self) -> pd.DataFrame:
        """What is displayed."""
        return self.frame if self.part is None else self.part

    @property
    def header(self) -> list[str]:
        """Column names."""
        return [str(column) for column in self.shown]

    @property
    def rows(self) -> list[list[str]]:
        """Cells as they are displayed; a value that is absent is a dash."""
        records = self.shown.to_dict("records")
        return [[_text(record[name], self.formats.get(str(name))) for name in record] for record in records]

    @property
    def sort_keys(self) -> list[list[str | None]]:
        """What cells sort by: a number's every digit as JavaScript reads them, "" where absent, None for text."""
        return [list(map(_sort_key, record.values())) for record in self.shown.to_dict("records")]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, if words among them."""
        return [any(map(_is_number, self.shown[column])) for column in self.shown]

    def markdown(self) -> str:
        """A pipe table and its remarks as a list, in which no text acts as markup."""
        lines = [self.header, ["---"] * len(self.header), *self.rows] if self.rows else []
        table = "".join(f"| {' | '.join(map(markdown_text, line))} |\n" for line in lines)
        remarks = "".join(f"- {markdown_text(remark)}\n" for remark in self.remarks)
        return "\n".join(filter(None, (table, remarks)))

    def save(self, folder: Path) -> None:
        """Write NAME.csv and NAME.md."""
        self.frame.to_csv(folder / f"{self.name}.csv", index=False, lineterminator="\n")
        (folder / f"{self.name}.md").write_text(f"{self.markdown()}\n{self.note}\n", encoding="utf-8")


def markdown_text(text: str) -> str:
    """Text of a run's making (a reason, a name) as text in Markdown, and in the HTML that Markdown may hold."""
    return " ".join(_OUTER.sub(r"\\_", text.translate(_HARMLESS)).replace("](", "]\\(").split())


def short(value: float) -> str:
    """Three digits, and no exponent below 100,000."""
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e5 else f"{value:.3g}"


def _text(value: Any, template: str | None) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return str(value)
    if isinstance(value, Real):
        number = float(value)
        if np.isinf(number):
            return "not reached" if number > 0 else "went wrong"
        if np.isnan(number):
            return _ABSENT
        return short(number) if template is None else template.format(value)
    return _ABSENT if value is None or value == "" else str(value)


def _is_number(value: Any) -> TypeGuard[Real]:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _sort_key(value: Any) -> str | None:
    if _is_number(value):
        number = float(value)
        return "" if np.isnan(number) else str(number).replace("inf", "Infinity")
    return "" if value in (None, "", _ABSENT) else None
