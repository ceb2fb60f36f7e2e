"""`moec plot`: a picture of what plans take, as ranks, batch or length grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moec.api import world_of
from moec.commands.compare import DENSE
from moec.commands.foreseen import NEEDED, OPTIONS, Asked, program_on_meta
from moec.commands.screen import show, show_table
from moec.cost.machine.hardware import Hardware
from moec.cost.shown.spelling import short
from moec.drawing import draw, require_drawable
from moec.errors import CostError, nearest
from moec.plan import Plan
from moec.program import Program
from moec.sweep import LETTERS, OVER, Point, Sweep, doublings, swept

LONGEST = 2048  # of a model that has no limit of its own
MOST = 256  # sequences of a rank


@dataclass(frozen=True)
class Plotted:
    """What is drawn: `over` one of `OVER`, by doubling from `low` to `high`, or as far as there is room."""

    over: str
    of: str
    out: str
    low: int | None = None
    high: int | None = None


def plot(model: str, plans: Sequence[str], asked: Asked, plotted: Plotted) -> None:
    """Write the picture, and print what is in it; mistakes in words come before the model is read."""
    require_drawable(plotted.out, plotted.of)
    letters, hardware = _checked(asked, plotted.over)
    programs = {plan: program_on_meta(model, None if plan == DENSE else plan, asked.ranks) for plan in plans}
    highest: dict[str, Any] = {} if plotted.over == "ranks" else {plotted.over: plotted.high}
    longest = replace(asked, **highest)
    for program in programs.values():
        longest.require_room(program)
    numbers = _numbers(plotted, hardware, list(programs.values()))
    sweep = swept(programs, hardware, plotted.over, asked.checked_phase, letters, numbers)
    draw(sweep, plotted.of, plotted.out)
    _show(sweep, plotted.of)
    show("", f"drawn in {plotted.out}")


def require_model(model: str, layers: Sequence[str] | None) -> None:
    """Refuse what is asked of trainings alone. Raises `CostError`."""
    if layers:
        found = f"{layers[0]}, and {model} is not the folder of a training"
        raise CostError("--layers", found, "the folder that a training wrote, with train.jsonl")


def _checked(asked: Asked, over: str) -> tuple[dict[str, int], Hardware]:
    """The letters that stay, and the hardware; raises `CostError` for words that do not go together."""
    if over not in OVER:
        raise CostError("--over", f"'{over}'", f"one of {', '.join(OVER)}", nearest(over, OVER))
    own = NEEDED[asked.checked_phase]
    varied = LETTERS.get(over)
    if varied is not None and varied not in own:
        needed = f"one of ranks, {', '.join(name for name, letter in LETTERS.items() if letter in own)}"
        raise CostError("--over", f"{over}, which {asked.phase} does not have", needed)
    fixed = {"ranks": asked.ranks, "batch": asked.batch, "sequence": asked.sequence, "past": asked.past}[over]
    if fixed is not None:
        raise CostError(f"--{over}", f"one number, and --over {over}", f"one of the two; --to {fixed}")
    # A number in its place lets the others be checked as they are for any cost.
    varied_by: dict[str, Any] = {} if over == "ranks" else {over: 1}
    hardware = replace(asked, **varied_by).opened_hardware()
    if hardware is None:
        raise CostError(
            "--hardware", "none", "a file or a shipped one", " or ".join(Hardware.shipped_names())
        )
    return {name: number for name, number in asked.letters.items() if name in OPTIONS}, hardware


def _numbers(plotted: Plotted, hardware: Hardware, programs: list[Program]) -> list[int]:
    """What is tried: doublings between what was asked for, or what there is room for."""
    if plotted.over == "ranks":
        least = max(world_of(program.plan or Plan()) for program in programs)
        low, high = plotted.low or least, plotted.high or hardware.world
    elif plotted.over == "batch":
        low, high = plotted.low or 1, plotted.high or MOST
    else:
        longest = min(program.source.max_positions or LONGEST for program in programs)
        low, high = plotted.low or min(16, longest), plotted.high or longest
    if low > high:
        raise CostError(f"--over {plotted.over}", f"from {low} to {high}", "a range that is not empty")
    return doublings(low, high)


def _show(sweep: Sweep, of: str) -> None:
    """The numbers of the picture."""

    def cell(point: Point) -> str:
        """One number, and whether it is only on paper."""
        written = short(point.of(of), "s" if of == "latency" else "tokens/s")
        return written if point.fits else f"{written} (does not fit)"

    rows = [
        (first.at, *(cell(curve.points[place]) for curve in sweep.curves))
        for place, first in enumerate(sweep.curves[0].points)
    ]
    show_table((sweep.over, *(curve.name for curve in sweep.curves)), rows)
