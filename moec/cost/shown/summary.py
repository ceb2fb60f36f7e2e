"""The operations of a cost, added up: by kind of work, layer, region, operator, or axis of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy

from moec.cost.operation import KINDS, Operation, Sending
from moec.cost.shown.spelling import expanded
from moec.cost.shown.table import Column, Table
from moec.cost.symbols import meaning
from moec.errors import CostError, nearest

if TYPE_CHECKING:
    from moec.cost.cost import Cost

BY = ("kind", "layer", "region", "operator", "axis")
OUTSIDE = "outside of layers"

Letters = Mapping[str, int]


def total(amounts: Iterable[Any]) -> sympy.Expr:
    """The sum; alike amounts are added up before anything is multiplied out."""
    return sympy.Add(*(count * expanded(amount) for amount, count in Counter(amounts).items()))


def table_of(cost: Cost, by: str, letters: Letters) -> Table:
    """What `Cost.table` gives; raises `CostError` for a `by` that is none of `BY`."""
    if by not in BY:
        raise CostError("Cost.table", f"by = {by!r}", f"one of {', '.join(BY)}", nearest(by, BY))
    return _of_axes(cost, letters) if by == "axis" else _of_operations(cost, by, letters)


def _of_operations(cost: Cost, by: str, letters: Letters) -> Table:
    amounts = _amounts(cost)
    fill = filler(cost, letters)

    def of(members: Iterable[Operation], amount: Callable[[Operation], Any]) -> Any:
        return total(cost.times(one) * amount(one) for one in members)

    rows = [
        (name, len(members), *(fill(of(members, amount)) for amount in amounts.values()))
        for name, members in _grouped(cost.operations, by).items()
    ]
    whole = [fill(of(cost.operations, amount)) for amount in amounts.values()]
    return Table(
        (Column(by), Column("operators"), *amounts),
        tuple(row for row in rows if any(cell != 0 for cell in row[2:])),
        total=("all", len(cost.operations), *whole),
        notes=notes_on([cell for row in rows for cell in row[2:]]),
    )


def _amounts(cost: Cost) -> dict[Column, Callable[[Operation], Any]]:
    """The columns, and what of an operation stands in each."""
    forward: dict[Column, Callable[[Operation], Any]] = {
        Column("FLOPs", "FLOP"): lambda one: one.forward.flops,
        Column("bytes", "B"): lambda one: one.forward.bytes,
        Column("kernels"): lambda one: one.forward.calls,
        Column("sent", "B"): lambda one: sum(sent.bytes for sent in one.sends),
    }
    if cost.phase != "training":
        return forward
    return {
        Column("FLOPs forward", "FLOP"): lambda one: one.forward.flops,
        Column("FLOPs backward", "FLOP"): lambda one: one.backward.flops,
        Column("bytes", "B"): lambda one: one.forward.bytes + one.backward.bytes,
        Column("kernels"): lambda one: one.forward.calls + one.backward.calls,
        Column("sent", "B"): lambda one: sum(sent.bytes for sent in (*one.sends, *one.sends_back)),
    }


def _grouped(operations: Sequence[Operation], by: str) -> dict[str, list[Operation]]:
    """The operations by what they share, in the order of first appearance; kinds and layers in theirs."""
    found: dict[str, list[Operation]] = {kind: [] for kind in KINDS} if by == "kind" else {}
    for one in operations if by != "layer" else sorted(operations, key=_layer):
        found.setdefault(_name(one, by), []).append(one)
    return {name: members for name, members in found.items() if members}


def _layer(one: Operation) -> float:
    return math.inf if one.layer is None else one.layer


def _name(one: Operation, by: str) -> str:
    if by == "layer":
        return OUTSIDE if one.layer is None else str(one.layer)
    return str(getattr(one, by)) or OUTSIDE


def _of_axes(cost: Cost, letters: Letters) -> Table:
    """What is sent: a row for each axis, direction and operator."""
    sent: dict[tuple[str, str, str], list[Sending]] = {}
    for one in cost.operations:
        for direction, sends in (("forward", one.sends), ("backward", one.sends_back)):
            for each in sends:
                sent.setdefault((each.axis, direction, each.operator), []).extend([each] * cost.times(one))
    fill = filler(cost, letters)
    ranks = {str(letter): int(number) for letter, number in cost.given(letters).items()}
    rows = tuple(
        (axis, ranks[axis], direction, operator, sum(one.calls for one in sends), *_totals(sends, fill))
        for (axis, direction, operator), sends in sent.items()
    )
    names = ("axis", "ranks", "direction", "operator", "calls", "messages")
    every = [each for sends in sent.values() for each in sends]
    return Table(
        (*map(Column, names), Column("bytes", "B")),
        rows,
        total=("all", "", "", "", sum(one.calls for one in every), *_totals(every, fill)),
        notes=notes_on([cell for row in rows for cell in row[5:]]),
    )


def _totals(sends: Sequence[Sending], fill: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Messages and bytes together."""
    return fill(total(each.messages for each in sends)), fill(total(each.bytes for each in sends))


def filler(cost: Cost, letters: Letters) -> Callable[[Any], Any]:
    """Puts numbers in, those of axes too; where none are given, axes stay letters."""
    if not letters:
        return lambda amount: amount
    given = cost.given(letters)
    return lambda amount: _number(sympy.sympify(amount).xreplace(given))


def _number(amount: Any) -> Any:
    if not amount.is_number:
        return amount
    return int(amount) if amount.is_Integer else float(amount)


def notes_on(amounts: Iterable[Any]) -> tuple[str, ...]:
    """A line for every letter among `amounts`: what it stands for."""
    free = {letter for amount in amounts for letter in getattr(amount, "free_symbols", ())}
    names = sorted(map(str, free), key=lambda name: (len(name), name))
    width = max(map(len, names), default=0)
    return ("", *(f"{name:<{width}}  {meaning(name)}" for name in names)) if names else ()
