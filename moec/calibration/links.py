"""Processes of this machine that send to each other by gloo.

A collective takes a start and so many bytes a second. What ranks do beside that (rows put in order, shares of
losses) is timed as all operators are, in a program whose experts are dealt out.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes

from moec.cost.machine.link import Link, Way
from moec.cost.machine.pattern import DIRECT, PATTERNS, REDUCE
from moec.cost.timing.collectives import pattern_of
from moec.ir.mesh import WORLD, Mesh
from moec.program import Program
from moec.runtime.mesh import connected

from .clock import Stopwatch
from .operators import Sight, Sights
from .references import AXES, Shape, placed

SIZES: Sequence[int] = (1 << 10, 32 << 10, 512 << 10, 4 << 20, 16 << 20)
QUICK: Sequence[int] = (1 << 10, 256 << 10)

_SENDING = ("_c10d_functional::", "moec::exchange")
_collectives = torch.ops._c10d_functional
Call = Callable[[Tensor, int], Tensor]
_CALLS: Mapping[str, Call] = {
    "all_reduce": lambda x, ranks: _collectives.all_reduce(x, "sum", WORLD),
    "all_gather_into_tensor": lambda x, ranks: _collectives.all_gather_into_tensor(x, ranks, WORLD),
    "reduce_scatter_tensor": lambda x, ranks: _collectives.reduce_scatter_tensor(x, "sum", ranks, WORLD),
    "all_to_all_single": lambda x, ranks: _collectives.all_to_all_single(
        x, [x.numel() // ranks] * ranks, [x.numel() // ranks] * ranks, WORLD
    ),
}
Points = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Messages:
    """What is sent and how often; `shapes`: of the programs that are watched meanwhile."""

    ranks: int
    sizes: Sequence[int]
    rounds: int
    shapes: Sequence[Shape]


@dataclass(frozen=True)
class Between:
    """What was found: the link between two processes, how collectives go over it, and operators seen."""

    link: Link
    ways: tuple[Way, ...]
    seen: tuple[Sight, ...]


def measure_links(messages: Messages) -> Between:
    """Start the processes, which measure; gives what the first of them found."""
    ports = [_free_port() for _ in range(1 + len(AXES) * len(messages.shapes))]
    found: Any = get_context("spawn").SimpleQueue()
    started = start_processes(
        _run_rank, (messages, ports, found), messages.ranks, join=False, start_method="spawn"
    )
    assert started is not None
    while found.empty() and not started.join(timeout=0.2):
        pass
    points, seen = found.get()
    while not started.join():
        pass
    latency, bandwidth = _fitted(points["all_to_all_single"])
    link = Link(latency=latency / (messages.ranks - 1), bandwidth=bandwidth)
    ways = tuple(_way(name, here, link, messages.ranks) for name, here in points.items())
    return Between(link, ways, tuple(seen))


def _way(name: str, points: Sequence[tuple[float, float]], link: Link, ranks: int) -> Way:
    pattern = pattern_of(name)
    start, bandwidth = _fitted(points)
    steps = (2 if pattern == REDUCE else 1) * (ranks - 1)
    alike = [other for other, known in PATTERNS.items() if known == pattern and other not in _CALLS]
    stands_for_others = name in ("all_reduce", "all_gather_into_tensor", "all_to_all_single")
    return Way(
        name=name,
        algorithm="direct" if pattern == DIRECT else "ring",
        inside=start / steps,
        share=bandwidth / link.bandwidth,
        operators=(name, *(alike if stands_for_others else ())),
    )


def _fitted(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds of the smallest, bytes a second of larger ones beyond that); points are (bytes, seconds)."""
    start = points[0][1]
    slopes = [(seconds - start) / amount for amount, seconds in points[1:] if seconds > start]
    slowest = max(slopes[-2:], default=1e-12)
    return start, 1.0 / slowest


def _run_rank(rank: int, messages: Messages, ports: list[int], found: Any) -> None:
    ranks = messages.ranks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux: a core for each
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    with _met(Mesh(data=ranks), ports[0]):
        points = {
            name: [_point(name, call, size, messages.rounds, ranks) for size in messages.sizes]
            for name, call in _CALLS.items()
        }
    sights = Sights(Stopwatch(own=True), 5, in_step=True)
    for port, (shape, axis) in zip(ports[1:], itertools.product(messages.shapes, AXES), strict=True):
        _look(sights, shape, placed(shape, axis, ranks), rank, port)
    if rank == 0:
        found.put((points, [one for one in sights.seen if not one.operator.startswith(_SENDING)]))


def _look(sights: Sights, shape: Shape, program: Program, rank: int, port: int) -> None:
    assert program.layout is not None
    with _met(program.layout.mesh, port):
        here = program.partition(rank)
        sights.look_at_phase(here, shape, "training")
        sights.look_at_phase(here, shape, "forward")


@contextmanager
def _met(mesh: Mesh, port: int) -> Iterator[None]:
    """The ranks of `mesh`, which meet at a port of this machine and part when all are done."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with connected(mesh):
        yield
        dist.barrier()


def _point(name: str, call: Call, size: int, rounds: int, ranks: int) -> tuple[float, float]:
    """(bytes that one rank sends to others, seconds of the slower rank in a good round, though not the best).

    A program sends many messages one after the other: it is not the fastest of them that counts.
    """
    x = torch.randn(size // 4)
    times = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        _collectives.wait_tensor(call(x, ranks))
        times.append(time.perf_counter() - start)
    taken: Any = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    whole = size * (ranks - 1)
    sent = {"all_reduce": 2 * whole / ranks, "all_gather_into_tensor": whole}.get(name, whole / ranks)
    return float(sent), float(taken.quantile(0.25))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
