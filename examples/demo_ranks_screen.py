"""How the demo on ranks looks: the mesh, one layer's program, loads, traffic and losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from examples.demo_screen import code, open_console, title
from moec.ir.mesh import Mesh
from moec.runtime.ops.sent import Traffic, summed

__all__ = ["code", "layer", "load", "losses", "mesh", "open_console", "title", "traffic"]


def mesh(console: Console, mesh: Mesh) -> None:
    """The ranks, and how each expert layer arranges them."""
    console.print(str(mesh), highlight=False)
    for name, axes in mesh.layers:
        console.print(f"  {name}  {axes}", highlight=False)


def layer(console: Console, text: str, number: str) -> None:
    """The functions of one expert layer out of the text of a rank's program."""
    functions = re.split(r"\n\n+", text)
    wanted = re.compile(rf"^def (dispatch|moe|ffn|mix|block)_{number}\b", re.MULTILINE)
    console.print()
    code(console, "\n\n".join(part for part in functions if wanted.search(part)))


def load(console: Console, mesh: Mesh, counts: Mapping[str, Sequence[int]]) -> None:
    """A bar for every rank of every expert layer: the rows that its experts computed."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, axes in mesh.layers:
        rows = [sum(part) for part in _dealt(counts[name], axes.expert)]
        held = len(counts[name]) // axes.expert
        for place, count in enumerate(rows):
            ranks = mesh.groups(axes.expert_axis)[0][place]
            experts = f"experts {place * held}–{(place + 1) * held - 1}" if held > 1 else f"expert {place}"
            bar, share = Bar(max(rows), 0, count, width=40), f"{count / sum(rows):.1%}"
            table.add_row("" if place else name, f"rank {ranks}", experts, bar, share, f"{count:,} rows")
        table.add_row()
    console.print(table)


def _dealt(counts: Sequence[int], ranks: int) -> list[Sequence[int]]:
    held = len(counts) // ranks
    return [counts[place * held : (place + 1) * held] for place in range(ranks)]


def traffic(console: Console, counted: Sequence[Any], predicted: Sequence[Any]) -> None:
    """What was counted beside what the graph says; `RuntimeError` where they differ."""
    ours, graphs = (summed([Traffic.of_json(rows) for rows in side]) for side in (counted, predicted))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("direction", "axis", "operator", "calls", "messages", "bytes counted", "bytes by the graph"):
        table.add_column(name, justify="left" if name in ("direction", "axis", "operator") else "right")
    for kind in sorted(ours.sent.keys() | graphs.sent.keys()):
        one, other = ours.sent.get(kind), graphs.sent.get(kind)
        if one is None or one != other:
            raise RuntimeError(f"{kind}: counted {one}, and by the graph {other}")
        numbers = (one.calls, one.messages, one.bytes, other.bytes)
        table.add_row(kind.direction, kind.axis, kind.operator, *(f"{number:,}" for number in numbers))
    console.print(table)


def losses(console: Console, losses: Mapping[int, Sequence[float]]) -> float:
    """The losses side by side; gives how far apart any two of a step are, of their size."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step", justify="right")
    for world in losses:
        table.add_column("one process" if world == 1 else f"{world} ranks", justify="right")
    rows = list(zip(*losses.values(), strict=True))
    for step in _some(len(rows)):
        table.add_row(str(step + 1), *(f"{loss:.6f}" for loss in rows[step]))
    console.print(table)
    furthest = max(abs(loss - row[0]) / row[0] for row in rows for loss in row)
    console.print(f"\nof {len(rows)} steps, the furthest apart: {furthest:.1e} of the loss", highlight=False)
    return furthest


def _some(number: int, shown: int = 8) -> list[int]:
    """Up to `shown` of `number` steps, the first and the last among them."""
    return sorted({round(place * (number - 1) / max(1, shown - 1)) for place in range(shown)})
