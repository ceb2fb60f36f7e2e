"""The picture of a run's experts: their load above, drop rates, router entropy and traffic below.

save_picture(draw_experts(read_run("run")), "experts.png")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moec.errors import ArtifactError, nearest
from moec.runtime.pictures.expert_run import ExpertRun
from moec.runtime.pictures.lines import draw_dropped, draw_entropy, draw_traffic
from moec.runtime.pictures.load import MOST_PANELS, draw_many, draw_panels
from moec.runtime.pictures.style import INK, End, name_ends, require_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

#: What can be drawn of a run: all, or one of the parts.
PARTS = ("load", "dropped", "entropy", "traffic")
OF = ("experts", *PARTS)

_LINES: dict[str, Callable[[Axes, ExpertRun], list[End]]] = {
    "dropped": draw_dropped, "entropy": draw_entropy, "traffic": draw_traffic,
}  # fmt: skip
_MISSING = {
    "load": "no load of experts: a dense program has none",
    "dropped": "no drop rates: a dense program has none",
    "entropy": "no router entropy",
    "traffic": "no traffic: one process alone sends nothing",
}
_WIDTH, _LINES_HEIGHT, _MANY_HEIGHT = 11.0, 2.9, 4.6


def require_drawable_run(path: str | Path, of: str) -> None:
    """Refuse what cannot be drawn of a run: another kind of file or part, or no matplotlib. Raises
    `ArtifactError`."""
    if of not in OF:
        raise ArtifactError("--of", f"'{of}' of a run", f"one of {', '.join(OF)}", nearest(of, OF))
    require_picture(path, ArtifactError)


def draw_experts(run: ExpertRun, of: str = "experts") -> Figure:
    """The figure of all that was recorded of `run`, or of one part.

    Up to twelve layers have a panel each, experts by steps; of more there are layers by experts at four of
    the steps. Raises `ArtifactError` where what is asked for was not recorded.
    """
    from matplotlib.figure import Figure

    parts = parts_of(run, of)
    lines = [part for part in parts if part != "load"]
    above = _height(run) if "load" in parts else 0.0
    heights = [height for height in (above, _LINES_HEIGHT if lines else 0.0) if height]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
    places = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if above:
        draw = draw_panels if len(run.load) <= MOST_PANELS else draw_many
        draw(places[0], run.load)
    named = _draw_lines(places[-1], run, lines) if lines else []
    figure.suptitle(title_of(run), x=0.01, ha="left", fontsize=11, color=INK)
    figure.draw_without_rendering()  # places are known from here on
    for axes, ends in named:
        name_ends(axes, ends, fontsize=8.5)
    return figure


def save_picture(figure: Figure, path: str | Path) -> Path:
    """Write the figure, as its name says: PNG, SVG or PDF."""
    figure.savefig(path, dpi=130)
    return Path(path)


def parts_of(run: ExpertRun, of: str) -> list[str]:
    """What is drawn. Raises `ArtifactError` where what is asked for was not recorded, saying what was."""
    seen = {
        "load": run.load, "dropped": run.dropped, "entropy": run.router_entropy, "traffic": run.num_bytes,
    }  # fmt: skip
    found = [part for part in PARTS if seen[part]]
    if not found:
        needed = "records of experts or of ranks: a sparse program, or several ranks"
        raise ArtifactError(str(run.folder), "nothing of experts or ranks", needed)
    if of != "experts" and of not in found:
        needed = "a run that recorded it: those of an older moec have the load at evaluations, and drop rates"
        raise ArtifactError(str(run.folder), _MISSING[of], needed, f"--of {' or '.join(found)}")
    return found if of == "experts" else [of]


def title_of(run: ExpertRun) -> str:
    """Whose experts, over which steps, and of which text."""
    every = (run.load, run.dropped, run.router_entropy, run.num_bytes)
    known = [series.steps for named in every for series in named.values()]
    first, last = min(int(steps[0]) for steps in known), max(int(steps[-1]) for steps in known)
    over = f"after step {last:,}" if first == last else f"from step {first:,} to {last:,}"
    text = ", load on held-out text" if run.held_out else ""
    return f"Experts of {run.folder.name or run.folder.resolve().name}, {over}{text}"


def _height(run: ExpertRun) -> float:
    """Of the panels of load, in inches: more for layers of many experts."""
    if len(run.load) > MOST_PANELS:
        return _MANY_HEIGHT
    columns = 1 if len(run.load) <= 3 else 2 if len(run.load) <= 8 else 3
    tallest = min(2.4, max(1.35, 0.045 * max(run.experts.values())))
    return -(-len(run.load) // columns) * tallest + 0.3


def _draw_lines(place: SubFigure, run: ExpertRun, parts: list[str]) -> list[tuple[Axes, list[End]]]:
    grid = place.subplots(1, len(parts), squeeze=False)[0]
    return [(axes, _LINES[part](axes, run)) for axes, part in zip(grid, parts, strict=True)]
