"""`calibrate()`: this machine as a hardware file, with the times of operators."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import moec
from moec.cost.machine.device import Device
from moec.cost.machine.hardware import Hardware
from moec.cost.machine.link import Link
from moec.cost.machine.measured import VERSION, About, Grid, Line, Measured

from . import grids, links, optimizer, references
from .clock import Stopwatch
from .grids import Sizes
from .links import Between, Messages
from .operators import Sight, Sights, lines
from .references import Shape

Told = Callable[[str], object]


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    sizes: Sizes
    programs: Sequence[str]
    shapes: Sequence[Shape]
    weights: Sequence[int]
    messages: Sequence[int]
    runs: int
    rounds: int
    patience: float = 0.25


FULL = Effort(Sizes(), tuple(references.PLANS), references.SHAPES, optimizer.SIZES, links.SIZES, 6, 40)
QUICK = Effort(grids.QUICK, ("dense", "top-1"), references.QUICK, optimizer.QUICK, links.QUICK, 3, 8, 0.0)


def calibrate(
    *, threads: int = 1, ranks: int = 2, effort: Effort = FULL, command: str = "", told: Told = lambda _: None
) -> Hardware:
    """Measure this machine, for `threads` threads of each of `ranks` processes (1: links are not measured).

    `told` hears what is being measured. Torch's number of threads is `threads` afterwards as well.
    """
    torch.set_num_threads(threads)
    watch = Stopwatch(threads, rounds=max(2, effort.runs - 2))
    told("caches")
    caches = grids.measure_caches(watch)
    told("products of matrices, by shape")
    products = grids.measure_products(watch, effort.sizes)
    told("attention, by shape")
    attention = grids.measure_attention(watch, effort.sizes)
    known = _measured(watch, caches, products, attention, command)
    between = _ALONE
    if ranks > 1:
        told(f"messages between {ranks} processes")
        shapes = effort.shapes[1::2]
        between = links.measure_links(Messages(ranks, effort.messages, effort.rounds, shapes))
    measured = _with_operators(watch, known, between.seen, effort, told)
    return Hardware(device=_device(measured), inside=between.link, per_node=ranks, ways=between.ways)


_ALONE = Between(Link(latency=0.0, bandwidth=1.0), (), ())  # one rank sends nothing


def _with_operators(
    watch: Stopwatch, known: Measured, of_ranks: Sequence[Sight], effort: Effort, told: Told
) -> Measured:
    sights = Sights(watch, effort.runs, effort.patience)
    for name, shape, program in references.references(effort.shapes, effort.programs):
        told(f"operators of a {name} program, width {shape.width}")
        sights.look_at(program, shape)
    told("optimizer")
    found = lines(of_ranks, known) | lines(sights.seen, known)
    operators = found | optimizer.measure_optimizer(watch, effort.weights)
    about = known.about.model_copy(update={"wall_over_busy": round(watch.wall_over_busy, 3)})
    between = sights.seconds_between()
    return known.model_copy(update={"operators": operators, "between": between, "about": about})


def _measured(
    watch: Stopwatch, caches: Line, products: dict[str, Grid], attention: dict[str, Grid], command: str
) -> Measured:
    about = About(
        machine=_processor(),
        threads=watch.threads,
        torch=torch.__version__,
        moec=moec.__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=command,
        wall_over_busy=watch.wall_over_busy,
    )
    return Measured(
        version=VERSION, about=about, caches=caches, products=products, attention=attention, operators={}
    )


def _device(measured: Measured) -> Device:
    """The device in the terms of the roofline, which what was not measured goes by."""
    best = max(
        2.0 * m * n * k / seconds
        for grid in measured.products.values()
        for (m, n, k), seconds in zip(grid.shapes(), grid.near, strict=True)
    )
    start = min(measured.operators["aten::add"]["inference"].seconds)
    stream = measured.operators["aten::_fused_adamw_"]["forward"]
    return Device(
        name=measured.about.machine,
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bandwidth=stream.bytes[-1] / stream.seconds[-1],
        launch=start,
        peak={"float32": best},
        measured=measured,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines_ = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines_ if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
