"""`moec cost`: what a program costs one rank, in letters or in numbers, and how long it takes."""

from __future__ import annotations

from typing import Any

from moec.commands.foreseen import Asked, program_on_meta
from moec.commands.screen import show, show_heading, show_json
from moec.cost.cost import Cost
from moec.cost.shown.spelling import short
from moec.cost.shown.summary import BY
from moec.cost.shown.table import Column, Table
from moec.cost.timing.prediction import Prediction
from moec.errors import CostError, nearest


def show_cost(
    model: str, plan: str | None, asked: Asked, by: str, *, trust: bool, as_json: bool, as_latex: bool
) -> None:
    """Print the tables; mistakes in words come before the model is read."""
    if by not in BY:
        raise CostError("--by", f"'{by}'", f"one of {', '.join(BY)}", nearest(by, BY))
    letters, phase = asked.letters, asked.checked_phase
    asked.opened_hardware()
    program = program_on_meta(model, plan, asked.ranks, trust=trust)
    asked.require_room(program)
    cost = program.cost(phase)
    table, prediction = cost.table(by, **letters), asked.predicted(cost)
    if as_json:
        show_json(_plain(cost, table, letters, prediction, by))
    elif as_latex:
        show(table.latex(), memory_table(cost, letters).latex())
        if prediction is not None:
            show(prediction.table(by).latex())
    else:
        _show(cost, table, letters, prediction, by)


def _show(cost: Cost, table: Table, letters: dict[str, int], prediction: Prediction | None, by: str) -> None:
    sizes = ", ".join(f"{name} = {number:,}" for name, number in letters.items())
    show_heading(f"{cost.about}; {sizes}" if sizes else cost.about)
    show("", str(table), "", str(memory_table(cost, letters)))
    if prediction is None:
        return
    device = prediction.hardware.device
    show(_room(cost.memory.numbers(**letters)["total"], device.memory, device.name), "")
    show_heading(f"{short(prediction.seconds, 's')} on {device.name}")
    show("", str(prediction.table(by)))


def memory_table(cost: Cost, letters: dict[str, int]) -> Table:
    """What lies in the memory of a rank, in letters or numbers."""
    memory = cost.memory
    rows = tuple((name, cost.at(amount, **letters)) for name, amount in memory.parts.items())
    total = ("together", cost.at(memory.total, **letters))
    return Table((Column("memory of a rank"), Column("bytes", "B")), rows, total=total)


def _room(needed: float, there: float, name: str) -> str:
    """Whether it fits."""
    if needed <= there:
        return f"fits: {100 * needed / there:.2g} % of the {short(there, 'B')} of {name}"
    return f"does not fit: {short(needed - there, 'B')} more than the {short(there, 'B')} of {name}"


def _plain(
    cost: Cost, table: Table, letters: dict[str, int], prediction: Prediction | None, by: str
) -> dict[str, Any]:
    """The same as data."""
    found: dict[str, Any] = {
        "phase": cost.phase,
        "ranks": cost.mesh.world,
        "axes": cost.mesh.axes(),
        "letters": letters,
        "by": by,
        "rows": table.data(),
        "memory": {row["memory of a rank"]: row["bytes"] for row in memory_table(cost, letters).data()},
    }
    if prediction is not None:
        found["time"] = {
            "device": prediction.hardware.device.name,
            "seconds": prediction.seconds,
            "exposed": prediction.exposed,
            "by": prediction.by(by),
        }
    return found
