"""Read a plan's TOML text, and find the line on which each key stands.

`tomllib` gives values without positions. A statement (a header, or a key with its value, which may run over
several lines) parses by itself, so the file is read again statement by statement and the paths come from
`tomllib` too: there is no second TOML grammar here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from moec.errors import PlanError, nearest
from moec.plan.section import Path
from moec.plan.shipped import shipped_names


def read(path: FilePath) -> str:
    """Text of a plan file; PlanError when it is missing, not a file, or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _missing(path) from None
    except UnicodeDecodeError as error:
        raise PlanError(
            str(path), f"byte {error.start} is not UTF-8", "a TOML file, which is UTF-8"
        ) from None
    except OSError as error:
        raise PlanError(
            str(path), (error.strerror or str(error)).lower(), "a TOML file that can be read"
        ) from None


def parse(text: str, name: str) -> dict[str, Any]:
    """The values in TOML `text`; PlanError with line and column where it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(
            r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL
        )
        reason, line, column = found.groups() if found else (str(error), None, None)
        rows = text.split("\n")
        number = int(line or len(rows))
        where = f"{name}:{number}" + (f":{column}" if column else "")
        raise PlanError(
            where, rows[number - 1].strip() or "the end of the file", f"TOML ({reason})"
        ) from None


def locate(text: str) -> dict[Path, int]:
    """Line, from 1, of every table and key in valid TOML `text`, by path, such as `("moe", "top_k")`."""
    lines: dict[Path, int] = {}
    tables: dict[Path, int] = {}
    prefix: Path = ()
    for number, statement in _statements(text):
        values = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            prefix = _enter(values, tables)
            found = [prefix[:length] for length in range(1, len(prefix) + 1)]
        else:
            found = [prefix + path for path in _paths(values)]
        for path in found:
            lines.setdefault(path, number)
    return lines


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of each statement: lines are taken together until they parse."""
    start, pending = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        pending += line + "\n"
        try:
            tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        yield start, pending
        start, pending = number + 1, ""


def _enter(header: dict[str, Any], tables: dict[Path, int]) -> Path:
    """Path of the table that a header opens; `tables` counts the arrays of tables and is updated."""
    path: Path = ()
    node: Any = header
    while node:
        ((key, node),) = node.items()
        path += (key,)
        if isinstance(node, list):
            tables[path] = tables.get(path, -1) + 1
            node = node[0]
        if path in tables:
            path += (tables[path],)
    return path


def _paths(value: Any) -> Iterator[Path]:
    """Paths to everything inside `value`, outermost first."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (key,)
        yield from ((key, *path) for path in _paths(inner))


def _missing(path: FilePath) -> PlanError:
    """A missing file, with the nearest plan file in its folder, or the shipped plan of that name."""
    folder = path.parent
    beside = {file.name for file in folder.glob("*.toml")} - {"pyproject.toml"}
    near = nearest(path.name, beside)
    if not near and (shipped := nearest(path.stem, shipped_names())):
        near = f"the shipped plan {shipped}"
    needed = "a plan file" if folder.is_dir() else f"a plan file; the folder {folder} does not exist either"
    return PlanError(str(path), "no such file", needed, near)
