"""What all pictures share: kinds of files, colours, names at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moec.errors import MoecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".png", ".svg", ".pdf")
COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5b", "#8a5a9e", "#b08a2e", "#4d9aa8")
INK, FAINT = "#333333", "#dddddd"
LINE = 15  # pixels between two names at a hundred dots an inch


def require_picture(path: str | Path, error: type[MoecError]) -> None:
    """Refuse what cannot be drawn: another kind of file, or no matplotlib. Raises `error`."""
    kind = Path(path).suffix
    if kind not in KINDS:
        raise error(str(path), f"a picture of the kind {kind!r}", f"one of {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise error("plot", "no matplotlib", "the extra that draws", "pip install 'moec[plot]'") from None


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@dataclass(frozen=True)
class End:
    """Where a line ends, and its name."""

    x: float
    y: float
    name: str
    colour: str


def name_ends(axes: Axes, ends: Sequence[End], **style: object) -> None:
    """Write each name where its line ends, pushed apart where the ends are near each other.

    The figure is laid out already: what lies near each other is known by the places on it.
    """
    dpi = axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    ends = sorted(ends, key=lambda end: end.y)
    heights = [float(axes.transData.transform((end.x, end.y))[1]) for end in ends]
    for end, height, place in zip(ends, heights, apart(heights, LINE * dpi / 100, axes.bbox.y1), strict=True):
        axes.annotate(
            end.name,
            (end.x, end.y),
            (8, (place - height) * 72 / dpi),
            textcoords="offset points",
            va="center",
            color=end.colour,
            **style,  # type: ignore[arg-type]
        )


def apart(heights: Sequence[float], line: float, top: float) -> list[float]:
    """Ascending `heights`, moved so that neighbours are at least a `line` apart: upwards, and where that goes
    beyond `top`, downwards."""
    places = list(heights)
    for place in range(1, len(places)):
        places[place] = max(places[place], places[place - 1] + line)
    limit = max([top, *heights[-1:]])
    for place in reversed(range(len(places))):
        places[place] = min(places[place], limit)
        limit = places[place] - line
    return places
