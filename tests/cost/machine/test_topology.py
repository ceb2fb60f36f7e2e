"""The graph of a cluster: ways through it, and what its busiest links say of collectives."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.cost import Hardware, Link
from moec.cost.machine.topology import SPINE, Topology
from moec.cost.timing.arranged import spread_of
from moec.cost.timing.collectives import collective_seconds
from moec.ir.mesh import ExpertAxes, Mesh
from tests.cost.clusters import clusters


def a_cluster(per_node: int = 4, nodes: int = 3, cards: int | None = None) -> Hardware:
    """No latencies: what takes time are bytes."""
    return Hardware(
        device=Hardware.shipped("a100").device,
        inside=Link(latency=0.0, bandwidth=100.0),
        between=Link(latency=0.0, bandwidth=10.0),
        per_node=per_node,
        nodes=nodes,
        cards=cards,
    )


def test_inside_a_node_it_goes_by_the_switch_and_between_nodes_by_cards() -> None:
    topology = Topology(a_cluster())
    assert topology.route(0, 3) == (
        (("device", 0, 0), ("switch", 0)),
        (("switch", 0), ("device", 0, 3)),
    )
    same_rail = [edge[1] for edge in topology.route(1, 5)]
    assert same_rail == [("card", 0, 1), ("rail", 1), ("card", 1, 1), ("device", 1, 1)]
    assert SPINE in [edge[1] for edge in topology.route(1, 6)]


@settings(max_examples=20)
@given(clusters())
def test_every_device_reaches_every_other_and_never_through_a_third(hardware: Hardware) -> None:
    topology = Topology(hardware)
    assert nx.is_strongly_connected(topology.graph)
    for target in range(1, hardware.world):
        passed = [edge[1] for edge in topology.route(0, target)[:-1]]
        assert all(vertex[0] != "device" for vertex in passed)
        crosses = target >= hardware.per_node
        assert any(vertex[0] == "card" for vertex in passed) == crosses


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.sampled_from([2, 3, 4, 6, 8, 12]), st.booleans())
def test_an_exchange_takes_what_its_busiest_link_takes(
    per_node: int, nodes: int, ranks: int, one_card: bool
) -> None:
    hardware = a_cluster(per_node, nodes, 1 if one_card else None)
    if hardware.world % ranks:
        return
    mesh = Mesh(hardware.world, 1, per_node, (("moe_0", ExpertAxes(hardware.world // ranks, ranks)),))
    axis = mesh.axes_of("moe_0").expert_axis
    topology, spread = Topology(hardware), spread_of(mesh, axis, per_node)
    _, busiest = topology.busiest(topology.all_to_all(mesh.groups(axis), 1000.0))
    if spread.fewest != spread.most:
        return  # groups that lie unevenly on nodes: the formula takes the worst of both, told below
    assert collective_seconds(hardware, "moec.exchange", spread, ranks - 1, 1000.0) == pytest.approx(busiest)


def test_groups_that_lie_unevenly_take_at_least_their_busiest_link() -> None:
    hardware = a_cluster(per_node=4, nodes=3)
    mesh = Mesh(12, 1, 4, (("moe_0", ExpertAxes(2, 6)),))
    topology, spread = Topology(hardware), spread_of(mesh, "expert_6", 4)
    assert (spread.fewest, spread.most, spread.nodes) == (2, 4, 2)
    _, busiest = topology.busiest(topology.all_to_all(mesh.groups("expert_6"), 1000.0))
    assert collective_seconds(hardware, "moec.exchange", spread, 5, 1000.0) >= busiest


@pytest.mark.parametrize(("ranks", "stride"), [(4, 1), (12, 1), (3, 4), (6, 2)])
def test_a_ring_takes_what_its_busiest_link_takes(ranks: int, stride: int) -> None:
    """Rings start at every device of a node in turn, so that all its cards carry the same."""
    hardware = a_cluster(per_node=4, nodes=3)
    mesh = {1: Mesh(12 // ranks, ranks, 4), 2: Mesh(6, 2, 4), 4: Mesh(3, 4, 4)}[stride]
    axis = "tensor" if stride == 1 else "data"
    sent: dict[tuple[int, int], float] = {}
    for group in mesh.groups(axis):
        for ring in rings(group, per_node=4):
            for source, target in zip(ring, ring[1:] + ring[:1], strict=True):
                bytes_of_ring = 1000.0 / len(rings(group, per_node=4))
                sent[source, target] = sent.get((source, target), 0.0) + bytes_of_ring
    topology = Topology(hardware)
    _, busiest = topology.busiest(topology.loads(sent))
    spread = spread_of(mesh, axis, 4)
    assert spread.ranks == ranks
    found = collective_seconds(hardware, "all_gather_into_tensor", spread, ranks - 1, 1000.0)
    assert found == pytest.approx(busiest)


def rings(group: tuple[int, ...], per_node: int) -> list[list[int]]:
    """One ring for each member on a node, entering and leaving every node at another device."""
    nodes: dict[int, list[int]] = {}
    for rank in group:
        nodes.setdefault(rank // per_node, []).append(rank)
    held = list(nodes.values())
    return [[rank for own in held for rank in own[turn:] + own[:turn]] for turn in range(len(held[0]))]


def test_it_is_drawn() -> None:
    topology = a_cluster(per_node=2, nodes=2).topology()
    lines = topology.dot().splitlines()
    assert '  "device 0 0" -- "switch 0" [label="1e-07 GB/s"]' in lines
    # Four devices with two links each, four cards to rails, two rails to the spine.
    assert len([line for line in lines if " -- " in line]) == 4 * 2 + 4 + 2
    assert str(topology).splitlines()[0] == "2 × 2 A100-SXM4-40GB"
    assert "4 × 4" not in str(topology)
