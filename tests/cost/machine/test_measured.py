"""Measured times: exact where they were taken, sensible between and beyond, and refused when damaged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.cost import Device, Hardware, Operation
from moec.cost.machine.measured import (
    VERSION,
    About,
    Grid,
    Line,
    Measured,
    beside_products,
    interpolate,
    monotone,
)
from moec.errors import PlanError
from moec.runtime.ops.work import NOTHING, Product, Work

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=4, unique=True).map(
    lambda sizes: [float(size) for size in sorted(sizes)]
)
AXES = st.lists(SIZES, min_size=1, max_size=3)
SHARES = st.floats(0.0, 1.0)


@st.composite
def grids(draw: st.DrawFn, *, grows: bool = False) -> tuple[list[list[float]], list[float]]:
    """Axes and a time for every combination; `grows`: no size takes less than a smaller one."""
    axes = draw(AXES)
    count = len(list(itertools.product(*axes)))
    times = draw(st.lists(st.floats(1e-7, 1.0), min_size=count, max_size=count))
    return axes, monotone([len(axis) for axis in axes], times) if grows else times


@given(grids(grows=True))
def test_what_was_measured_is_met(grid: tuple[list[list[float]], list[float]]) -> None:
    axes, times = grid
    for at, time in zip(itertools.product(*axes), times, strict=True):
        assert interpolate(axes, times, at) == pytest.approx(time, rel=1e-12)


@given(grids())
def test_times_that_grow_are_kept(grid: tuple[list[list[float]], list[float]]) -> None:
    axes, times = grid
    shape = [len(axis) for axis in axes]
    once = monotone(shape, times)
    assert monotone(shape, once) == pytest.approx(once, rel=1e-12)
    assert min(times) <= min(once) * (1 + 1e-12)
    assert max(once) <= max(times) * (1 + 1e-12)


@given(grids(), st.data())
def test_more_never_takes_less(grid: tuple[list[list[float]], list[float]], data: st.DataObject) -> None:
    axes, raw = grid
    times = monotone([len(axis) for axis in axes], raw)
    sizes = st.lists(st.floats(0.0, 20000.0), min_size=len(axes), max_size=len(axes))
    some, more = data.draw(sizes), data.draw(sizes)
    larger = [max(a, b) for a, b in zip(some, more, strict=True)]
    assert interpolate(axes, times, larger) >= interpolate(axes, times, some) * (1 - 1e-9) >= 0


@given(st.floats(1e-6, 1e-3), st.floats(1e-12, 1e-9), st.floats(20.0, 4000.0), st.floats(20.0, 4000.0))
def test_a_start_and_a_rate_are_met_between(start: float, rate: float, m: float, n: float) -> None:
    axes: list[list[float]] = [[16.0, 4096.0], [16.0, 4096.0], [64.0]]
    times = [start + rate * one * other * 64 for one, other in itertools.product(*axes[:2])]
    assert interpolate(axes, times, [m, n, 64.0]) == pytest.approx(start + rate * m * n * 64, rel=1e-9)


def test_beyond_the_largest_it_goes_on_in_proportion() -> None:
    assert interpolate([[2.0, 4.0]], [3.0, 5.0], [8.0]) == 10.0
    assert interpolate([[2.0, 4.0]], [3.0, 5.0], [1.0]) == 3.0


def grid(near: Sequence[float] = (1e-6, 2e-6), far: Sequence[float] = (3e-6, 4e-6)) -> Grid:
    return Grid(m=[1.0, 8.0], n=[16.0], k=[16.0], near=list(near), far=list(far))


def measured(**changed: Any) -> Measured:
    line = Line(bytes=[0.0, 1000.0], seconds=[1e-6, 3e-6])
    about = About(
        machine="a machine", threads=1, torch="2", moec="0", date="today", command="x", wall_over_busy=1.0
    )
    backward = Grid(m=[16.0], n=[16.0], k=[1.0, 8.0], near=[1e-6, 2e-6], far=[1e-6, 2e-6])
    known = {
        "version": VERSION,
        "about": about,
        "caches": Line(bytes=[1e6, 1e8], seconds=[1e-11, 4e-11]),
        "products": {"torch": grid(), "torch backward": backward, "moec": grid(), "moec backward": backward},
        "attention": {name: grid() for name in ("forward", "backward", "one query")},
        "operators": {
            name: {"forward": line, "backward": line, "inference": line}
            for name in ("aten::add", "aten::linear", "aten::view", "moec::grouped_linear")
        },
    }
    return Measured(**(known | changed))


def device(known: Measured) -> Device:
    return Device(
        name="small", memory=1e9, bandwidth=1e9, launch=1e-6, peak={"float32": 1e12}, measured=known
    )


def operation(operator: str, dtype: str = "float32") -> Operation:
    return Operation("", "", None, operator, "pointwise", dtype)


def test_an_operator_is_told_by_its_bytes() -> None:
    work = Work((), 300, 200)
    assert measured().seconds(work, "aten::add", "forward") == pytest.approx(2e-6)
    later = measured(between={"forward": 5e-6})
    assert later.seconds(work, "aten::add", "forward") == pytest.approx(7e-6)
    assert later.seconds(work, "aten::add", "backward") == pytest.approx(2e-6)


def test_a_product_is_told_by_its_shape_and_by_where_its_operands_are() -> None:
    work = Work((Product(8, 16, 16),), 0, 0)
    beside = 1e-6 + 2e-9 * 4 * 8 * 16
    assert measured().seconds(work, "aten::linear", "forward", 0.0) == pytest.approx(2e-6 + beside)
    assert measured().seconds(work, "aten::linear", "forward", 0.5) == pytest.approx(3e-6 + beside)


def test_groups_are_as_many_products() -> None:
    one, four = (Product(8 * groups, 16, 16, groups) for groups in (1, 4))
    times = [
        measured().products_seconds(Work((product,)), "moec::grouped_linear", "forward", 0.0)
        for product in (one, four)
    ]
    assert times[1] == pytest.approx(4 * times[0])
    gradient = Work((Product(16, 16, 32, 4, along="k"),))
    found = measured().products_seconds(gradient, "moec::grouped_linear", "backward", 0.0)
    assert found == pytest.approx(4 * 2e-6)


def test_the_gradient_of_a_bias_is_beside_the_products() -> None:
    products = (Product(32, 8, 16), Product(16, 8, 32))
    assert beside_products(Work(products, 1, 1, 2), "aten::linear", "backward") == 0
    assert beside_products(Work(products, 1, 1, 3), "aten::linear", "backward") == 4 * 16 * 32


@given(SHARES.map(lambda share: 1e6 + share * 2e8))
def test_the_share_from_memory_grows_with_what_is_touched(working: float) -> None:
    share = measured().far_share(working)
    assert 0.0 <= measured().far_share(working / 2) <= share <= 1.0
    assert measured().far_share(1e4) == 0.0
    assert measured().far_share(1e12) == 1.0


def test_a_device_asks_what_was_measured_first() -> None:
    here = device(measured())
    work = Work((), 300, 200)
    assert here.seconds(work, operation("aten::add"), "forward", 0.0) == pytest.approx(2e-6)
    assert here.seconds(NOTHING, operation("aten::view"), "forward", 0.0) == pytest.approx(1e-6)
    assert not here.knows(operation("aten::gelu"), "forward")
    assert here.seconds(work, operation("aten::gelu"), "forward", 0.0) == pytest.approx(1.5e-6)
    half = replace(operation("aten::add"), dtype="float16")
    assert not here.knows(half, "forward")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"version": 99}, "version 99"),
        ({"caches": {"bytes": [2.0, 1.0], "seconds": [1.0, 1.0]}}, "[2.0, 1.0]"),
        ({"caches": {"bytes": [1.0, 2.0], "seconds": [1.0]}}, "1 times"),
        ({"caches": {"bytes": [1.0], "seconds": [-1.0]}}, "-1.0 s"),
    ],
)
def test_files_that_are_old_or_damaged_are_refused(changed: dict[str, Any], found: str) -> None:
    with pytest.raises(PlanError) as error:
        measured(**changed)
    assert found in error.value.found
    assert "moec calibrate" in error.value.nearest


@pytest.mark.parametrize("table", ["products", "attention"])
def test_what_a_program_would_ask_for_in_vain_is_missed_at_once(table: str) -> None:
    """Of a file that was cut off, which still is TOML."""
    whole = getattr(measured(), table)
    *kept, last = whole
    with pytest.raises(PlanError) as error:
        measured(**{table: {name: whole[name] for name in kept}})
    assert error.value.found == f"no '{last}'"
    assert "moec calibrate" in error.value.nearest


def test_directions_are_known() -> None:
    line = Line(bytes=[0.0], seconds=[1e-6])
    for wrong in ({"operators": {"aten::add": {"forwards": line}}}, {"between": {"forwards": 1e-6}}):
        with pytest.raises(PlanError) as error:
            measured(**wrong)
        assert (error.value.found, error.value.nearest) == ("unknown key 'forwards'", "'forward'")


def test_a_file_is_read_back_as_it_was_written() -> None:
    from moec.calibration.written import to_toml

    link = {"latency": 1e-4, "bandwidth": 1e9}
    hardware = Hardware.model_validate({"device": device(measured()), "inside": link})
    assert Hardware.from_text(to_toml(hardware)) == hardware
