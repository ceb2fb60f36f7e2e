"""What commands print: tables, code, errors. Colours on terminals alone, and none under NO_COLOR."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from moec.errors import MoecError

STYLES = {"rewritten": "green", "refused": "yellow", "kept": "dim", "proved": "green", "stated": "yellow"}
LAST = 30  # characters that the last column is folded to, at the narrowest
WIDE = 10_000  # a pipe has no width, so nothing is folded there


def screen() -> Console:
    """Standard output as it is now."""
    return Console(highlight=False, soft_wrap=True)


def show(*lines: str, style: str | None = None) -> None:
    """Print lines as they are."""
    for line in lines:
        screen().print(line, style=style, markup=False)


def show_heading(text: str) -> None:
    """A line that begins a part."""
    screen().print(text, style="bold", markup=False)


def show_json(data: Any) -> None:
    """Print plain data as JSON, nothing else on the page."""
    print(json.dumps(data, indent=2, default=str))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns, whole numbers to the right; on a terminal the last column is folded to fit."""
    rows = [list(row) for row in rows]
    console = Console(highlight=False)
    console.width = _width(columns, rows, console.width) if console.is_terminal else WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, name in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[place], int) for row in rows)
        last = place == len(columns) - 1
        table.add_column(name, no_wrap=not last, overflow="fold", justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*map(_cell, row))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _width(columns: Sequence[str], rows: Sequence[Sequence[object]], room: int) -> int:
    """What all columns but the last need, and some for that one: rich would crop, a terminal wraps."""
    table = [columns, *rows]
    fixed = sum(max(len(_cell(row[place])) for row in table) + 2 for place in range(len(columns) - 1))
    return max(room, fixed + LAST)


def _cell(value: object) -> Text:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return Text(text, style=STYLES.get(text, ""))


def show_code(text: str, language: str = "python") -> None:
    """Print a program (or TOML) as it is; highlighted on a terminal."""
    console = screen()
    if not console.is_terminal:
        print(text.rstrip("\n"))
        return
    console.print(
        Syntax("", language, theme="ansi_dark", background_color="default").highlight(text.rstrip("\n"))
    )


def show_diff(text: str) -> None:
    """Print a diff, what came green and what went red."""
    for line in text.rstrip("\n").splitlines():
        style = {"+": "green", "-": "red", "@": "cyan", "#": "dim"}.get(line[:1])
        show(line, style=style)


def on_terminal() -> bool:
    """Whether someone looks at standard output, rather than a program that reads it."""
    return screen().is_terminal


def show_drawn(draw: Callable[[int], RenderableType]) -> None:
    """Print what `draw` makes for a terminal of so many columns."""
    console = Console(highlight=False)
    console.print(draw(console.width))


def show_next(commands: Mapping[str, Sequence[object]]) -> None:
    """Name commands worth trying next: what each is for → its words."""
    show("", "next:")
    lines = {shlex.join(map(str, words)): purpose for purpose, words in commands.items()}
    width = max(map(len, lines))
    for line, purpose in lines.items():
        show(f"  {line:<{width}}   {purpose}")


def show_error(error: MoecError) -> None:
    """The four lines of an error, on standard error: where, found, needed, nearest."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    where, *rest = str(error).split("\n")
    console.print(where, style="bold red", markup=False)
    for line in rest:
        console.print(line, markup=False)
