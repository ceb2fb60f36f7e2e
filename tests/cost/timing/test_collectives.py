"""How long collectives take: textbook formulas, the same in numbers and letters, and what never happens."""

from __future__ import annotations

import math

import pytest
import sympy
from hypothesis import assume, given
from hypothesis import strategies as st

from moec.cost import Hardware, Link, Way
from moec.cost.timing.arranged import Spread, arranged, even_spread, spread_of
from moec.cost.timing.collectives import (
    PATTERNS,
    collective_expression,
    collective_seconds,
    exchange_expressions,
    ways_of,
)
from moec.errors import CostError, MeshError
from moec.ir.mesh import ExpertAxes, Mesh
from tests.cost.clusters import clusters

ALPHA, BETA = 3e-6, 1e-10  # seconds of a message, seconds of a byte


def one_device_a_node(nodes: int = 64) -> Hardware:
    """Where every message pays α and every byte β: the machine of the textbooks."""
    link = Link(latency=ALPHA, bandwidth=1 / BETA)
    device = Hardware.shipped("a100").device
    return Hardware(device=device, inside=link, between=link, per_node=1, nodes=nodes)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_rings_and_pairs_are_those_of_the_literature(ranks: int) -> None:
    """Thakur, Rabenseifner and Gropp, *Optimization of Collective Communication Operations in MPICH*, 2005:
    ring all_gather (p-1) α + (p-1)/p n β, ring all_reduce twice that, pairwise all_to_all (p-1) α + n β."""
    hardware, p, n = one_device_a_node(), ranks, 1e6
    spread = even_spread(p, 1)
    part = n * (p - 1) / p
    gathered = collective_seconds(hardware, "all_gather_into_tensor", spread, p - 1, part)
    assert gathered == pytest.approx((p - 1) * ALPHA + (p - 1) / p * n * BETA)
    reduced = collective_seconds(hardware, "all_reduce", spread, 2 * (p - 1), 2 * part)
    assert reduced == pytest.approx(2 * gathered)
    exchanged = collective_seconds(hardware, "all_to_all_single", spread, p - 1, n)
    assert exchanged == pytest.approx((p - 1) * ALPHA + n * BETA)


def test_a_tree_goes_up_and_down() -> None:
    """Latency 2 log2(p), each link carries the tensor twice: once on its way up, once down."""
    way = Way(name="tree", algorithm="tree", inside=1.0, between=ALPHA)
    hardware = one_device_a_node().model_copy(update={"ways": (way,)})
    p, n = 16, 1e6
    found = collective_seconds(hardware, "all_reduce", even_spread(p, 1), 2 * (p - 1), 2 * n * (p - 1) / p)
    assert found == pytest.approx(2 * math.log2(p) * ALPHA + 2 * n * BETA)


def test_an_exchange_is_linear_in_ranks_and_less_so_by_nodes() -> None:
    """DeepSpeed-MoE, sections 5.2 and 5.3: O(p), O(G + p/G), and O(p/L) + O(L)."""
    hardware = Hardware(
        device=Hardware.shipped("a100").device,
        inside=Link(latency=ALPHA, bandwidth=1e30),
        between=Link(latency=ALPHA, bandwidth=1e30),
        per_node=8,
        nodes=16,
    )
    p, g = 128, 8
    times = {name: float(time) for name, time in exchange_expressions(hardware, p, g, 1.0).items()}
    assert times["flat"] == pytest.approx((p - g) * ALPHA), "those inside go at the same time"
    assert times["hierarchical"] == pytest.approx((g - 1 + p / g - 1) * ALPHA)
    assert times["coordinated"] == pytest.approx((p / g - 1 + g - 1) * ALPHA)


def test_a_hierarchical_exchange_sends_twice_and_wins_where_messages_are_what_costs() -> None:
    p = sympy.Symbol("p", positive=True)
    times = exchange_expressions(Hardware.shipped("a100x256"), p, 8, 65536)
    assert times["hierarchical"].subs(p, 256) < times["flat"].subs(p, 256)
    large = exchange_expressions(Hardware.shipped("a100x256"), p, 8, 10**9)
    assert large["hierarchical"].subs(p, 16) > large["flat"].subs(p, 16)


def test_groups_share_the_cards_of_their_node() -> None:
    hardware = Hardware.shipped("a100x16")
    alone = hardware.model_copy(update={"cards": 1})
    across = Spread(2, 1, 1, 2)
    assert collective_seconds(alone, "all_gather_into_tensor", across, 1, 1e9) == pytest.approx(
        8 * collective_seconds(hardware, "all_gather_into_tensor", across, 1, 1e9), rel=1e-3
    )


def test_a_ring_over_whole_nodes_uses_all_their_cards() -> None:
    hardware = Hardware.shipped("a100x16")
    whole = collective_seconds(hardware, "all_gather_into_tensor", even_spread(16, 8), 15, 1e9)
    assert whole == pytest.approx(1e9 / min(8 * 25e9, 235e9), rel=0.02)


@pytest.mark.parametrize("operator", sorted(PATTERNS))
def test_every_collective_has_a_way_on_every_shipped_machine(operator: str) -> None:
    for name in Hardware.shipped_names():
        hardware = Hardware.shipped(f"{name}x64")
        assert ways_of(hardware, operator)
        assert collective_seconds(hardware, operator, even_spread(64, 8), 63, 1e6) > 0


def test_a_way_that_names_an_operator_is_that_operators_alone() -> None:
    general = Way(name="ring", algorithm="ring", start=1.0, inside=0.0)
    own = Way(name="gloo", algorithm="ring", start=5.0, operators=("all_reduce",), inside=0.0)
    hardware = one_device_a_node().model_copy(update={"ways": (general, own)})
    assert ways_of(hardware, "all_reduce") == [own]
    assert ways_of(hardware, "reduce_scatter_tensor") == [general]
    assert [way.algorithm for way in ways_of(hardware, "moec.exchange")] == ["direct"]


