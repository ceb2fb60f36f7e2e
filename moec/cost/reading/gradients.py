"""What runs backward, and what is kept for it: the part of a walk that follows autograd.

Backward runs through the operations that the results of a graph come of, along values that need gradients.
What autograd keeps for them is in memory once, however many operations and views name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sympy

from moec.cost.operation import Operation
from moec.cost.reading.call import GraphCall
from moec.cost.reading.value import Memory, Value
from moec.runtime.ops.work import NOTHING, Price


@dataclass(frozen=True)
class _Kept:
    """What one operation keeps: `memories` that hold values, and `extra` bytes of its own."""

    memories: tuple[Memory, ...]
    extra: sympy.Expr
    pulls: frozenset[int]


class Gradients:
    """Notes of the operations of a walk, by their index."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._memories: dict[tuple[int, int], Memory] = {}

    def memory(self, index: int, call: GraphCall, place: int) -> Memory | None:
        """What the result at `place` lies in: that of the operand it is a view of, or its own."""
        view = call.answer.views[place]
        if view is not None:
            return call.inputs[view].memory
        known = self._memories.get((index, place))
        return known or self._own(index, call, place)

    def _own(self, index: int, call: GraphCall, place: int) -> Memory:
        found = Memory(len(self._memories), index, call.results[place].bytes)
        return self._memories.setdefault((index, place), found)

    def note(self, index: int, call: GraphCall, price: Price) -> None:
        """Note what the operation `index` keeps, and where its gradient goes."""
        if not any(call.answer.learns):
            return
        values, extra = _held(call, price)
        memories = [
            call_memory for call_memory in (self._of(index, call, one) for one in values) if call_memory
        ]
        pulls = frozenset[int]().union(*(value.pulls for value in call.inputs))
        self._kept[index] = _Kept(tuple(memories), extra, pulls)

    def _of(self, index: int, call: GraphCall, value: Value | int) -> Memory | None:
        return value.memory if isinstance(value, Value) else self.memory(index, call, value)

    def settled(self, operations: Sequence[Operation], results: Iterable[Value]) -> tuple[Operation, ...]:
        """The operations with what they keep; those that no result comes of have no backward."""
        alive = self._alive(results)
        seen: set[int] = set()
        return tuple(
            self._settled(index, one, seen) if index in alive else _without_backward(one)
            for index, one in enumerate(operations)
        )

    def _alive(self, results: Iterable[Value]) -> set[int]:
        alive: set[int] = set()
        waiting = [index for value in results for index in value.pulls]
        while waiting:
            index = waiting.pop()
            if index not in alive:
                alive.add(index)
                waiting += self._kept[index].pulls
        return alive

    def _settled(self, index: int, operation: Operation, seen: set[int]) -> Operation:
        kept = self._kept[index]
        new = [memory for memory in dict.fromkeys(kept.memories) if memory.number not in seen]
        seen.update(memory.number for memory in new)
        return replace(operation, saved=kept.extra + sum(memory.bytes for memory in new))


def _held(call: GraphCall, price: Price) -> tuple[list[Value | int], sympy.Expr]:
    """The values that are kept, results by number, and the bytes beside them."""
    if price.shared is not None:
        named: list[Value | int] = []
        for name in price.shared:
            named += [name] if isinstance(name, int) else call.values(name)
        return named, sympy.sympify(price.saved)
    inputs = call.inputs
    found = [inputs[place] if place < len(inputs) else place - len(inputs) for place in call.answer.kept]
    values = [*inputs, *call.results]
    extra = [itemsize * numel(values) for itemsize, numel in call.answer.extra]
    return list(found), sympy.Add(*extra)


def _without_backward(operation: Operation) -> Operation:
    if operation.backward is NOTHING and not operation.sends_back:
        return operation
    return replace(operation, backward=NOTHING, sends_back=())
