"""What a terminal shows while cells run: read from their run directories alone, about once a second."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from harness.runs.directory import FINAL, RunDirectory
from harness.status import CellState, labels, read_cell, table

_INTERVAL = 1.0  # seconds
_TRACEBACK_LINES = 12
_BAD = ("failed", "diverged", "interrupted")


class Progress:
    """Live table on a terminal, plain lines elsewhere; failures are told at once on both. A context manager."""

    def __init__(self, directories: Sequence[Path], console: Console) -> None:
        self._console = console
        # How an earlier attempt ended is no news: such a cell is to do until its run.json changes.
        self._before = {path: RunDirectory(path).read_status() for path in directories}
        self._labels = labels(directories)
        self._settled: dict[Path, CellState] = {}  # these change no more: they need not be read every second
        self._told = {path: _milestone(self._state(path)) for path in directories}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def cells(self) -> list[CellState]:
        """The cells as they are now."""
        return [self._state(path) for path in self._before]

    def _watch(self) -> None:
        if not self._console.is_terminal:
            while not self._end.wait(_INTERVAL):
                self._tell(plain=True)
            self._tell(plain=True)
            return
        with Live(table(self.cells()), console=self._console, auto_refresh=False, transient=True) as live:
            while not self._end.wait(_INTERVAL):
                self._tell(plain=False)
                live.update(table(self.cells()), refresh=True)
        self._tell(plain=False)

    def _state(self, path: Path) -> CellState:
        cell = self._settled.get(path) or read_cell(path, self._labels[path])
        if cell.status in FINAL:
            self._settled[path] = cell
        if cell.status in ("failed", "interrupted") and RunDirectory(path).read_status() == self._before[path]:
            return replace(cell, status="planned", reason=None, traceback=None)
        return cell

    def _tell(self, plain: bool) -> None:
        """Print what is new: failures always; starts, quarters and other ends where there is no live table."""
        for path in self._before:
            cell = self._state(path)
            milestone = _milestone(cell)
            if milestone == self._told[path]:
                continue
            self._told[path] = milestone
            if plain or cell.status in _BAD:
                self._console.print(Text(_line(cell)), soft_wrap=True)
            if cell.status in _BAD and cell.traceback:
                lines = cell.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:]
                self._console.print(Text("\n".join(f"    {line}" for line in lines)), soft_wrap=True)


def _milestone(cell: CellState) -> tuple[str, int]:
    return cell.status, int(4 * (cell.spent or 0)) if cell.status == "running" else 0


def _line(cell: CellState) -> str:
    parts = [f"{cell.label}: {cell.status}"]
    if cell.spent is not None:
        parts.append(f"{cell.spent:.0%} of the budget")
    if cell.step is not None:
        parts.append(f"step {cell.step}")
    if cell.reward is not None:
        parts.append(f"reward {cell.reward:.3f}")
    if cell.clip_fraction is not None:
        parts.append(f"clip fraction {cell.clip_fraction:.2e}")
    return ", ".join(parts) + (f": {cell.reason}" if cell.reason else "")
