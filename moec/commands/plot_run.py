"""`moec plot RUN`: what experts, routers and ranks did in a training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from moec.commands.screen import show, show_table
from moec.cost.shown.spelling import short
from moec.errors import CostError
from moec.runtime.pictures.expert_run import ExpertRun, Series, is_run, read_run
from moec.runtime.pictures.experts import OF, draw_experts, require_drawable_run, save_picture


def means_run(model: str, of: str | None) -> bool:
    """Whether the folder of a training is meant: it is one, or something is asked that only it has."""
    return is_run(model) or of in OF


def plot_run(
    folder: str, of: str, out: str, layers: Sequence[str], foreign: Mapping[str, object | None]
) -> None:
    """Write the picture, and print the last numbers that are in it.

    `foreign`: options that are about predictions; one that was given is refused.
    """
    given = [option for option, value in foreign.items() if value]
    if given:
        raise CostError(given[0], f"{folder}, a training: it is not predicted", "no such option, or a model")
    require_drawable_run(out, of)
    run = read_run(folder)
    run = run.only(layers) if layers else run
    save_picture(draw_experts(run, of), out)
    _show_layers(run)
    _show_axes(run)
    show("", f"drawn in {out}")


def _show_layers(run: ExpertRun) -> None:
    """The last numbers of each layer; a dash where nothing was recorded."""
    if not run.layers:
        return
    words = ("layer", "experts", "busiest", "idle", "dropped", "router entropy")
    show_table(words, (_row(run, layer) for layer in run.layers))


def _row(run: ExpertRun, layer: str) -> tuple[object, ...]:
    load = run.load.get(layer)
    last = None if load is None else load.values[-1]
    used = ("–", "–", "–") if last is None else (len(last), f"{last.max():.2f}×", int((last == 0).sum()))
    dropped = "–" if layer not in run.dropped else f"{100 * _last(run.dropped[layer]):.1f} %"
    entropy = "–"
    if layer in run.router_entropy:
        highest = math.log(run.experts[layer])
        entropy = f"{_last(run.router_entropy[layer]):.2f} of {highest:.2f} nats"
    return layer, *used, dropped, entropy


def _show_axes(run: ExpertRun) -> None:
    """The traffic of the last step."""
    if run.num_bytes:
        show("")
        show_table(("axis", "messages", "sent in a step"), _axes(run))


def _axes(run: ExpertRun) -> Iterator[tuple[object, ...]]:
    for axis, num_bytes in run.num_bytes.items():
        yield axis, int(_last(run.messages[axis])), short(_last(num_bytes), "B")


def _last(series: Series) -> float:
    return float(series.values[-1])
