"""The load of experts as heat maps: what each expert got, over what it would get if all got the same.

Blue got less, white is balanced, orange got more; each shade is a factor, so half and double are equally far
from white. One colour scale for all layers and steps of a picture. An expert that got nothing is black.
Blue and orange are told apart by all, and lightness falls on both sides.

Legend: N columns (steps), E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.pictures.expert_run import Series
from moec.runtime.pictures.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import SubFigure

MOST_PANELS = 12  # layers with a panel each
MOST_COLUMNS = 240  # steps beside each other; more are averaged
SHADES = (
    "#12457d", "#2f73b0", "#6fa8d3", "#bcd7ea", "#f7f7f5", "#f7cfa4", "#e6954d", "#b8601a", "#733a0b",
)  # fmt: skip
NONE, ABSENT = "#000000", "#e3e3e3"


def shades() -> Colormap:
    """Blue, white, orange; black below all of them."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("load", SHADES).with_extremes(under=NONE, bad=ABSENT)


@dataclass(frozen=True)
class Scale:
    """Colours from 1/`factor` to `factor` times the mean; what is beyond is at the end, and zero below it,
    where some expert got nothing (`idle`)."""

    factor: float
    idle: bool = False

    @property
    def drawn(self) -> dict[str, Any]:
        """How matplotlib draws by it."""
        from matplotlib.colors import LogNorm

        return {"norm": LogNorm(1 / self.factor, self.factor), "cmap": shades()}

    def shown(self, load: NDArray[np.float64]) -> NDArray[np.float64]:
        """Loads as they are drawn."""
        inside = np.clip(load, 1 / self.factor, self.factor)
        return np.where(load > 0, inside, 0.5 / self.factor)


def scale_of(load: Mapping[str, Series]) -> Scale:
    """As far as all but a hundredth of the loads go, to the next power of two: 2 at least, 8 at most."""
    values = np.concatenate([series.values.ravel() for series in load.values()])
    used = values[values > 0]
    far = float(np.quantile(np.abs(np.log2(used)), 0.99)) if len(used) else 0.0
    return Scale(2.0 ** min(3, max(1, math.ceil(round(far, 6)))), idle=len(used) < len(values))


def draw_panels(figure: SubFigure, load: Mapping[str, Series]) -> None:
    """A panel for each layer: experts upwards, steps to the right."""
    columns = 1 if len(load) <= 3 else 2 if len(load) <= 8 else 3
    rows = -(-len(load) // columns)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    scale, drawn = scale_of(load), None
    for axes, (layer, series) in zip(grid.T.flat, load.items(), strict=False):
        drawn = _draw_panel(axes, layer, series, scale)
    for axes in grid.T.flat[len(load) :]:
        axes.set_axis_off()
    for column in grid.T:
        used = [axes for axes in column if axes.axison]
        used[-1].set_xlabel("step", color=INK)
        used[-1].tick_params(labelbottom=True)
    _draw_scale(figure, drawn, list(grid.flat), scale)


def _draw_panel(axes: Axes, layer: str, series: Series, scale: Scale) -> ScalarMappable:
    from matplotlib.ticker import MaxNLocator

    thin = series.thinned(MOST_COLUMNS)
    experts = thin.values.shape[1]
    edges = edges_of(thin.steps), np.arange(experts + 1) - 0.5
    drawn = axes.pcolorfast(*edges, scale.shown(thin.values.T), **scale.drawn)
    axes.set_title(f"{layer} · {experts} experts", loc="left", fontsize=9.5, color=INK)
    axes.set_ylabel("expert", color=INK, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(colors=INK, labelsize=8.5)
    step_ticks(axes, thin.steps)
    return drawn


def edges_of(steps: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Where the column of each step begins and ends, [N + 1]: halfway to its neighbours."""
    at = np.asarray(steps, dtype=np.float64)
    if len(at) == 1:
        return at[0] + np.array([-0.5, 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.concatenate([[at[0] - (middle[0] - at[0])], middle, [at[-1] + (at[-1] - middle[-1])]])


def step_ticks(axes: Axes, steps: NDArray[np.int64]) -> None:
    """Whole numbers of steps; a single one is named itself."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if len(steps) == 1:
        axes.set_xticks(steps)


def _draw_scale(figure: SubFigure, drawn: Any, panels: list[Axes], scale: Scale) -> None:
    """The colours, with what they say; balance has its line."""
    top = round(math.log2(scale.factor))
    ticks = [2.0**power for power in range(-top, top + 1)]
    extend = "min" if scale.idle else "neither"
    bar = figure.colorbar(drawn, ax=panels, extend=extend, fraction=0.04, pad=0.015, aspect=28)
    bar.set_ticks(ticks, labels=[_factor(tick) for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.axhline(1.0, color=INK, linewidth=1.2)
    bar.ax.tick_params(colors=INK, labelsize=8.5)
    if scale.idle:
        below: dict[str, Any] = {"transform": bar.ax.transAxes, "ha": "center", "va": "top"}
        bar.ax.text(0.5, -0.065, "no rows", color=INK, fontsize=8.5, **below)
    bar.set_label("load over the mean", color=INK, fontsize=9)


def _factor(tick: float) -> str:
    if tick == 1.0:
        return "balanced"
    return f"{tick:.0f}×" if tick > 1 else f"1/{1 / tick:.0f}"


def draw_many(figure: SubFigure, load: Mapping[str, Series]) -> None:
    """Too many layers for a panel each: layers × experts after four of the steps, spread evenly."""
    first = next(iter(load.values()))
    places = sorted({round(place) for place in np.linspace(0, len(first.steps) - 1, 4)})
    grid = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
    scale = scale_of(load)
    widest = max(series.values.shape[1] for series in load.values())
    for axes, place in zip(grid, places, strict=True):
        drawn = _draw_moment(axes, load, int(first.steps[place]), widest, scale)
    name_rows(grid[0], list(load), 15)
    _draw_scale(figure, drawn, list(grid), scale)


def name_rows(axes: Axes, layers: Sequence[str], most: int) -> None:
    """Layers downwards, the first one on top; at most so many of the names."""
    every = -(-len(layers) // most)
    axes.set_yticks(range(0, len(layers), every), layers[::every])
    axes.set_ylim(len(layers) - 0.5, -0.5)


def _draw_moment(
    axes: Axes, load: Mapping[str, Series], step: int, widest: int, scale: Scale
) -> ScalarMappable:
    from matplotlib.ticker import MaxNLocator

    shown = np.full((len(load), widest), np.nan)  # layers of a pyramid have fewer experts than others
    for row, series in enumerate(load.values()):
        values = series.values[np.searchsorted(series.steps, step).clip(max=len(series.steps) - 1)]
        shown[row, : len(values)] = scale.shown(values)
    edges = np.arange(widest + 1) - 0.5, np.arange(len(load) + 1) - 0.5
    drawn = axes.pcolorfast(*edges, np.ma.masked_invalid(shown), **scale.drawn)
    axes.set_facecolor(ABSENT)
    axes.set_title(f"after step {step:,}", loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("expert", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(colors=INK, labelsize=8)
    return drawn
