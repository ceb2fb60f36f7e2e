"""Hardware files: what they may say, what is refused and how, and what a device makes of work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.cost import Device, Hardware, Link, Operation, Way
from moec.cost.machine.hardware import SHIPPED
from moec.errors import MeshError, PlanError
from moec.runtime.ops.work import Product, Work
from tests.cost.clusters import devices

TEXT = """per_node = 2
nodes = 3

[device]
name = "small"
memory = 1e9
bandwidth = 1e9
launch = 1e-6
peak = { float32 = 1e12 }

[inside]
latency = 1e-6
bandwidth = 1e9

[between]
latency = 2e-6
bandwidth = 1e8
"""


def refused(text: str) -> PlanError:
    with pytest.raises(PlanError) as error:
        Hardware.from_text(text, "small.toml")
    return error.value


def test_a_file_says_all_of_it() -> None:
    hardware = Hardware.from_text(TEXT)
    assert (hardware.world, hardware.nodes, hardware.device.peak) == (6, 3, {"float32": 1e12})
    assert hardware.device.seconds(Work((), 500, 500), operation(), "forward") == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("old", "new", "where", "found", "nearest"),
    [
        (
            "bandwidth = 1e9\nlaunch",
            "bandwith = 1e9\nlaunch",
            "small.toml:7: device.bandwith",
            "bandwith",
            "bandwidth",
        ),
        ("launch = 1e-6\n", "", "small.toml:4: device.launch", "no 'launch'", ""),
        ("float32", "float31", "small.toml:9: device.peak", "float31", "float32"),
        ("float32 = 1e12", "float32 = 0.0", "small.toml:9: device.peak.float32", "float32 = 0", ""),
        ("{ float32 = 1e12 }", "{ }", "small.toml:9: device.peak", "no dtype", ""),
        ("bandwidth = 1e8", "bandwidth = 0.0", "small.toml:17: between.bandwidth", "0.0", ""),
        ("nodes = 3", "nodes = 0", "small.toml:2: nodes", "nodes = 0", ""),
        ("nodes = 3", 'nodes = "3"', "small.toml:2: nodes", "nodes", ""),
        ("nodes = 3", "nodes = 3\ncards = 3", "small.toml:3: cards", "cards = 3", ""),
        ("[between]\nlatency = 2e-6\nbandwidth = 1e8\n", "", "small.toml:2: nodes", "nodes = 3", ""),
        ("[inside]", "[inside", "small.toml:11", "[inside", ""),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    old: str, new: str, where: str, found: str, nearest: str
) -> None:
    error = refused(TEXT.replace(old, new, 1))
    assert error.where.startswith(where)
    assert found in error.found
    assert nearest in error.nearest
    assert error.needed


@pytest.mark.parametrize(
    ("old", "new", "where", "nearest"),
    [
        ('algorithm = "tree"', 'algorithm = "trees"', "ways[3].algorithm", "tree"),
        ("parallel = 16", "parallel = 0", "ways[5].parallel", ""),
        ("inside = 0.47e-6", "insde = 0.47e-6", "ways[0].insde", "inside"),
        ("[[256, 128],", "[[256],", "device.tiles[0][1]", ""),
        ("[[256, 128],", "[[256, 0],", "device.tiles[0][1]", ""),
        ("[[256, 128],", "[256,", "device.tiles[0]", ""),
        ("memory = 40e9", 'memory = "40GB"', "device.memory", ""),
        ("units = 108", "units = 108.5", "device.units", ""),
        ("product_share = 0.85", "product_share = 85", "device.product_share", ""),
    ],
)
def test_lists_and_shares_are_checked_too(old: str, new: str, where: str, nearest: str) -> None:
    text = (SHIPPED / "a100.toml").read_text(encoding="utf-8")
    assert old in text
    error = refused(text.replace(old, new, 1))
    assert f": {where}" in error.where
    assert nearest in error.nearest


@pytest.mark.parametrize(
    ("algorithm", "operator", "found", "nearest"),
    [
        ("direct", "moec.exchnge", "'moec.exchnge'", "'moec.exchange'"),
        ("tree", "moec.exchange", "does not go by tree", ""),
        ("ring", "all_to_all_single", "does not go by ring", ""),
    ],
)
def test_a_way_that_no_collective_would_take(algorithm: str, operator: str, found: str, nearest: str) -> None:
    """It would never be taken, and times would be told as if it were not there."""
    way = f'[[ways]]\nname = "ours"\nalgorithm = "{algorithm}"\ninside = 0.0\noperators = ["{operator}"]\n'
    error = refused(TEXT + way)
    assert "ways[0].operators" in error.where
    assert found in error.found
    assert nearest in error.nearest


@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED.glob("*.toml")))
def test_every_shipped_file_is_read_and_makes_clusters(name: str) -> None:
    hardware = Hardware.shipped(name)
    assert Hardware.shipped(f"{name}x256").world == 256
    assert Hardware.named(f"{name}x64.toml") == Hardware.named(f"{name}x64") == hardware.with_world(64)
    assert hardware.with_world(4).per_node == 4
    assert name in Hardware.shipped_names()


def test_every_number_of_a_shipped_file_has_a_comment_near_it() -> None:
    for file in SHIPPED.glob("*.toml"):
        block = file.read_text().split("[device]")[1].split("[inside]")[0].splitlines()
        commented = False
        for line in block:
            name = line.partition(" =")[0]
            if line and not line.startswith("#") and name not in ("name", "tiles"):
                assert "#" in line or commented, f"{file.name}: where does {name} come from?"
            commented = line.startswith("#")


def test_a_name_that_is_not_there_tells_the_nearest() -> None:
    with pytest.raises(PlanError, match="nearest 'a100'"):
        Hardware.shipped("a10x8")
    with pytest.raises(PlanError, match="nearest 'h100'"):
        Hardware.shipped("H100x16")
    with pytest.raises(PlanError, match="no such file"):
        Hardware.named("nowhere/a100.toml")


def test_devices_come_in_nodes() -> None:
    with pytest.raises(MeshError, match="multiple or a divisor of 8"):
        Hardware.shipped("a100x12")
    alone = Hardware.shipped("a100").model_copy(update={"between": None})
    with pytest.raises(MeshError, match="what connects nodes"):
        alone.with_world(16)
    with pytest.raises(MeshError, match="9, one for each rank"):
        alone.require_world(9)
    alone.require_world(8)


def test_cards_are_shared_by_the_devices_of_a_node() -> None:
    hardware = Hardware.from_text(TEXT.replace("nodes = 3", "nodes = 3\ncards = 1"))
    assert hardware.card_bandwidth == 0.5e8
    assert hardware.with_world(2).cards == hardware.with_world(1).cards == 1


def operation(dtype: str = "float32", kind: str = "product", weights: float = 0.0) -> Operation:
    return Operation("one", "", None, "aten::linear", kind, dtype, weights=weights)


def product(m: float, n: float, k: float, groups: float = 1, along: str = "m") -> Work:
    return Work((Product(m, n, k, groups, along),), m * k, m * n)


def test_a_dtype_without_a_peak_is_refused_where_it_multiplies() -> None:
    device = Hardware.from_text(TEXT).device
    with pytest.raises(PlanError, match="bfloat16"):
        device.seconds(product(2, 2, 2), operation("bfloat16"), "forward")
    assert device.seconds(Work((), 8, 8), operation("int64"), "forward") > 0


def test_a_view_takes_no_time() -> None:
    assert Hardware.from_text(TEXT).device.seconds(Work(calls=0), operation(), "forward") == 0


def plain(**more: object) -> Device:
    return Device(name="plain", memory=1e9, bandwidth=1e30, launch=0.0, peak={"float32": 1e12}, **more)


def test_tiles_that_are_not_full_take_as_long_as_full_ones() -> None:
    device = plain(units=4, tiles=((64, 64),))
    whole = device.seconds(product(128, 128, 512), operation(), "forward")
    assert whole == pytest.approx(2 * 128 * 128 * 512 / 1e12)
    assert device.seconds(product(65, 65, 512), operation(), "forward") == whole
    more = device.seconds(product(129, 128, 512), operation(), "forward")
    assert more == pytest.approx(2 * whole), "a second wave, of which two of four units are busy"


def test_units_that_would_be_idle_share_a_long_k() -> None:
    device = plain(units=4, tiles=((64, 64),))
    long, short = product(64, 64, 1024), product(64, 64, 64)
    assert device.seconds(long, operation(), "forward") == pytest.approx(long.flops / 1e12)
    assert device.seconds(short, operation(), "forward") == pytest.approx(4 * short.flops / 1e12)


def test_rows_of_a_group_do_not_fill_another_groups_tile() -> None:
    device = plain(units=1, tiles=((64, 64),))
    together = device.seconds(product(64, 64, 64), operation(), "forward")
    apart = device.seconds(product(64, 64, 64, groups=8), operation(), "forward")
    assert apart == pytest.approx(8 * together)


def test_small_tiles_wait_for_the_cache() -> None:
    slow = plain(units=1, tiles=((64, 64),), cache_bandwidth=1e9)
    found = slow.seconds(product(64, 64, 100), operation(), "forward")
    assert found == pytest.approx(128 * 4 * 100 / 1e9)


def test_what_fits_the_cache_comes_from_it_but_weights_do_not() -> None:
    device = Device(
        name="two levels",
        memory=1e9,
        bandwidth=1e9,
        launch=0.0,
        peak={"float32": 1e30},
        cache=1000,
        cache_bandwidth=1e10,
    )
    work = Work((), 800, 200)
    assert device.seconds(work, operation(), "forward") == pytest.approx(1e-7)
    assert device.seconds(work, operation(weights=800), "forward") == pytest.approx(8e-7 + 2e-8)
    assert device.seconds(replace(work, read=801), operation(), "forward") == pytest.approx(1.001e-6)
    assert device.seconds(work, operation(), "backward") == pytest.approx(1e-6)
    assert device.seconds(work, operation(kind="attention"), "forward") == pytest.approx(1e-6)


sizes = st.integers(1, 3000)


@given(devices(), sizes, sizes, sizes, st.integers(1, 8), st.integers(0, 3), st.integers(1, 500))
def test_more_of_anything_is_never_faster(
    device: Device, m: int, n: int, k: int, groups: int, which: int, more: int
) -> None:
    larger = [m, n, k, groups]
    larger[which] += more
    before, after = work_of(m, n, k, groups), work_of(*larger)
    one = operation()
    assert device.seconds(after, one, "forward") >= device.seconds(before, one, "forward") * (1 - 1e-9)


def work_of(m: int, n: int, k: int, groups: int) -> Work:
    """`groups` products of m rows each."""
    rows = m * groups
    return Work((Product(rows, n, k, groups),), 4.0 * (rows * k + groups * n * k), 4.0 * rows * n)


@given(devices(), sizes, sizes, sizes, st.floats(1.0, 10.0))
def test_a_faster_device_is_never_slower(device: Device, m: int, n: int, k: int, factor: float) -> None:
    work, one = work_of(m, n, k, 1), operation()
    before = device.seconds(work, one, "forward")
    for update in (
        {"bandwidth": device.bandwidth * factor},
        {"peak": {name: speed * factor for name, speed in device.peak.items()}},
        {"launch": device.launch / factor},
        {"cache": device.cache * factor},
    ):
        assert device.model_copy(update=update).seconds(work, one, "forward") <= before * (1 + 1e-9), update


@given(devices(), sizes, sizes, sizes)
def test_no_product_is_faster_than_its_peak(device: Device, m: int, n: int, k: int) -> None:
    work = work_of(m, n, k, 1)
    found = device.seconds(work, operation(), "forward")
    assert found >= work.flops / device.peak["float32"] * (1 - 1e-9)


def test_the_page_describes_every_key() -> None:
    page = (Path(__file__).parents[3] / "docs" / "hardware.md").read_text(encoding="utf-8")
    sections = {"": Hardware, "device.": Device, "inside.": Link, "between.": Link, "ways.": Way}
    for prefix, section in sections.items():
        for key in section.model_fields:
            if key not in ("device", "inside", "between", "ways"):
                assert f"`{prefix}{key}`" in page, f"{prefix}{key}"
