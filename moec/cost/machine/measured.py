"""Measured times: what `moec calibrate` found out about the operators of one device.

A product of matrices is looked up by its shape in a `Grid`, any other operator by the bytes it moves on a
`Line`; so is what an operator does beside its products. Between what was measured, times are linear in every
size, which is what a start plus so many operations and bytes is; beyond it they grow as fast as the sizes. So
nothing is negative, and no more work takes less time.

Products were measured twice: *near*, on operands that the caches still hold, and *far*, on ones that come
from memory. How much of a program comes from memory follows from the bytes of all that one run of it touches.
Lines were measured in programs, where operands are as near as they are.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from moec.errors import nearest
from moec.plan.section import Section, complaint
from moec.runtime.ops.work import Work

VERSION = 1

Direction = Literal["forward", "backward", "inference"]
"""`forward` records what backward needs; `inference` does not."""

Positive = list[float]

GRIDS = {
    "aten::linear": "torch",
    "aten::mm": "torch",
    "aten::addmm": "torch",
    "aten::matmul": "torch",
    "moec::linear": "moec",
    "moec::grouped_linear": "moec",
    "moec::moe_ffn": "moec",
}
"""Operator → the grid of the library that multiplies for it."""

PRODUCTS = tuple(f"{library}{of}" for library in ("torch", "moec") for of in ("", " backward"))
ATTENTION = "aten::scaled_dot_product_attention"
ATTENTIONS = ("forward", "backward", "one query")
"""The grids that there are; of a file that was cut off some would be missing when a program asks for them."""


class Line(Section):
    """Seconds of one operator in one direction, by bytes read and written."""

    bytes: Positive = Field(min_length=1, description="Sizes that were measured, ascending.")
    seconds: Positive = Field(description="How long each took.")

    @model_validator(mode="after")
    def _fits(self) -> Line:
        _require_ascending("bytes", self.bytes)
        _require_times("seconds", self.seconds, len(self.bytes))
        return self

    def at(self, amount: float) -> float:
        """Seconds of `amount` bytes."""
        return interpolate([self.bytes], self._times, [amount])

    @cached_property
    def _times(self) -> list[float]:
        return monotone([len(self.bytes)], self.seconds)


class Grid(Section):
    """Seconds of products by their three sizes; the last size changes first."""

    m: Positive = Field(min_length=1, description="Sizes of the first dimension, ascending.")
    n: Positive = Field(min_length=1, description="Of the second.")
    k: Positive = Field(min_length=1, description="Of the third.")
    near: Positive = Field(description="Seconds, operands in the cache.")
    far: Positive = Field(description="Seconds, operands in memory.")

    @model_validator(mode="after")
    def _fits(self) -> Grid:
        for name in ("m", "n", "k"):
            _require_ascending(name, getattr(self, name))
        for name in ("near", "far"):
            _require_times(name, getattr(self, name), len(self.m) * len(self.n) * len(self.k))
        return self

    @property
    def axes(self) -> list[Positive]:
        """The sizes, dimension by dimension."""
        return [self.m, self.n, self.k]

    def shapes(self) -> list[tuple[float, ...]]:
        """(m, n, k) of every time, in order."""
        return list(itertools.product(*self.axes))

    def seconds(self, m: float, n: float, k: float, far: float) -> float:
        """Of one product [m, k] · [k, n], the share `far` of its operands from memory."""
        return _mixed(lambda times: interpolate(self.axes, times, [m, n, k]), self._times, far)

    @cached_property
    def _times(self) -> tuple[Sequence[float], Sequence[float]]:
        shape = [len(axis) for axis in self.axes]
        return monotone(shape, self.near), monotone(shape, self.far)


class About(Section):
    """Where, when and how the times were taken."""

    machine: str = Field(description="The processor.")
    threads: int = Field(ge=1, description="Threads of torch.")
    torch: str = Field(description="Torch's version.")
    moec: str = Field(description="Moec's version.")
    date: str = Field(description="The day.")
    command: str = Field(description="What was run.")
    wall_over_busy: float = Field(
        gt=0, description="By the clock against processor time: 1 on a quiet machine."
    )


class Measured(Section):
    """All measured times of one device."""

    version: int = Field(description="Of this format.")
    about: About = Field(description="Where, when and how.")
    caches: Line = Field(description="Seconds to read one byte, by the bytes of all that is read in turn.")
    products: dict[str, Grid] = Field(description="Library → grid; `NAME backward`: gradients of weights.")
    attention: dict[str, Grid] = Field(description="Seconds of one head by queries, keys and depth.")
    operators: dict[str, dict[str, Line]] = Field(description="Operator → direction → line.")
    between: dict[str, float] = Field(
        default_factory=dict, description="Direction → seconds from one operator to the next."
    )

    @model_validator(mode="after")
    def _known(self) -> Measured:
        if self.version != VERSION:
            raise complaint(
                f"version {self.version}", f"version {VERSION}", "moec calibrate, again", ("version",)
            )
        _require_names("products", self.products, PRODUCTS)
        _require_names("attention", self.attention, ATTENTIONS)
        for name, lines in self.operators.items():
            _require_directions(lines, "operators", name)
        _require_directions(self.between, "between")
        return self

    def knows(self, operator: str, direction: Direction) -> bool:
        """Whether this operator was measured in this direction."""
        return direction in self.operators.get(operator, {})

    def far_share(self, working: float) -> float:
        """The share of operands that come from memory where a run touches `working` bytes in turn."""
        near, most = min(self.caches.seconds), max(self.caches.seconds)
        if most <= near:
            return 0.0
        return min(1.0, (self.caches.at(min(working, self.caches.bytes[-1])) - near) / (most - near))

    def seconds(self, work: Work, operator: str, direction: Direction, far: float = 0.0) -> float:
        """Of one call, the share `far` of its operands from memory; amounts are numbers.

        Raises `KeyError` for an operator that was not measured.
        """
        line, between = self.operators[operator][direction], self.between.get(direction, 0.0)
        if operator == ATTENTION and work.products:
            return between + self.attention_seconds(work, direction, far) + line.at(0.0)
        products = self.products_seconds(work, operator, direction, far)
        return between + products + line.at(beside_products(work, operator, direction))

    def products_seconds(self, work: Work, operator: str, direction: Direction, far: float) -> float:
        """Of the products of one call alone."""
        name = GRIDS.get(operator)
        if name is None:
            return 0.0
        found = 0.0
        for place, one in enumerate(work.products):
            last = direction == "backward" and place == len(work.products) - 1
            gradient = one.along == "k" or (last and operator != "moec::moe_ffn")
            groups = max(float(one.groups), 1.0)
            m, n, k = float(one.m), float(one.n), float(one.k)
            m, k = (m, k / groups) if one.along == "k" else (m / groups, k)
            grid = self.products[f"{name} backward" if gradient else name]
            found += groups * grid.seconds(m, n, k, far)
        return found

    def attention_seconds(self, work: Work, direction: Direction, far: float) -> float:
        """Of the scores and sums of one call of attention alone."""
        scores = work.products[0]
        heads = max(float(scores.groups), 1.0)
        length = float(scores.m) / heads
        name = "one query" if length <= 1 else "backward" if direction == "backward" else "forward"
        return heads * self.attention[name].seconds(length, float(scores.n), float(scores.k), far)


def beside_products(work: Work, operator: str, direction: Direction) -> float:
    """The bytes by which the time beside the products of a call is told.

    Of a linear layer it is its result, or in backward the gradient of its bias; of experts, rows that are
    gathered and passed through the formula; of all others, whatever is read and written.
    """
    if operator not in GRIDS or not work.products:
        return float(work.bytes)
    if direction == "backward" and operator not in ("moec::grouped_linear", "moec::moe_ffn"):
        weight = work.products[-1]
        biased = float(work.calls) > len(work.products)
        return 4.0 * float(weight.m) * float(weight.k) if biased else 0.0
    rows = [one for one in work.products if one.along == "m"]
    return 4.0 * sum(float(one.m) * float(one.n) for one in rows)


def interpolate(axes: Sequence[Sequence[float]], times: Sequence[float], at: Sequence[float]) -> float:
    """The time at the sizes `at`, from `times` at all combinations of the sizes on `axes`.

    Linear in every size between those measured; below them, the time of the smallest; beyond them, in
    proportion.
    """
    grown, corners = 1.0, []
    for axis, size in zip(axes, at, strict=True):
        grown *= max(1.0, size / axis[-1]) if axis[-1] > 0 else 1.0
        corners.append(_between(axis, min(max(size, axis[0]), axis[-1])))
    found = 0.0
    for corner in itertools.product(*corners):
        place, weight = 0, 1.0
        for axis, (index, share) in zip(axes, corner, strict=True):
            place, weight = place * len(axis) + index, weight * share
        if weight:
            found += weight * times[place]
    return found * grown


def monotone(shape: Sequence[int], times: Sequence[float]) -> list[float]:
    """`times` on a grid of this shape, so that no size takes less time than a smaller one.

    Where they do that already they are kept. Else each is the mean of the most that any smaller size took and
    the least that any larger one did.
    """
    return [
        (low + high) / 2 for low, high in zip(_run(shape, times, max), _run(shape, times, min), strict=True)
    ]


def _run(shape: Sequence[int], times: Sequence[float], keep: Callable[..., float]) -> list[float]:
    """The running `max` from the small sizes on, or `min` from the large ones, along every axis."""
    found, stride = list(times), 1
    for length in reversed(shape):
        places = [place for place in range(len(found)) if place // stride % length]
        for place in places if keep is max else reversed(places):
            here, source = (place, place - stride) if keep is max else (place - stride, place)
            found[here] = keep(found[here], found[source])
        stride *= length
    return found


def _between(axis: Sequence[float], size: float) -> list[tuple[int, float]]:
    """(index, share) of the sizes around `size`; shares sum to one."""
    right = min(bisect_right(axis, size), len(axis) - 1)
    left = max(right - 1, 0)
    if axis[right] == axis[left]:
        return [(right, 1.0)]
    share = (size - axis[left]) / (axis[right] - axis[left])
    return [(left, 1.0 - share), (right, share)]


def _mixed(
    seconds: Callable[[Sequence[float]], float], times: tuple[Sequence[float], Sequence[float]], far: float
) -> float:
    near = seconds(times[0])
    return near if far <= 0 else near + far * max(0.0, seconds(times[1]) - near)


def _require_ascending(name: str, sizes: Sequence[float]) -> None:
    if any(later <= former for former, later in itertools.pairwise(sizes)) or sizes[0] < 0:
        raise complaint(f"{sizes}", "sizes that grow", "moec calibrate, again", (name,))


def _require_names(table: str, found: Collection[str], names: Sequence[str]) -> None:
    wrong = sorted({*names} ^ {*found})
    if wrong:
        told = f"no '{wrong[0]}'" if wrong[0] in names else f"unknown key '{wrong[0]}'"
        raise complaint(told, f"the tables {', '.join(names)}", "moec calibrate, again", (table,))


def _require_directions(found: Collection[str], *at: str) -> None:
    known = get_args(Direction)
    for direction in found:
        if direction not in known:
            needed = f"one of {', '.join(known)}"
            raise complaint(f"unknown key '{direction}'", needed, nearest(direction, known), at)


def _require_times(name: str, times: Sequence[Any], count: int) -> None:
    if len(times) != count:
        raise complaint(f"{len(times)} times", f"{count}, one a size", "moec calibrate, again", (name,))
    if any(time < 0 for time in times):
        raise complaint(f"{min(times)} s", "times that are not negative", "moec calibrate, again", (name,))
