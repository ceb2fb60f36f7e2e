"""Curves as pictures, by matplotlib: log axes, every curve named where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.cost.shown.spelling import short
from moec.errors import CostError, nearest
from moec.runtime.pictures.style import COLOURS, FAINT, INK, End, name_ends, require_picture
from moec.sweep import OF, Curve, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"latency": "Seconds", "throughput": "Tokens a second"}
AXES = {
    "ranks": "ranks",
    "batch": "sequences of a rank",
    "sequence": "tokens of a sequence",
    "past": "positions in the cache",
}
RUNS = {"training": "a training step", "forward": "a forward run", "decode": "one step of decoding"}


def require_drawable(path: str | Path, of: str) -> None:
    """Refuse what cannot be drawn: another kind of file or amount, or no matplotlib. Raises `CostError`."""
    if of not in OF:
        raise CostError("plot", f"of = {of!r}", f"one of {', '.join(OF)}", nearest(of, OF))
    require_picture(path, CostError)


def draw(sweep: Sweep, of: str, path: str | Path) -> Path:
    """Write a picture of `latency` or `throughput`; points that do not fit into memory are hollow.

    Raises `CostError` as `require_drawable` does.
    """
    require_drawable(path, of)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for place, curve in enumerate(sweep.curves):
        _draw_curve(axes, curve, of, COLOURS[place % len(COLOURS)])
    _label(axes, sweep, of)
    figure.draw_without_rendering()  # places are known from here on
    name_ends(axes, [_end(curve, of, place) for place, curve in enumerate(sweep.curves)])
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_curve(axes: Axes, curve: Curve, of: str, colour: str) -> None:
    at, amounts = [point.at for point in curve.points], [point.of(of) for point in curve.points]
    axes.plot(at, amounts, color=colour, linewidth=1.8, zorder=2)
    for point, amount in zip(curve.points, amounts, strict=True):
        inside = colour if point.fits else "white"
        axes.plot(point.at, amount, "o", markersize=5.5, color=colour, markerfacecolor=inside, zorder=3)


def _end(curve: Curve, of: str, place: int) -> End:
    last = curve.points[-1]
    return End(last.at, last.of(of), curve.name, COLOURS[place % len(COLOURS)])


def _label(axes: Axes, sweep: Sweep, of: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({point.at for curve in sweep.curves for point in curve.points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    unit = "s" if of == "latency" else ""
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda amount, _: short(amount, unit)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(AXES[sweep.over], color=INK)
    axes.set_title(_title(sweep, of), loc="left", fontsize=10.5, color=INK)
    axes.grid(color=FAINT, linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    _note(axes, sweep)


def _title(sweep: Sweep, of: str) -> str:
    sizes = ", ".join(f"{name} = {number:,}" for name, number in sweep.letters.items())
    place = f"{sweep.hardware.device.name}{f', {sizes}' if sizes else ''}"
    return f"{TITLES[of]} of {RUNS[sweep.phase]}, predicted: {place}"


def _note(axes: Axes, sweep: Sweep) -> None:
    """What hollow points mean, where there are any."""
    if all(point.fits for curve in sweep.curves for point in curve.points):
        return
    style: dict[str, Any] = {"fontsize": 9, "color": INK, "ha": "right", "transform": axes.transAxes}
    axes.text(1.0, 0.02, "hollow: does not fit into memory", **style)
