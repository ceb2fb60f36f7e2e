"""`Table`: amounts in rows and columns, written as text, Markdown or LaTeX, or given as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from moec.cost.shown import spelling

WIDE = 100_000  # characters; only long sums are folded in a text
FOLD = 40  # characters of a sum on one line
NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: its heading, and the unit of what stands in it (`FLOP`, `B`, `s`, or none)."""

    name: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of amounts: numbers, expressions or words. `total`: a last row, set apart; `notes` stand below."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""
    total: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()

    def data(self) -> list[dict[str, Any]]:
        """The rows by the names of the columns: numbers and words as they are, expressions written in full.

        The total is not among them.
        """
        names = [column.name for column in self.columns]
        return [dict(zip(names, map(_plain, row), strict=True)) for row in self.rows]

    def __str__(self) -> str:
        """As text in columns."""
        console = Console(width=WIDE, color_system=None, highlight=False, emoji=False)
        with console.capture() as captured:
            console.print(self._drawn())
        lines = [line.rstrip() for line in captured.get().splitlines()]
        title = [self.title, ""] if self.title else []
        return "\n".join([*title, *lines, *self.notes])

    def _drawn(self) -> Drawn:
        drawn = Drawn(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for place, column in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            words = all(isinstance(cell, str) for cell in cells)
            side: Literal["left", "right"] = "left" if words else "right"
            drawn.add_column(Text(column.name), max_width=FOLD, overflow="fold", justify=side)
        for row in self._written(_text_cell):
            drawn.add_row(*map(Text, row))
        return drawn

    def markdown(self) -> str:
        """As a table of Markdown."""
        heads = [_cell_of_markdown(column.name) for column in self.columns]
        lines = [heads, ["---"] * len(heads)]
        lines += [[*map(_cell_of_markdown, row)] for row in self._written(_text_cell)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def latex(self) -> str:
        """As a `tabular` of LaTeX, expressions in full."""
        heads = " & ".join(rf"\textbf{{{_escaped(column.name)}}}" for column in self.columns)
        body = [" & ".join(row) + r" \\" for row in self._written(_latex_cell)]
        if self.total:
            body.insert(len(body) - 1, r"\hline")
        rules = "l" + "r" * (len(self.columns) - 1)
        lines = [rf"\begin{{tabular}}{{{rules}}}", heads + r" \\", r"\hline", *body, r"\end{tabular}"]
        return "\n".join(lines)

    def with_notes(self, *notes: str) -> Table:
        """The same table with more lines below."""
        return replace(self, notes=(*self.notes, *notes))

    def _written(self, write: Callable[[Any, str], str]) -> list[list[str]]:
        rows = [*self.rows, self.total] if self.total else list(self.rows)
        return [
            [write(cell, column.unit) for cell, column in zip(row, self.columns, strict=True)] for row in rows
        ]


def _plain(cell: Any) -> Any:
    """A cell as JSON holds it."""
    if isinstance(cell, str | int | float):
        return cell
    found = sympy.sympify(cell)
    if not found.is_number:
        return spelling.in_full(found)
    return int(found) if found.is_Integer else float(found)


def _text_cell(cell: Any, unit: str) -> str:
    return NONE if cell == 0 and unit else spelling.spelled(cell, unit)


def _latex_cell(cell: Any, unit: str) -> str:
    if isinstance(cell, str):
        return _escaped(cell)
    if sympy.sympify(cell).is_number:
        return _escaped(_text_cell(cell, unit))
    return f"${spelling.latex(cell)}$"


def _cell_of_markdown(text: str) -> str:
    return text.replace("|", r"\|")


def _escaped(text: str) -> str:
    """Text in which nothing is a command of LaTeX."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "µ": r"$\mu$",
    }
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
