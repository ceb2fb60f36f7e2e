"""The time of a cost as one expression: the roofline, operator by operator, without anything that overlaps.

Each operator takes the longer of its arithmetic and its memory, and its launches; each message its latency,
and the bytes their time on the link. It is what can be solved for a letter (`crossover`), and coarser than
`predict`: no tiles, no caches, no measured tables, no contention, and no communication hidden behind work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sympy

from moec.cost.machine.hardware import Hardware
from moec.cost.shown.spelling import expanded
from moec.cost.symbols import rate

if TYPE_CHECKING:
    from moec.cost.cost import Cost
    from moec.cost.operation import Operation, Sending
    from moec.ir.mesh import Mesh


def seconds_expression(cost: Cost, hardware: Hardware | None = None) -> sympy.Expr:
    """Seconds of one run in the letters of `cost`, and in those of hardware where none is given.

    Those are `peak`, `bandwidth`, `launch`, `latency` and `link` (`moec.cost.symbols`), the same for every
    dtype and every axis. With hardware, an axis goes by the links that it has on the ranks of this cost, and
    `PlanError` names a dtype without a peak.
    """
    terms = Counter[sympy.Expr]()
    for one in cost.operations:
        for term in _terms(one, cost.mesh, hardware):
            terms[term] += cost.times(one)
    return sympy.Add(*(count * term for term, count in terms.items()))


def _terms(one: Operation, mesh: Mesh, hardware: Hardware | None) -> Iterator[sympy.Expr]:
    """Seconds forward, backward, and of what is sent."""
    for work in (one.forward, one.backward):
        if work.calls != 0:
            peak, bandwidth, launch = _rates(one.dtype if work.flops != 0 else "", hardware)
            yield _longer(expanded(work.flops) / peak, expanded(work.bytes) / bandwidth) + launch * work.calls
    for sent in (*one.sends, *one.sends_back):
        yield _sent(sent, mesh, hardware)


def _longer(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    # Not evaluated: sympy would try to prove which is larger, for every pair.
    return other if one == 0 else sympy.Max(one, other, evaluate=False)


def _rates(dtype: str, hardware: Hardware | None) -> tuple[Any, Any, Any]:
    """Operations and bytes a second, and seconds of a launch; without a dtype no operations are asked for."""
    if hardware is None:
        return rate("peak"), rate("bandwidth"), rate("launch")
    device = hardware.device
    peak = device.peak_of(dtype) * device.product_share if dtype else 1.0
    return peak, device.bandwidth * device.memory_share, device.launch


def _sent(sent: Sending, mesh: Mesh, hardware: Hardware | None) -> sympy.Expr:
    if hardware is None:
        return sent.messages * rate("latency") + expanded(sent.bytes) / rate("link")
    nodes = {rank // hardware.per_node for rank in mesh.group(sent.axis, 0)}
    if len(nodes) > 1 and hardware.between is not None:
        return sent.messages * hardware.between.latency + expanded(sent.bytes) / hardware.card_bandwidth
    return sent.messages * hardware.inside.latency + expanded(sent.bytes) / hardware.inside.bandwidth
