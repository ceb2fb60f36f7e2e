"""Messages between two processes of this machine: every collective has a way that predictions take."""

from __future__ import annotations

import pytest

from moec.calibration.links import QUICK, Between, Messages, _fitted, measure_links
from moec.cost.machine.device import Device
from moec.cost.machine.hardware import Hardware
from moec.cost.timing.arranged import Spread
from moec.cost.timing.collectives import PATTERNS, collective_seconds, ways_of


@pytest.fixture(scope="module")
def between() -> Between:
    return measure_links(Messages(2, QUICK, 4, ()))


def test_every_collective_has_a_way_of_its_own(between: Between) -> None:
    device = Device(name="core", memory=1e9, bandwidth=1e10, launch=1e-6, peak={"float32": 1e11})
    hardware = Hardware(device=device, inside=between.link, per_node=2, ways=between.ways)
    spread = Spread(ranks=2, fewest=2, most=2, nodes=1)
    for operator in PATTERNS:
        (way,) = ways_of(hardware, operator)
        assert operator in way.operators
        few, many = (collective_seconds(hardware, operator, spread, 1, size) for size in (1e3, 1e7))
        assert 0 < few < many < 10


def test_a_start_and_a_rate_are_found_again() -> None:
    start, bandwidth = _fitted([(1e3, 1e-4), (1e5, 1e-4 + 1e-4), (1e6, 1e-4 + 1e-3)])
    assert start == 1e-4
    assert bandwidth == pytest.approx(1e9)
