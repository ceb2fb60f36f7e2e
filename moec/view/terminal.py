"""A step for a terminal: blocks that changed, before and after side by side where there is room.

~  reads others or has other options      →  stands in another region or block
+  is new                                 -  is gone
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moec.ir.spelling import printable
from moec.view.folding import differing
from moec.view.numbering import filled
from moec.view.timeline import Drawing, Node, RegionBox, Section, Side, Step

WIDE = 140  # columns from which two lines of code stand side by side
CONTEXT = 2  # lines that were kept, shown around those that were not
MARKS = {"kept": " ", "moved": "→", "rewired": "~", "created": "+", "removed": "-"}
STYLES = {"kept": "dim", "moved": "cyan", "rewired": "yellow", "created": "green", "removed": "red"}


@dataclass(frozen=True)
class Row:
    """A line before and after, '' on the side that has none."""

    status: str
    before: str
    after: str


def step_on_screen(step: Step, drawings: Sequence[Drawing], width: int) -> RenderableType:
    """The changed sections of a step; `width`: columns of the terminal."""
    parts: list[RenderableType] = [_heading(step)]
    for section in step.sections:
        drawing = drawings[section.drawing]
        rows = shortened(list(rows_of(drawing, section)))
        if section.changed and rows:
            parts += [Rule(_said(section), align="left", style="cyan"), _drawn(rows, width)]
    return Group(*parts)


def _heading(step: Step) -> Text:
    counted = ", ".join(f"{number:,} {status}" for status, number in step.counts.items() if number)
    return Text(
        "\n".join(filter(None, [printable(step.name), counted, differing(step.sections)])), style="bold"
    )


def _said(section: Section) -> Text:
    times = f"   ×{len(section.layers)} alike" if len(section.layers) > 1 else ""
    return Text(printable(section.title) + times, style="cyan")


def rows_of(drawing: Drawing, section: Section) -> Iterator[Row]:
    """The lines of a section in the numbers of its first block; those of a region under the call of it.

    What was made of one line that is gone stands in a row with it.
    """
    layer = section.layers[0] if section.layers else None
    old = section.before[0] if section.before else layer
    partners = _partners(drawing)
    present: int | None = None
    for number, node in enumerate(drawing.nodes):
        if _is_border(node) or number in partners.values():
            continue
        made = drawing.nodes[partners[number]] if number in partners else node
        region = _region_of(node)
        if region is not None and region != present:
            yield _call(drawing.regions[region], old, layer)
        present = region
        yield Row(node.status, _code(node.before, old), _code(made.after, layer))


def _partners(drawing: Drawing) -> dict[int, int]:
    """Place of a line that is gone → place of the first one that was made of it."""
    found: dict[int, int] = {}
    for number, node in enumerate(drawing.nodes):
        gone = (n for n in node.made_from if drawing.nodes[n].status == "removed" and n not in found)
        first = next(gone, None) if node.status == "created" else None
        if first is not None:
            found[first] = number
    return found


def _is_border(node: Node) -> bool:
    side = node.after or node.before
    return side is not None and side.operator in ("input", "output") and side.code == side.name


def _region_of(node: Node) -> int | None:
    side = node.after or node.before
    return side.region if side is not None else None


def _call(box: RegionBox, old: int | None, new: int | None) -> Row:
    """The line that calls a region."""
    before = "" if box.status == "created" else printable(filled(box.code, old))
    after = "" if box.status == "removed" else printable(filled(box.code, new))
    return Row(box.status, before, after)


def _code(side: Side | None, layer: int | None) -> str:
    """A line of code; inside a region it is indented."""
    if side is None:
        return ""
    return ("" if side.region is None else "    ") + printable(filled(side.code, layer))


def shortened(rows: Sequence[Row]) -> list[Row]:
    """The rows that changed and a few around them; `…` stands for the others."""
    near = {
        other
        for place, row in enumerate(rows)
        if row.status != "kept"
        for other in range(place - CONTEXT, place + CONTEXT + 1)
    }
    shown: list[Row] = []
    for place, row in enumerate(rows):
        if place in near:
            shown.append(row)
        elif not shown or shown[-1].before != "…":
            shown.append(Row("kept", "…", "…"))
    return shown if any(row.status != "kept" for row in rows) else []


def _drawn(rows: Iterable[Row], width: int) -> RenderableType:
    return _side_by_side(rows) if width >= WIDE else Group(*(line for row in rows for line in _unified(row)))


def _side_by_side(rows: Iterable[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False, expand=True)
    table.add_column(width=1)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        old = "removed" if row.status in ("removed", "created") else row.status
        new = "created" if row.status in ("removed", "created") else row.status
        mark = "±" if row.status == "removed" and row.after else MARKS[row.status]
        table.add_row(
            Text(mark, STYLES[row.status]), Text(row.before, STYLES[old]), Text(row.after, STYLES[new])
        )
    return table


def _unified(row: Row) -> Iterator[Text]:
    """One line where both sides are the same or one is missing; else the old one above the new one."""
    if row.status == "kept" or (row.before == row.after and row.before):
        yield Text(f"{MARKS[row.status]} {row.after}", STYLES[row.status])
        return
    if row.before:
        mark = "-" if row.status in ("removed", "created") else MARKS[row.status]
        yield Text(f"{mark} {row.before}", STYLES["removed"] if mark == "-" else "dim")
    if row.after:
        mark = "+" if row.status in ("removed", "created") else MARKS[row.status]
        yield Text(f"{mark} {row.after}", STYLES["created"] if mark == "+" else STYLES[row.status])
