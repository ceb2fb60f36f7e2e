"""Predictions along a line: how long a program takes as ranks, batch or length grow.

sweep = swept(programs, hardware, over="batch", phase="decode", letters={"L": 1024}, numbers=[1, 2, 4, 8])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.api import place
from moec.cost.cost import Cost
from moec.cost.machine.hardware import Hardware
from moec.cost.timing.predict import predict
from moec.errors import CostError, nearest
from moec.foresight import Phase
from moec.program import Program

LETTERS = {"batch": "B", "sequence": "S", "past": "L"}
OVER = ("ranks", *LETTERS)
OF = ("latency", "throughput")


@dataclass(frozen=True)
class Point:
    """One prediction: seconds of a run, its tokens on all ranks together, and whether it fits into memory."""

    at: int
    seconds: float
    tokens: int
    fits: bool

    def of(self, what: str) -> float:
        """`latency` in seconds, or `throughput` in tokens a second of all ranks together."""
        return self.seconds if what == "latency" else self.tokens / self.seconds


@dataclass(frozen=True)
class Curve:
    """The points of one program."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sweep:
    """Curves over `ranks`, `batch`, `sequence` or `past`; batch and lengths are those of one rank."""

    over: str
    phase: Phase
    hardware: Hardware
    letters: Mapping[str, int]
    curves: tuple[Curve, ...]


def swept(
    programs: Mapping[str, Program],
    hardware: Hardware,
    over: str,
    phase: Phase,
    letters: Mapping[str, int],
    numbers: Sequence[int],
) -> Sweep:
    """Predict each of `programs` (by name) with every one of `numbers` for what `over` says.

    `letters`: the other sizes (`B`, `S`, `L`). Over `ranks` a program is placed anew for each number. Raises
    `CostError` for another `over` or a letter without a number, `MeshError` for more ranks than devices.
    """
    if over not in OVER:
        raise CostError("sweep", f"over = {over!r}", f"one of {', '.join(OVER)}", nearest(over, OVER))
    curves = []
    for name, program in programs.items():
        if over == "ranks":
            points = [_point(place(program, n).cost(phase), hardware, n, letters) for n in numbers]
        else:
            cost = program.cost(phase)
            points = [_point(cost, hardware, n, {**letters, LETTERS[over]: n}) for n in numbers]
        curves.append(Curve(name, tuple(points)))
    return Sweep(over, phase, hardware, dict(letters), tuple(curves))


def _point(cost: Cost, hardware: Hardware, at: int, letters: Mapping[str, int]) -> Point:
    given: dict[str, Any] = {**letters, "n": 1, "m": 1} if cost.phase == "decode" else dict(letters)
    tokens = given["B"] * given.get("S" if cost.phase != "decode" else "n", 1) * cost.mesh.data
    fits = cost.memory.fits(hardware.device.memory, **given)
    return Point(at, predict(cost, hardware, **given).seconds, tokens, fits)


def doublings(low: int, high: int) -> list[int]:
    """`low`, twice that, and so on up to `high`."""
    found = [low]
    while found[-1] * 2 <= high:
        found.append(found[-1] * 2)
    return found
