"""What to say when nothing fits: by how much, and what would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moec.cost.shown.spelling import spelled
from moec.errors import PlanError

from .arrangements import Space, arrangements
from .outcome import Outcome

if TYPE_CHECKING:
    from .search import Search

MOST = 64  # times as many ranks are tried


def nothing_fits(search: Search, refused: Sequence[Outcome]) -> PlanError:
    """The error of a search whose arrangements are all too large, the smallest of them first in `refused`."""
    least = refused[0]
    parallel, parts = least.parallel, {k: v for k, v in least.memory.items() if k != "total"}
    largest = max(parts, key=lambda name: parts[name])
    found = (
        f"{len(refused)} arrangements of {search.space.world} ranks, none of which fits: the least is "
        f"{'' if least.exact else 'more than '}"
        f"{spelled(least.memory['total'], 'B')} a rank, {spelled(parts[largest], 'B')} of it {largest} "
        f"(tensor {parallel.tensor}, expert {parallel.expert}, slice {parallel.slice})"
    )
    over = least.memory["total"] - search.limit
    needed = f"at most {spelled(search.limit, 'B')} a rank: {spelled(over, 'B')} less"
    return PlanError("memory of a rank", found, needed, "; or ".join(_changes(search, least)))


def _changes(search: Search, least: Outcome) -> list[str]:
    found = [change for change in (_fewer(search, least), _freed(search), _narrow(search, least)) if change]
    more = _more_ranks(search)
    return [*found, more] if more else found


def _fewer(search: Search, least: Outcome) -> str:
    """A smaller batch, where that is what takes the room."""
    if least.batch == 1:
        return ""
    alone = search.outcome(least.parallel, 1)
    data = least.mesh.data * search.job.parts
    return f"batch {data}, in place of {search.job.batch or data * least.batch}" if alone.fits else ""


def _freed(search: Search) -> str:
    """Axes that the plan fixes, let go."""
    fixed = [name for name in ("data", "tensor", "expert", "slice") if name in search.space.fixed]
    if not fixed or not _fits(search, replace(search.space, fixed={})):
        return ""
    return f"{', '.join(fixed)} left open in [parallel]"


def _narrow(search: Search, least: Outcome) -> str:
    """Weights of half the width, where they are read alone: training keeps them in full."""
    held = least.memory["parameters"]
    wide = next(search.program.parameters()).dtype.itemsize > 2
    fits = least.memory["total"] - held / 2 <= search.limit
    return 'dtype = "bf16" in [compile]' if wide and fits and search.job.phase == "decode" else ""


def _more_ranks(search: Search) -> str:
    """The fewest ranks that suffice, in powers of two."""
    times = 2
    while times <= MOST:
        world = search.space.world * times
        if _fits(search, search.space_on(search.hardware.with_world(world))):
            return f"{world} ranks"
        times *= 2
    return ""


def _fits(search: Search, space: Space) -> bool:
    """Whether what cuts the weights of `space` into the smallest parts fits, with one sequence a rank."""
    by_parts = sorted(arrangements(space), key=lambda one: (one.expert * one.slice, one.tensor))
    letters = search.job.letters(1)
    return search.lowering_in(space).cost(by_parts[-1]).memory(letters)["total"] <= search.limit
