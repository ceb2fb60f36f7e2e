"""What a line sends to other ranks, and along which axis."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

from moec.cost.reading.sendings import SENDERS
from moec.ir.patterns import arguments_of

_AXIS = ("axis", "group_name")


def exchange_of(node: fx.Node) -> tuple[str, str]:
    """(operator, axis) of the message that `node` sends: `all_reduce`, `tensor`; ('', '') for none."""
    if not isinstance(node.target, OpOverload) or node.target._schema.name not in SENDERS:
        return "", ""
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, arguments_of(node), strict=True))
    axis = next((str(given[name]) for name in _AXIS if given.get(name)), "")
    return node.target._opname, axis
