"""Tables in the documentation, between two marks, written by the benchmark that measured them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = Path(__file__).with_name("results")


def record(
    found: dict[str, Any],
    out: Path,
    own: Path,
    table: Callable[[list[dict[str, Any]]], str],
    page: Path | None = None,
) -> None:
    """Write a record as JSON; when it takes the place of the benchmark's own, its table on `page` too.

    `table` makes it of the record's `cases`; `page` is that of performance where none is given.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if out.resolve() == own.resolve():
        write_table(page or PAGE, own.stem, table(found["cases"]))


def marks(name: str) -> tuple[str, str]:
    """The lines before and after the table of a benchmark."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_table(page: Path, name: str, table: str) -> None:
    """Put `table` between the marks of `name`, in place of what is there; the rest stays as it is.

    Raises ValueError where the page has not each mark once, in order.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page}: needs one line {begin}, and one {end} after it")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}", encoding="utf-8")
