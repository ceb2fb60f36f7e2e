"""The latencies of the paper as a picture: what was published, what is predicted, of a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper_points import DEEPSPEED, PYTORCH

PICTURE = Path(__file__).parents[1] / "docs" / "paper_curves.svg"
_COLOURS = {PYTORCH: "#4a7d2c", DEEPSPEED: "#2f5597"}


def draw(record: dict[str, Any], out: Path = PICTURE) -> None:
    """Figures 10 and 11 of the paper side by side, as SVG or PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    scaling, sizes = figure.subplots(1, 2)
    points = list(record["points"].values())
    _scaling(scaling, [point for point in points if point["figure"] == "10"])
    _sizes(sizes, [point for point in points if point["figure"] == "11"])
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _scaling(axes: Axes, points: list[dict[str, Any]]) -> None:
    for system, colour in _COLOURS.items():
        own = [point for point in points if point["system"] == system]
        ranks = [point["ranks"] for point in own]
        for name, style, what in (("published", "o", "published"), ("seconds", "-", "predicted")):
            heights = [point[name] * 1e3 for point in own]
            axes.plot(ranks, heights, style, color=colour, label=f"{system}, {what}")
    fused = [point for point in points if point["moec"]]
    axes.plot([p["ranks"] for p in fused], [p["moec"] * 1e3 for p in fused], "--k", label="moec, predicted")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.set(title="1.3B+MoE-128 (52B)", xlabel="GPUs", ylabel="ms a token", ylim=(0, 110))
    axes.legend(frameon=False)


def _sizes(axes: Axes, points: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(point["model"] for point in points))
    for shift, (system, colour) in zip((-0.29, 0.1), _COLOURS.items(), strict=True):
        own = [point for point in points if point["system"] == system]
        places = [names.index(point["model"]) + shift for point in own]
        axes.bar(
            places, [p["published"] * 1e3 for p in own], 0.18, color=colour, label=f"{system}, published"
        )
        places = [place + 0.19 for place in places]
        heights = [point["seconds"] * 1e3 for point in own]
        axes.bar(places, heights, 0.18, color=colour, alpha=0.45, label=f"{system}, predicted")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(title="107B to 2T on 128 or 256 GPUs", ylabel="ms a token")
    axes.legend(frameon=False, fontsize=8)
