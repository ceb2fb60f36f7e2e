"""What a rank sends, by direction, axis and operator: as expressions, and to the byte for given numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy

from moec.cost.letters import missing
from moec.cost.operation import Operation, Sending
from moec.runtime.ops.sent import BACKWARD, FORWARD, Kind, Sent, Traffic
from moec.runtime.ops.work import Amount


def traffic_of(operations: Sequence[Operation], parts: int) -> dict[Kind, Sent]:
    """The traffic of a step in `parts` parts, sums of expressions; a fraction of a byte is left in."""
    found: dict[Kind, list[Sent]] = {}
    for kind, one, times in _sendings(operations, parts):
        sent = Sent(times * one.calls, times * one.messages, times * one.bytes)
        found.setdefault(kind, []).append(sent)
    return {
        kind: Sent(
            *(sympy.Add(*(getattr(sent, what) for sent in all_)) for what in ("calls", "messages", "bytes"))
        )
        for kind, all_ in sorted(found.items())
    }


def counted_traffic_of(
    operations: Sequence[Operation], parts: int, given: Mapping[sympy.Symbol, sympy.Expr]
) -> Traffic:
    """The same in whole numbers, as `moec.runtime.traffic.count_traffic` counts: each call is rounded for
    itself. Raises `CostError` for a letter that has no number."""
    numbers, traffic = _Numbers(given), Traffic()
    for kind, one, times in _sendings(operations, parts):
        sent = Sent(numbers(one.calls), numbers(one.messages), numbers(one.bytes))
        for _ in range(times):
            traffic.add(kind, sent)
    return traffic


def _sendings(operations: Sequence[Operation], parts: int) -> Iterator[tuple[Kind, Sending, int]]:
    """(kind, what is sent, how often in a step)."""
    for one in operations:
        times = 1 if one.kind == "optimizer" else parts
        for direction, sends in ((FORWARD, one.sends), (BACKWARD, one.sends_back)):
            for sent in sends:
                yield Kind(direction, sent.axis, sent.operator), sent, times


class _Numbers:
    """Whole numbers for expressions; each distinct one is computed once."""

    def __init__(self, given: Mapping[sympy.Symbol, sympy.Expr]) -> None:
        self._given, self._known = dict(given), dict[Any, int]()

    def __call__(self, amount: Amount) -> int:
        if amount not in self._known:
            # All at once: sympy compares a maximum wrongly of which some letters are known.
            found = sympy.sympify(amount).xreplace(self._given)
            if found.free_symbols:
                raise missing(min(map(str, found.free_symbols)))
            self._known[amount] = int(sympy.floor(found))
        return self._known[amount]