def test_an_unknown_collective_is_refused_with_the_nearest() -> None:
    with pytest.raises(CostError, match="all_reduce"):
        collective_seconds(one_device_a_node(), "all_reduse", even_spread(2, 1), 2, 8)


def test_ranks_on_nodes_that_nothing_connects_are_refused() -> None:
    alone = Hardware.shipped("a100").model_copy(update={"between": None})
    with pytest.raises(CostError, match="between"):
        collective_seconds(alone, "all_reduce", even_spread(16, 8), 30, 8)
    assert collective_seconds(alone, "all_reduce", even_spread(8, 8), 14, 8) > 0


patterns = st.sampled_from(["all_reduce", "all_gather_into_tensor", "moec.exchange"])


@given(clusters(), patterns, st.integers(1, 12), st.floats(1, 1e9))
def test_letters_and_numbers_say_the_same(
    hardware: Hardware, operator: str, ranks: int, num_bytes: float
) -> None:
    spread = even_spread(ranks, hardware.per_node)
    assume(ranks > 1 and spread.ranks % spread.fewest == 0)
    p, b = sympy.symbols("p b", positive=True)
    told = collective_expression(hardware, operator, p, b, spread.fewest if spread.crosses else p)
    messages = (2 if operator == "all_reduce" else 1) * (ranks - 1)
    found = collective_seconds(hardware, operator, spread, messages, num_bytes)
    assert float(told.subs({p: ranks, b: num_bytes})) == pytest.approx(found, abs=1e-12)


@given(clusters(2), patterns, st.integers(2, 32), st.floats(1, 1e9), st.floats(1.0, 10.0))
def test_more_bytes_are_never_faster_and_faster_links_never_slower(
    hardware: Hardware, operator: str, ranks: int, num_bytes: float, factor: float
) -> None:
    spread, messages = even_spread(ranks, hardware.per_node), ranks - 1

    def seconds(on: Hardware, size: float) -> float:
        return collective_seconds(on, operator, spread, messages, size)

    before = seconds(hardware, num_bytes)
    assert seconds(hardware, num_bytes * factor) >= before * (1 - 1e-9)
    for name in ("inside", "between"):
        link = getattr(hardware, name)
        faster = link.model_copy(update={"bandwidth": link.bandwidth * factor})
        assert seconds(hardware.model_copy(update={name: faster}), num_bytes) / (1 + 1e-9) <= before * (
            1 + 1e-9
        )


def test_several_collectives_in_one_follow_one_another() -> None:
    hardware, spread = Hardware.shipped("a100x16"), even_spread(16, 8)
    once = collective_seconds(hardware, "all_reduce", spread, 30, 1e6)
    assert collective_seconds(hardware, "all_reduce", spread, 90, 3e6) == pytest.approx(3 * once)


def test_one_rank_and_nothing_to_send_take_no_time() -> None:
    hardware = Hardware.shipped("a100")
    assert collective_seconds(hardware, "all_reduce", Spread(1, 1, 1, 1), 0, 0) == 0
    assert collective_seconds(hardware, "moec.exchange", even_spread(4, 8), 0, 0) == 0


MESH = Mesh(8, 2, 8, (("moe_1", ExpertAxes(2, 4, 2)), ("moe_3", ExpertAxes(1, 16))))


def test_axes_that_are_given_arrange_the_others() -> None:
    found = arranged(MESH, {"tensor": 4, "data": 8, "expert_4x2": 8}).numbers
    assert found["world"] == 32
    assert (found["expert_4x2"], found["slice_4x2"], found["expert_data_4x2"]) == (8, 2, 2)
    assert (found["expert_4x2_inside"], found["expert_4x2_between"]) == (4, 2)
    assert (found["expert_16"], found["expert_data_16"], found["expert_16_inside"]) == (16, 2, 8)
    assert arranged(MESH, {"world": 64}).numbers["data"] == 32
    assert arranged(MESH, {}).numbers == MESH.axes()


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([2, 4, 8]),
)
def test_numbers_are_those_of_a_mesh_made_so(
    data: int, tensor: int, expert: int, slices: int, node: int
) -> None:
    assume((data * tensor) % (expert * slices) == 0)
    axes = ExpertAxes(data * tensor // (expert * slices), expert, slices)
    made = Mesh(data, tensor, node, (("moe_1", axes),))
    start = Mesh(4, 2, node, (("moe_1", ExpertAxes(2, 2, 2)),))
    found = arranged(start, {"data": data, "tensor": tensor, "expert_2x2": expert, "slice_2x2": slices})
    for kind in ("slice", "expert", "data", "alike", "inside", "between"):
        before, after = (getattr(one, f"{kind}_axis") for one in (ExpertAxes(2, 2, 2), axes))
        assert found.numbers[before] == made.axes()[after], kind
        assert found.spread(before, node) == spread_of(made, after, node)


@pytest.mark.parametrize(
    ("letters", "found"),
    [
        ({"tensor": 3, "world": 64}, "tensor 3"),
        ({"data": 3}, "expert_4x2 = 4"),
        ({"expert_data_4x2": 3}, "expert_data_4x2 = 3"),
        ({"data": 16, "world": 16}, "world = 16"),
    ],
)
def test_numbers_that_make_no_mesh_are_refused(letters: dict[str, int], found: str) -> None:
    with pytest.raises(MeshError, match=found):
        arranged(MESH, letters)
