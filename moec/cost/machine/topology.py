"""What is connected to what: devices, switches of a node, network cards, switches between nodes.

    topology = Topology(Hardware.shipped("a100x16"))
    topology.route(0, 9)                              # the links from device 0 to device 9
    topology.busiest(topology.loads({(0, 9): 4096}))  # the one that takes longest, and its seconds
    print(topology);  topology.dot()

A node's devices hang on one switch. Card j of every node hangs on the j-th *rail*, a switch between nodes,
and rails on a spine that carries all they can bring (a full fat tree). `collectives.py` has closed formulas;
they say what the busiest link of this graph says.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import networkx as nx

from moec.cost.machine.hardware import Hardware

Vertex = tuple[Any, ...]
Edge = tuple[Vertex, Vertex]

SPINE: Vertex = ("spine",)


class Topology:
    """`graph`: directed, an edge for each direction of each link, with `bandwidth` and `latency`."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.cards = hardware.per_node if hardware.cards is None else hardware.cards
        self.graph: nx.DiGraph[Vertex] = nx.DiGraph()
        self.route = cache(self._route)
        for node in range(hardware.nodes):
            self._add_node(node)
        if hardware.nodes > 1:
            self._add_spine()

    def device(self, rank: int) -> Vertex:
        """The vertex of a rank: neighbours fill a node."""
        return ("device", rank // self.hardware.per_node, rank % self.hardware.per_node)

    def _add_node(self, node: int) -> None:
        inside, between = self.hardware.inside, self.hardware.between
        for place in range(self.hardware.per_node):
            device = ("device", node, place)
            self._connect(device, ("switch", node), inside.bandwidth, inside.latency / 2)
            if between and self.hardware.nodes > 1:
                card = ("card", node, self._card(place))
                self._connect(device, card, between.bandwidth, 0.0)
                self._connect(card, ("rail", self._card(place)), between.bandwidth, between.latency / 2)

    def _card(self, place: int) -> int:
        return place * self.cards // self.hardware.per_node

    def _add_spine(self) -> None:
        between = self.hardware.between
        assert between is not None, "hardware of several nodes says what connects them"
        for rail in range(self.cards):
            self._connect(("rail", rail), SPINE, between.bandwidth * self.hardware.nodes, 0.0)

    def _connect(self, one: Vertex, other: Vertex, bandwidth: float, latency: float) -> None:
        for edge in ((one, other), (other, one)):
            self.graph.add_edge(*edge, bandwidth=bandwidth, latency=latency)

    def _route(self, source: int, target: int) -> tuple[Edge, ...]:
        """The links of the quickest way from one rank's device to another's; inside a node by its switch."""
        path = nx.shortest_path(self.graph, self.device(source), self.device(target), weight=self._weight)
        return tuple(itertools.pairwise(path))

    def _weight(self, one: Vertex, other: Vertex, link: Mapping[str, float]) -> float | None:
        """Seconds of a small message; and no way through another device or, inside a node, through a card."""
        away = 1.0 if one[0] in ("device", "card") else 0.0
        return float(away + link["latency"] + 1.0 / link["bandwidth"])

    def loads(self, sent: Mapping[tuple[int, int], float]) -> dict[Edge, float]:
        """Bytes over every link, for bytes from rank to rank."""
        found: dict[Edge, float] = defaultdict(float)
        for (source, target), num_bytes in sent.items():
            for edge in self.route(source, target) if source != target else ():
                found[edge] += num_bytes
        return dict(found)

    def busiest(self, loads: Mapping[Edge, float]) -> tuple[Edge, float]:
        """The link that takes longest for its bytes, and how long."""
        times = {edge: num_bytes / self.graph.edges[edge]["bandwidth"] for edge, num_bytes in loads.items()}
        edge = max(times, key=lambda one: times[one])
        return edge, times[edge]

    def all_to_all(self, groups: Iterable[tuple[int, ...]], num_bytes: float) -> dict[Edge, float]:
        """Bytes over every link where every rank sends `num_bytes` to its group's others, evenly."""
        sent = {
            (source, target): num_bytes / (len(group) - 1)
            for group in groups
            for source in group
            for target in group
            if source != target
        }
        return self.loads(sent)

    def dot(self) -> str:
        """As Graphviz reads it, one line for both directions of a link."""
        lines = ["graph topology {", "  node [shape=box]"]
        for one, other, link in self.graph.edges(data=True):
            if one < other:
                label = f"{link['bandwidth'] / 1e9:g} GB/s"
                lines.append(f'  "{_name(one)}" -- "{_name(other)}" [label="{label}"]')
        return "\n".join([*lines, "}"])

    def __str__(self) -> str:
        hardware = self.hardware
        speed = f"{hardware.inside.bandwidth / 1e9:g} GB/s"
        lines = [f"{hardware.nodes} × {hardware.per_node} {hardware.device.name}"]
        lines += [f"inside a node   every device ── {speed} ── switch"]
        if hardware.between and hardware.nodes > 1:
            speed = f"{hardware.between.bandwidth / 1e9:g} GB/s"
            lines += [f"between nodes   {self.cards} cards a node ── {speed} ── {self.cards} rails ── spine"]
        return "\n".join(lines)


def _name(vertex: Vertex) -> str:
    return " ".join(map(str, vertex))
