"""How a printed program is laid out: imports, functions and their aliases, blocks, shapes at the right."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .region import Region
from .spelling import printable
from .vocabulary import NAMESPACES

WIDTH = 92  # code beyond this is broken over several lines
COLUMN = 84  # shapes stand at this column at the latest, further right only after longer code
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|, |[][(){}]""")


@dataclass
class Line:
    """One line of a function: code, the comment at its right, its block, and where it was written."""

    code: str
    comment: str = ""
    block: str = ""
    source: str = ""


@dataclass
class Function:
    """One printed function, where its weights lie, and the regions it stands for."""

    header: str
    lines: list[Line]
    weights: list[str] = field(default_factory=list)
    regions: list[tuple[str, Region | None]] = field(default_factory=list)

    @property
    def body(self) -> str:
        """Everything but the name: functions of equal body are printed once."""
        lines = [f"{line.code}  # {line.comment}" for line in self.lines]
        return "\n".join([self.header, *self.weights, *lines])


def import_lines(words: set[str]) -> str:
    """The imports of a text that uses these words of the vocabulary."""
    lines = ["import moec.runtime.ops  # registers the operators moec.*"] if words & set(NAMESPACES) else []
    names = sorted(words)
    text = f"from moec.ir.vocabulary import {', '.join(names)}"
    if len(text) > WIDTH:
        text = "from moec.ir.vocabulary import (\n" + _filled([f"{name}," for name in names], "    ") + "\n)"
    return "\n".join([*lines, text] if names else lines)


def _filled(pieces: Sequence[str], indent: str) -> str:
    """The pieces in lines no longer than WIDTH, a space between them, each line indented."""
    lines = [indent]
    for piece in pieces:
        if len(lines[-1]) + len(piece) + 1 > WIDTH and lines[-1].strip():
            lines.append(indent)
        lines[-1] += piece if lines[-1] == indent else f" {piece}"
    return "\n".join(lines)


def function_text(function: Function) -> str:
    """One function, the comment above it, and the names of the other regions it also serves."""
    name = function.regions[0][0]
    body = _body(function.lines)
    text = f"{_about(function)}def {name}{function.header}:\n{body}"
    others = [other for other, _ in function.regions[1:]]
    return f"{text}\n\n\n{_aliases(name, others)}" if others else text


def _aliases(name: str, others: list[str]) -> str:
    """`ffn_1 = ffn_2 = ffn_0`, a few to a line."""
    rows = [others[i : i + 8] for i in range(0, len(others), 8)]
    return "\n".join(" = ".join([*row, name]) for row in rows)


def _about(function: Function) -> str:
    """The comment above a function: how many regions it stands for, and where they are."""
    regions = [region for _, region in function.regions if region is not None]
    weights = "".join(f"#   {printable(line)}\n" for line in function.weights)
    if not regions:
        return weights
    first = regions[0]
    title = f"{first.kind} {ranges([region.index for region in regions])} ({len(regions)} alike)"
    parts = [title if len(regions) > 1 else first.name]
    parts += [_common_path([region.path for region in regions]), first.source]
    return f"# {printable(' · '.join(part for part in parts if part))}\n{weights}"


def ranges(numbers: Sequence[int]) -> str:
    """`0–11`, `1, 3 … 11`, `2, 5`: layer numbers, with runs of one stride drawn together."""
    strides = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) < 3 or len(strides) > 1:
        return ", ".join(map(str, numbers))
    if strides == {1}:
        return f"{numbers[0]}–{numbers[-1]}"
    return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}" if len(numbers) > 3 else ", ".join(map(str, numbers))


def _common_path(paths: list[str]) -> str:
    """`transformer.h.*.mlp` for the paths of repeated layers, the first path when they differ otherwise."""
    starred = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths}
    return starred.pop() if len(starred) == 1 and len(paths) > 1 else paths[0]


def _body(lines: list[Line]) -> str:
    width = min(max((len(line.code) for line in lines if line.comment), default=0), COLUMN - 6)
    written: list[str] = []
    for block, members in itertools.groupby(lines, key=lambda line: line.block):
        inside = list(members)
        source = next((line.source for line in inside if line.source), "")
        title = f"block {block}" + (f" · {source}" if source else "")
        written += [""] if written else []
        written += [f"    # {printable(title)}"] if block else []
        written += [_with_comment(_wrapped(line.code), line.comment, width) for line in inside]
    return "\n".join(written)


def _with_comment(code: str, comment: str, width: int) -> str:
    """`code`, indented, with the comment two columns after the widest line of the function."""
    *above, last = code.split("\n")
    padded = f"    {last:<{width}}  # {comment}" if comment else f"    {last}"
    return "\n".join([*(f"    {line}" for line in above), padded])


def _wrapped(code: str) -> str:
    """`code` over several lines when it is long: broken after commas, all of which stand inside brackets."""
    if len(code) <= WIDTH:
        return code
    pieces = _pieces(code)
    return _filled(pieces, "    ").removeprefix("    ")


def _pieces(code: str) -> list[str]:
    """`code` cut at the spaces after commas inside brackets, never inside a string."""
    pieces, start, depth = [], 0, 0
    for found in _TOKEN.finditer(code):
        token = found.group()
        depth += (token in "([{") - (token in ")]}")
        if token == ", " and depth:
            pieces.append(code[start : found.end() - 1])
            start = found.end()
    return [*pieces, code[start:]]
