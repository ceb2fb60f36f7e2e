"""How long a collective takes: steps of latency, and bytes over the link that carries most of them.

    ring      start + steps · latency + bytes / bandwidth, where all_gather and reduce_scatter of p ranks take
              p - 1 steps and all_reduce 2 (p - 1) (Thakur, Rabenseifner, Gropp 2005, sections 4.1 and 4.5)
    tree      all_reduce: start + 2 ((c - 1) · inside + log2(nodes) · between) + 2 · bytes / bandwidth
              (Sanders, Speck, Träff 2009, as NCCL reckons; c: ranks of a node)
    direct    all_to_all: start + p - 1 messages + bytes / bandwidth, O(p); exchanged inside nodes and then
              between them it is O(c + p / c), of one rank's part of the tokens O(p / L) + O(L)
              (DeepSpeed-MoE, section 5.3: several exchanges in a graph, each timed for itself)

All groups of an axis work at the same time. Inside a node every device has a link to a switch of its own; a
device's part of the node's network cards is `Hardware.card_bandwidth`. A group that has c devices on a node
sends a ring's bytes through the cards of all c. The fastest of the hardware's ways is taken, as libraries do.

The formulas are written once, for numbers and for sympy's expressions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy

from moec.cost.machine.hardware import Hardware
from moec.cost.machine.link import Way, plain_ways
from moec.cost.machine.pattern import ALGORITHMS, PATTERNS, REDUCE
from moec.cost.timing.arranged import Spread
from moec.errors import CostError, nearest


@dataclass(frozen=True)
class _Shape:
    """A group as the formulas see it, in numbers or expressions: `ranks`, how many of them are on one node
    (`inside`), the `nodes`, and whether it leaves its node."""

    ranks: Any
    inside: Any
    nodes: Any
    crosses: bool


def pattern_of(operator: str) -> str:
    """Who sends to whom in `operator`; `CostError` for one that is not known."""
    if operator not in PATTERNS:
        needed = f"one of {', '.join(PATTERNS)}"
        raise CostError("collective", f"unknown collective {operator!r}", needed, nearest(operator, PATTERNS))
    return PATTERNS[operator]


def ways_of(hardware: Hardware, operator: str) -> list[Way]:
    """How `operator` can go on this hardware: those that name it, else all of a fitting algorithm."""
    fitting = ALGORITHMS[pattern_of(operator)]
    known = hardware.ways or plain_ways(hardware.inside, hardware.between)
    own = [way for way in known if operator in way.operators]
    found = own or [way for way in known if way.algorithm in fitting and not way.operators]
    return found or [w for w in plain_ways(hardware.inside, hardware.between) if w.algorithm in fitting]


def collective_seconds(
    hardware: Hardware, operator: str, spread: Spread, messages: float, num_bytes: float
) -> float:
    """Seconds of `operator` over groups that lie as `spread` says.

    `messages`, `num_bytes`: what one rank sends to others (`Sending`); where the messages are several times
    those of one collective, it is that many of them, one after the other.
    """
    if spread.ranks <= 1 or (not messages and not num_bytes):
        return 0.0
    _require_connected(hardware, spread)
    one = _messages(pattern_of(operator), spread.ranks)
    calls = max(1.0, messages / one)
    part = min(1.0, messages / one) if messages else 1.0
    shape = _Shape(spread.ranks, spread.fewest, spread.nodes, spread.crosses)
    ways = ways_of(hardware, operator)
    return calls * min(_seconds(hardware, operator, way, shape, num_bytes / calls, part) for way in ways)


def collective_expression(
    hardware: Hardware, operator: str, ranks: Any, num_bytes: Any, inside: Any = 1
) -> sympy.Expr:
    """The same for letters: seconds of one `operator` over groups of `ranks`, `inside` of each on one node.

    `num_bytes`: what one rank sends to others. Where `inside` is `ranks` itself, a group stays on its node.
    """
    ranks, inside, num_bytes = map(sympy.sympify, (ranks, inside, num_bytes))
    shape = _Shape(ranks, inside, ranks / inside, ranks != inside)
    ways = ways_of(hardware, operator)
    return sympy.Min(*(sympy.sympify(_seconds(hardware, operator, way, shape, num_bytes, 1)) for way in ways))


def exchange_expressions(
    hardware: Hardware, ranks: Any, inside: Any, num_bytes: Any
) -> dict[str, sympy.Expr]:
    """Seconds of the three ways to bring `num_bytes` of each of `ranks` ranks to their experts, there alone.

    `inside`: neighbouring ranks on a node (G; for `coordinated` those that hold the same tokens, L).
    `num_bytes`: all rows of a rank, its own part included. Source: DeepSpeed-MoE, sections 5.2 and 5.3.
    """
    p, g, volume = map(sympy.sympify, (ranks, inside, num_bytes))
    flat = collective_expression(hardware, "moec.exchange", p, volume * (p - 1) / p, g)
    within = collective_expression(hardware, "moec.exchange", g, volume * (g - 1) / g, g)
    across = collective_expression(hardware, "moec.exchange", p / g, volume * (1 - g / p), 1)
    share = collective_expression(hardware, "moec.exchange", p / g, volume / g * (1 - g / p), 1)
    whole = collective_expression(hardware, "moec.unshare", g, volume * (g - 1) / g, g)
    return {"flat": flat, "hierarchical": within + across, "coordinated": share + whole}


def _messages(pattern: str, ranks: Any) -> Any:
    return 2 * (ranks - 1) if pattern == REDUCE else ranks - 1


def _seconds(hardware: Hardware, operator: str, way: Way, shape: _Shape, num_bytes: Any, part: Any) -> Any:
    if way.algorithm == "direct":
        return _direct(hardware, way, shape, num_bytes, part)
    slowest = hardware.inside.bandwidth
    if shape.crosses:
        slowest = _least(slowest, shape.inside * hardware.card_bandwidth)
    moved = num_bytes / (slowest * way.share)
    if way.algorithm == "tree":
        # A ring sends 2 (p - 1) / p of the tensor over each link, a tree all of it, up and down.
        steps = 2 * ((shape.inside - 1) * way.inside + _log2(shape.nodes) * way.between)
        return way.start + steps + moved * shape.ranks / (shape.ranks - 1)
    rounds = 2 if pattern_of(operator) == REDUCE else 1
    between = rounds * (shape.nodes - 1)
    steps = (rounds * (shape.ranks - 1) - between) * way.inside + between * way.between
    return way.start + steps + moved


def _direct(hardware: Hardware, way: Way, shape: _Shape, num_bytes: Any, part: Any) -> Any:
    """Messages to the ranks of the node and to all others go at the same time, over links of their own."""
    near, far = shape.inside - 1, shape.ranks - shape.inside
    a_rank = num_bytes / (shape.ranks - 1)
    inside = _rounds(near * part, way.parallel) * way.inside
    inside += near * a_rank / (hardware.inside.bandwidth * way.share)
    if not shape.crosses:
        return way.start + inside
    between = _rounds(far * part, way.parallel) * way.between
    between += far * a_rank / (hardware.card_bandwidth * way.share)
    return way.start + _most(inside, between)


def _rounds(messages: Any, parallel: int) -> Any:
    """How many messages one rank sends one after the other; at least one, where there is any."""
    if parallel == 1 or messages == 0:
        return messages
    return _most(messages / parallel, _least(messages, 1))


def _require_connected(hardware: Hardware, spread: Spread) -> None:
    if spread.crosses and hardware.between is None:
        found = f"a group of {spread.ranks} ranks on {spread.nodes} nodes"
        raise CostError(hardware.device.name, found, "a table [between] in the hardware file")


def _most(*amounts: Any) -> Any:
    return sympy.Max(*amounts) if any(isinstance(one, sympy.Basic) for one in amounts) else max(amounts)


def _least(*amounts: Any) -> Any:
    return sympy.Min(*amounts) if any(isinstance(one, sympy.Basic) for one in amounts) else min(amounts)


def _log2(amount: Any) -> Any:
    return sympy.log(amount, 2) if isinstance(amount, sympy.Basic) else math.log2(amount)
