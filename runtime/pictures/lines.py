"""What goes on beside the load: drop rates, entropy of routers, traffic along axes; a line each, by step.

Layers are shaded by depth, the first one dark. More of them than can be told apart are a heat map, layers ×
steps. Each function gives where its lines end, to be named once places are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moec.runtime.pictures.expert_run import ExpertRun, Series
from moec.runtime.pictures.load import MOST_COLUMNS, edges_of, name_rows, step_ticks
from moec.runtime.pictures.style import COLOURS, FAINT, INK, End

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 8
DEPTH = "cividis"  # made for eyes that see all colours and for those that do not


def draw_dropped(axes: Axes, run: ExpertRun) -> list[End]:
    """The share of tokens that no expert computed, in per cent."""
    percent = {layer: Series(s.steps, 100 * s.values) for layer, s in run.dropped.items()}
    title = "Dropped, % of the tokens' choices"
    if all((series.values == 0).all() for series in percent.values()):
        title += ": none"
    return _draw_layers(axes, percent, title)


def draw_entropy(axes: Axes, run: ExpertRun) -> list[End]:
    """How undecided routers are, over log E: layers of a pyramid have different numbers of experts."""
    shares = {
        layer: Series(s.steps, s.values / math.log(run.experts[layer]))
        for layer, s in run.router_entropy.items()
        if run.experts[layer] > 1
    }
    return _draw_layers(axes, shares, "Router entropy over log E (1: undecided)", highest=1.0)


def draw_traffic(axes: Axes, run: ExpertRun) -> list[End]:
    """The bytes that all ranks sent along each axis in a step; each line says how many messages at last."""
    ends = []
    for place, (axis, series) in enumerate(run.num_bytes.items()):
        thin, colour = series.thinned(MOST_COLUMNS), COLOURS[place % len(COLOURS)]
        _draw_line(axes, thin, colour)
        messages = int(run.messages[axis].values[-1])
        ends.append(End(thin.steps[-1], thin.values[-1], f"{axis} · {messages:,} messages", colour))
    axes.set_yscale("log")
    _frame(axes, "Bytes sent in a step, by axis")
    _bytes_on(axes, run.num_bytes)
    return ends


def _draw_layers(
    axes: Axes, layers: Mapping[str, Series], title: str, highest: float | None = None
) -> list[End]:
    """A line a layer from zero up to `highest`, or as far as they go; or the map."""
    if len(layers) > MOST_LINES:
        _draw_map(axes, layers, title, highest)
        return []
    ends = []
    for (layer, series), colour in zip(layers.items(), _by_depth(len(layers)), strict=True):
        thin = series.thinned(MOST_COLUMNS)
        _draw_line(axes, thin, colour)
        ends.append(End(thin.steps[-1], thin.values[-1], layer, colour))
    axes.set_ylim(0.0, None if highest is None else 1.03 * highest)
    _frame(axes, title)
    return ends


def _draw_map(axes: Axes, layers: Mapping[str, Series], title: str, highest: float | None) -> None:
    """Layers downwards, steps to the right; its own scale of lightness."""
    thin = [series.thinned(MOST_COLUMNS) for series in layers.values()]
    edges = edges_of(thin[0].steps), np.arange(len(thin) + 1) - 0.5
    drawn = axes.pcolorfast(
        *edges, np.stack([series.values for series in thin]), cmap=DEPTH, vmin=0.0, vmax=highest
    )
    name_rows(axes, list(layers), 9)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    step_ticks(axes, thin[0].steps)
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.ax.tick_params(colors=INK, labelsize=8)


def _by_depth(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[DEPTH](0.75 * place / max(count - 1, 1))) for place in range(count)]


def _draw_line(axes: Axes, series: Series, colour: str) -> None:
    """A line; a single step is a dot."""
    mark = "o" if len(series.steps) == 1 else None
    axes.plot(series.steps, series.values, color=colour, linewidth=1.6, marker=mark, markersize=5)
    step_ticks(axes, series.steps)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.grid(color=FAINT, linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8.5)


def _bytes_on(axes: Axes, amounts: Mapping[str, Series]) -> None:
    """Ticks at 1, 2 and 5 of each power of ten that is there, spelled with their unit; room for one line."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator

    low = min(series.values.min() for series in amounts.values())
    high = max(series.values.max() for series in amounts.values())
    axes.set_ylim(low / 2, high * 2)
    steps = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    axes.yaxis.set_major_formatter(EngFormatter("B", places=0))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
